"""What other libraries saved, in polyak's form."""

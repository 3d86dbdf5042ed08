"""The tensors of a model: slots and names, memory that they share, what optimizers move, whether they have changed."""

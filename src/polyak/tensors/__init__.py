"""Which tensors a model has: slots and their names, memory that they share, what optimizers move."""

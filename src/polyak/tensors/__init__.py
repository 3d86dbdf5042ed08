"""The tensors of a model: their slots and names, shared memory, moves by optimizers, and fingerprints."""

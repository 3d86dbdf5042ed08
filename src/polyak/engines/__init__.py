"""Engines whose optimizers step float32 masters instead of the model's parameters."""

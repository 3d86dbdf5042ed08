"""What every training loop stands on: algorithms in a loop, the steps that count, and what `attach` returns."""

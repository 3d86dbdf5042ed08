"""The parts that all training loops share: algorithms in a loop, the steps that count, and what `attach` returns."""

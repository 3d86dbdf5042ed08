"""Averages of weights: when they move and how much, where they are, and how they are swapped in."""

"""Averages of weights: when and how much they move, where they are kept, and how they are swapped in."""

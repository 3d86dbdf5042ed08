"""Evaluate the averages of a record under many profiles with a custom function, and find the best."""

from polyak.sweeping.evaluation import Evaluate
from polyak.sweeping.grid import finest_half_life, grid, narrowed, newest
from polyak.sweeping.results import EvaluationError, Result, best, value_of
from polyak.sweeping.sweep import export, sweep

__all__ = [
    "Evaluate",
    "EvaluationError",
    "Result",
    "best",
    "export",
    "finest_half_life",
    "grid",
    "narrowed",
    "newest",
    "sweep",
    "value_of",
]

"""Evaluates the averages of a record under many profiles with a custom function, and finds the best."""

from polyak.sweeping.checkpoint_outcome import CheckpointSweep, Tried
from polyak.sweeping.checkpoints import sweep_checkpoints
from polyak.sweeping.export import export
from polyak.sweeping.grid import finest_half_life, grid, narrowed, newest
from polyak.sweeping.held import held
from polyak.sweeping.outcome import SweepResult
from polyak.sweeping.recommending import recommend, recommended
from polyak.sweeping.results import EvaluationError, Result, best, records_in, value_of
from polyak.sweeping.returned import Evaluate
from polyak.sweeping.sweep import sweep

__all__ = [
    "CheckpointSweep",
    "Evaluate",
    "EvaluationError",
    "Result",
    "SweepResult",
    "Tried",
    "best",
    "export",
    "finest_half_life",
    "grid",
    "held",
    "narrowed",
    "newest",
    "recommend",
    "recommended",
    "records_in",
    "sweep",
    "sweep_checkpoints",
    "value_of",
]

"""The native trainer: a small training loop on events, its callbacks and loggers."""

from polyak.trainer.callback import Callback
from polyak.trainer.clipping import GradientClipping
from polyak.trainer.evaluators import Evaluator
from polyak.trainer.loggers import (
    ConsoleLogger,
    Destination,
    JSONLinesLogger,
    Logger,
    MLflowLogger,
    ProgressBar,
    TensorBoardLogger,
    WandBLogger,
)
from polyak.trainer.saver import CheckpointSaver
from polyak.trainer.state import TrainerState
from polyak.trainer.trainer import Trainer

__all__ = [
    "Callback",
    "CheckpointSaver",
    "ConsoleLogger",
    "Destination",
    "Evaluator",
    "GradientClipping",
    "JSONLinesLogger",
    "Logger",
    "MLflowLogger",
    "ProgressBar",
    "TensorBoardLogger",
    "Trainer",
    "TrainerState",
    "WandBLogger",
]

"""The native host: a small training loop on events, and what goes with it."""

from polyak.trainer.callback import Callback
from polyak.trainer.checkpoint import CheckpointSaver
from polyak.trainer.clipping import GradientClipping
from polyak.trainer.evaluation import Evaluator
from polyak.trainer.loggers import ConsoleLogger, Destination, JSONLinesLogger, Logger, TensorBoardLogger
from polyak.trainer.progress import ProgressBar
from polyak.trainer.state import TrainerState
from polyak.trainer.trackers import MLflowLogger, WandBLogger
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

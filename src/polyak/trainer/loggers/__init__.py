"""Where metrics go: destinations on the terminal, in files and in experiment trackers."""

from polyak.trainer.loggers.base import Destination, Logger
from polyak.trainer.loggers.mlflow import MLflowLogger
from polyak.trainer.loggers.progress import ProgressBar
from polyak.trainer.loggers.tensorboard import TensorBoardLogger
from polyak.trainer.loggers.text import ConsoleLogger, JSONLinesLogger
from polyak.trainer.loggers.wandb import WandBLogger

__all__ = [
    "ConsoleLogger",
    "Destination",
    "JSONLinesLogger",
    "Logger",
    "MLflowLogger",
    "ProgressBar",
    "TensorBoardLogger",
    "WandBLogger",
]

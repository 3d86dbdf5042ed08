"""What the loggers of experiment trackers share: a run that a resumed trainer continues."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from polyak.algorithm import MetricLogger
from polyak.errors import ArgumentError, MissingExtraError
from polyak.trainer.loggers.base import Destination
from polyak.trainer.state import TrainerState


def import_library(library: str, logger: str) -> Any:
    """Return the module of an extra.

    Args:
        library: Its name.
        logger: Which needs it, for the error.

    Raises:
        MissingExtraError: If it cannot be imported.
    """
    try:
        return import_module(library)
    except ImportError as error:
        raise MissingExtraError(
            f"{logger} needs {library}, which cannot be imported ({error}); pip install 'polyak[{library}]'"
        ) from error


def check_ranks(rank_zero_only: object) -> None:
    """Refuse to log on other ranks than rank 0.

    Args:
        rank_zero_only: As given, by Composer's name.

    Raises:
        ArgumentError: If it is not True.
    """
    if rank_zero_only is not True:
        raise ArgumentError(
            f"rank_zero_only must be True (got {rank_zero_only!r}): metrics are the same on all ranks, and rank 0 logs "
            "them; leave it out"
        )


class Tracker(Destination):
    """Has a run of an experiment tracker, which starts with the trainer. A resumed trainer continues it.

    Args:
        name: The name of the run; None for the ``run_name`` of the trainer.
    """

    def __init__(self, name: str | None) -> None:
        self.run_id: str | None = None
        self._name = name
        self._named = name is not None

    def _begin(self) -> None:
        """Start the run, or continue the one of ``run_id``; do nothing if it is open."""
        raise NotImplementedError

    def init(self, state: TrainerState, logger: MetricLogger) -> None:
        """Take the name of the trainer's run.

        Args:
            state: Has it.
            logger: Not used.
        """
        del logger
        if not self._named:
            self._name = state.run_name

    def after_load(self, state: TrainerState, logger: MetricLogger) -> None:
        """Start the run: it is known now whether it continues another.

        Args:
            state: Not used.
            logger: Not used.
        """
        del state, logger
        self._begin()

    def state_dict(self) -> dict[str, Any]:
        """Return the id and the name of the run."""
        return {"run_id": self.run_id, "name": self._name}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the run of a checkpoint.

        Args:
            state: The saved state.
        """
        self.run_id = state["run_id"]
        if not self._named:
            self._name = state["name"]

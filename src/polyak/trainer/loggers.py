"""Where numbers go: ``Logger`` hands them to destinations."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from polyak.algorithm import MetricLogger
from polyak.trainer.callback import Callback
from polyak.trainer.state import TrainerState


class Destination(Callback):
    """A callback that takes metrics. They run after all other callbacks."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Take metrics.

        Args:
            metrics: Values by name.
            step: Batches so far.
        """
        raise NotImplementedError


class Logger:
    """Hands metrics to every destination.

    Args:
        state: Of the trainer, for the step where none is given.
        destinations: Who gets them.
    """

    def __init__(self, state: TrainerState, destinations: Sequence[Destination] = ()) -> None:
        self.destinations = tuple(destinations)
        self._state = state

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics.

        Args:
            metrics: Values by name.
            step: Batches so far; the present by default.
        """
        now = self._state.timestamp.batch.value if step is None else step
        for destination in self.destinations:
            destination.log_metrics(metrics, int(now))


class ConsoleLogger(Destination):
    """Print metrics, a line each time.

    Args:
        stream: Where to; standard output by default.
        only: Print those whose name begins with this, such as ``"eval"``.
    """

    def __init__(self, stream: TextIO | None = None, only: str = "") -> None:
        self._stream = stream
        self._only = only

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Print a line.

        Args:
            metrics: Values by name.
            step: Batches so far.
        """
        shown = [f"{name} {value:.4g}" for name, value in metrics.items() if name.startswith(self._only)]
        if shown:
            (self._stream or sys.stdout).write(f"[{step}ba] {'  '.join(shown)}\n")


class JSONLinesLogger(Destination):
    """Append metrics to a file, one JSON object a line with the batch as ``"batch"``.

    A resumed run cuts the file back to the checkpoint, so that no line comes twice. A run from the start begins anew.

    Args:
        path: The file; its folder is made if need be.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()  # for good, also if the program changes its directory
        self._size: int | None = None

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Append a line.

        Args:
            metrics: Values by name.
            step: Batches so far.
        """
        if self._size is None:
            self._begin(0)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"batch": step, **metrics}) + "\n")
            self._size = file.tell()

    def _begin(self, size: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        # A file that is shorter than the checkpoint says was moved or edited: keep what there is.
        self._size = min(size, self.path.stat().st_size)
        os.truncate(self.path, self._size)

    def state_dict(self) -> dict[str, Any]:
        """Return how long the file is."""
        return {"size": self._size or 0}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Cut the file back to where it was.

        Args:
            state: As saved.
        """
        self._begin(int(state["size"]))


class TensorBoardLogger(Destination):
    """Write metrics for TensorBoard; it needs ``pip install polyak[tensorboard]``.

    Args:
        folder: Where the event files go.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = folder if "://" in str(folder) else Path(folder).absolute()  # else it may be a bucket
        self._writer: Any = None

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Write scalars.

        Args:
            metrics: Values by name.
            step: Batches so far.
        """
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  an extra

            # What an earlier run wrote after the checkpoint that this one resumed from is not shown.
            self._writer = SummaryWriter(str(self._folder), purge_step=step)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def fit_end(self, state: TrainerState, logger: MetricLogger) -> None:
        """Write what is buffered.

        Args:
            state: Not used.
            logger: Not used.
        """
        del state, logger
        if self._writer is not None:
            self._writer.flush()

    exception = eval_after_all = fit_end

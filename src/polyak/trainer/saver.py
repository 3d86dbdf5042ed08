"""``CheckpointSaver``: when a run is saved, under which names, and how many checkpoints are kept."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from polyak.algorithm import MetricLogger
from polyak.errors import ArgumentError, PlanWarning
from polyak.events import Event
from polyak.storage.atomic import TEMPORARY, remove, remove_whole
from polyak.time import Time
from polyak.trainer.callback import Callback
from polyak.trainer.intervals import ends_run, or_at_the_end, question
from polyak.trainer.state import TrainerState

_NAME = re.compile(r"ep(\d+)-ba(\d+)(\.pt)?")


class CheckpointSaver(Callback):
    """Save a checkpoint each ``save_interval`` and at the end of the run.

    In a checkpoint of a run with an average, ``model`` has the averaged weights and ``training_model`` the training
    weights; ``model_holds`` says so. ``torch.load(path, weights_only=True)["model"]`` is for evaluation. If the model
    or an average is sharded over ranks, a checkpoint is a folder, to which each rank writes its shards.

    Args:
        folder: Where to save; checkpoints are named by epochs and batches, as ``ep1-ba500.pt``, or ``ep1-ba500`` for
            a folder. All ranks must see it.
        save_interval: A time in any unit, or epochs as a number, saved at the ends of epochs for ``ep`` and of batches
            for others; or a function of the state and the event that returns whether to save (``BATCH_CHECKPOINT`` or
            ``EPOCH_CHECKPOINT``).
        keep: How many of the newest to keep; None keeps all.

    Raises:
        TimeError: If ``save_interval`` is not a time, or not above 0.
        ValueError: If ``keep`` is below 1.
        ArgumentError: If ``folder`` is a file.
    """

    def __init__(
        self,
        folder: str | Path,
        save_interval: str | Time | int | Callable[[TrainerState, Event], bool] = "1ep",
        keep: int | None = None,
    ) -> None:
        if keep is not None and keep < 1:
            raise ValueError(f"keep must be None or at least 1 (got {keep})")
        self.folder = Path(folder).absolute()  # it stays the same if the program changes its directory
        if self.folder.exists() and not self.folder.is_dir():
            raise ArgumentError(
                f"folder must be one for checkpoints (got {self.folder}, which is a file); choose another"
            )
        self.keep = keep
        self._own, self._others = set[Path](), set[Path]()
        self._warned = False
        self.save_interval: Callable[[TrainerState, Event], Any]
        if not isinstance(save_interval, (str, int, Time)) and callable(save_interval):
            self.save_interval = save_interval
        else:
            due = question("save_interval", save_interval, at=(Event.BATCH_CHECKPOINT, Event.EPOCH_CHECKPOINT))
            self.save_interval = or_at_the_end(due)

    def run_event(self, event: Event, state: TrainerState, logger: MetricLogger) -> None:
        """Save if due; at the start, remove what an interrupted save has left.

        Args:
            event: What happened.
            state: The state of the trainer.
            logger: Not used.
        """
        del logger
        if event is Event.FIT_START and state.rank == 0:
            # Left by a process that was killed while it wrote.
            for suffix in (TEMPORARY, ".draft"):  # the second is that of earlier versions
                for temporary in self.folder.glob(f".ep*-ba*{suffix}"):
                    remove(temporary)
            # Those of a run that this one does not continue.
            begins = state.timestamp.batch.value == 0
            self._others = {path for _, path in self._saved()} - self._own if begins else set()
        # The function of a user may return a bool of another library, such as numpy's.
        if event in (Event.BATCH_CHECKPOINT, Event.EPOCH_CHECKPOINT) and (
            self.save_interval(state, event) or ends_run(state, event)
        ):
            self._save(state)

    def _save(self, state: TrainerState) -> None:
        now = state.timestamp
        suffix = "" if state.sharded else ".pt"
        path = self.folder / f"ep{now.epoch.value}-ba{now.batch.value}{suffix}"
        if path in self._others and not self._warned:
            self._warned = True
            warnings.warn(
                f"a run should have a folder of its own for checkpoints: {path} of another run is replaced; give "
                "'{run_name}' in save_folder, or continue that run by autoresume=True",
                PlanWarning,
                stacklevel=6,
            )
        state.save_checkpoint(path)
        self._own.add(path)
        self._others.discard(path)
        if self.keep is not None and state.rank == 0:
            # Later checkpoints are those of a run that had gone further before this one resumed from an earlier one.
            # Those of another run are not deleted.
            saved, until = self._saved(), (now.batch.value, now.epoch.value)
            passed = [(moment, path) for moment, path in saved if moment <= until and path not in self._others]
            for _, path in passed[: -self.keep]:
                remove_whole(path)

    def _saved(self) -> list[tuple[tuple[int, int], Path]]:
        """Return the checkpoints in the folder with their batches and epochs, oldest first."""
        found = [(match, path) for path in self.folder.glob("ep*") if (match := _NAME.fullmatch(path.name))]
        return sorted(((int(match[2]), int(match[1])), path) for match, path in found)

    def latest(self) -> Path | None:
        """Return the newest checkpoint in the folder; None if there is none."""
        return next(iter(self.newest_first()), None)

    def newest_first(self) -> list[Path]:
        """Return the checkpoints in the folder, the newest first."""
        return [path for _, path in reversed(self._saved())]

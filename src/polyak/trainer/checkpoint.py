"""Checkpoints of the trainer: one file each, written whole or not at all, loaded without unpickling code."""

import os
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polyak.algorithm import MetricLogger
from polyak.errors import CheckpointError
from polyak.events import Event
from polyak.select import slots, unwrap
from polyak.shadow import loan_of
from polyak.time import Time, as_span
from polyak.trainer.callback import Callback
from polyak.trainer.state import TrainerState, every

_FORMAT = 1
_NAME = re.compile(r"ep(\d+)-ba(\d+)\.pt")


def model_entries(model: nn.Module) -> dict[str, Any]:
    """Return the model's part of a checkpoint: ``model``, ``training_model``, and in ``model_holds`` what is what.

    While an average is lent to the model, ``model`` has the averaged weights and ``training_model`` the training
    weights; else ``model`` has the training weights and ``training_model`` is None.

    Args:
        model: Wrapped or not; names are saved without the wrapper's prefix.
    """
    inner = unwrap(model)
    entries: dict[str, Any] = {"model": inner.state_dict(), "training_model": None, "model_holds": "training weights"}
    if loan := loan_of(model):
        kept: dict[int, Tensor] = {id(s.tensor): loan.kept[s.name] for s in slots(inner) if s.name in loan.kept}
        training = inner.state_dict(keep_vars=True)
        entries["training_model"] = {name: kept.get(id(t), entries["model"][name]) for name, t in training.items()}
        entries["model_holds"] = f"averaged weights of {loan.holder}"
    return entries


def write(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint such that ``path`` is either what it was or complete, whatever happens meanwhile.

    Args:
        checkpoint: Tensors and plain containers.
        path: Where; its folder is made if need be.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    try:
        with draft.open("wb") as file:
            torch.save({"polyak_checkpoint": _FORMAT, **checkpoint}, file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint that ``write`` wrote, tensors on the CPU.

    Args:
        path: The file.

    Raises:
        CheckpointError: If the file is absent, or not such a checkpoint.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"a checkpoint must exist to be loaded (there is no {path})") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{path} must be a checkpoint of polyak.Trainer; it cannot be read: {error}") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("polyak_checkpoint") != _FORMAT:
        raise CheckpointError(
            f"{path} must be a checkpoint of polyak.Trainer in format {_FORMAT}; to begin from other weights, load "
            "them into the model before"
        )
    return checkpoint


class CheckpointSaver(Callback):
    """Save a checkpoint each ``save_interval`` and at the end of the run.

    A checkpoint has the averaged weights, if there are any, as ``model``, and the training weights apart, as
    ``training_model``; ``model_holds`` says so. ``torch.load(path, weights_only=True)["model"]`` is for evaluation.

    Args:
        folder: Where to save; files are named by epochs and batches, as ``ep1-ba500.pt``.
        save_interval: A time in any unit, saved at the ends of epochs for ``ep`` and of batches for others; or a
            function of the state and the event (``BATCH_CHECKPOINT`` or ``EPOCH_CHECKPOINT``) that says when.
        keep: How many of the newest to keep; None keeps all.

    Raises:
        TimeError: If ``save_interval`` is no time, or not above 0.
        ValueError: If ``keep`` is below 1.
    """

    def __init__(
        self,
        folder: str | Path,
        save_interval: str | Time | Callable[[TrainerState, Event], bool] = "1ep",
        keep: int | None = None,
    ) -> None:
        if keep is not None and keep < 1:
            raise ValueError(f"keep must be None or at least 1 (got {keep})")
        self.folder = Path(folder)
        self.keep = keep
        self.save_interval: Callable[[TrainerState, Event], bool]
        if callable(save_interval):
            self.save_interval = save_interval
        else:
            interval = as_span("save_interval", save_interval, above=0, whole=True)
            self.save_interval = every(interval, at=(Event.BATCH_CHECKPOINT, Event.EPOCH_CHECKPOINT))

    def run_event(self, event: Event, state: TrainerState, logger: MetricLogger) -> None:
        """Save if due; at the beginning, remove what is left of a save that was cut off.

        Args:
            event: What happened.
            state: What there is.
            logger: Not used.
        """
        del logger
        if event is Event.FIT_START:
            # What a process left that was killed while it wrote.
            for draft in self.folder.glob(".ep*-ba*.pt.draft"):
                draft.unlink(missing_ok=True)
        # Asked by its truth: it may answer with another library's bool.
        if event in (Event.BATCH_CHECKPOINT, Event.EPOCH_CHECKPOINT) and (
            self.save_interval(state, event) or state.finished
        ):
            self._save(state)

    def _save(self, state: TrainerState) -> None:
        now = state.timestamp
        state.save_checkpoint(self.folder / f"ep{now.epoch.value}-ba{now.batch.value}.pt")
        if self.keep is not None:
            # What lies ahead is of a run that went further before this one was resumed from an earlier moment.
            passed = [(moment, path) for moment, path in self._saved() if moment <= (now.batch.value, now.epoch.value)]
            for _, path in passed[: -self.keep]:
                path.unlink(missing_ok=True)

    def _saved(self) -> list[tuple[tuple[int, int], Path]]:
        """Return the checkpoints in the folder with their batches and epochs, oldest first."""
        found = [(match, path) for path in self.folder.glob("ep*.pt") if (match := _NAME.fullmatch(path.name))]
        return sorted(((int(match[2]), int(match[1])), path) for match, path in found)

    def latest(self) -> Path | None:
        """Return the newest checkpoint in the folder, if there is one."""
        saved = self._saved()
        return saved[-1][1] if saved else None

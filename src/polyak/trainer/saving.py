"""``Checkpoints``: saves the entries of a checkpoint, and resumes a run from them."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyak.algorithm import Algorithm
from polyak.errors import ArgumentError, CheckpointError, PlanWarning
from polyak.events import Event
from polyak.tensors.slots import unwrap
from polyak.time import Timestamp
from polyak.trainer import checkpoint, states
from polyak.trainer.callback import Callback
from polyak.trainer.context import Context
from polyak.trainer.epochs import Epochs
from polyak.trainer.evaluation import Evaluation
from polyak.trainer.options import Options
from polyak.trainer.parallel import refuse_experts
from polyak.trainer.polish import Polish
from polyak.trainer.saver import CheckpointSaver
from polyak.trainer.step import Step
from polyak.training import rng
from polyak.training.uncountable import refuse_uncountable

# Entries that are ignored together: without the clock a new epoch begins, and all random numbers are ignored together.
_WITH = {
    "timestamp": ("drawn", "evaluated_at", "polish"),
    "rng": ("epoch_rng", "data_rng"),
    "model": ("training_model",),
}
_ENTRIES = ("model", "optimizers", "schedulers", "scaler", "algorithms", "callbacks", "timestamp", "rng")


class Checkpoints:
    """Saves everything that a resumed run depends on, and resumes from it.

    Args:
        context: The context of the trainer. The state's ``save_checkpoint`` is set.
        epochs: Knows how many batches of the epoch are completed.
        step: Has the gradient scaler.
        evaluation: Knows when evaluators last ran.
        polish: Knows whether it has begun.
    """

    def __init__(self, context: Context, epochs: Epochs, step: Step, evaluation: Evaluation, polish: Polish) -> None:
        self._context = context
        self._state = context.state
        self._loop = context.loop
        self._group = context.group
        self._stream = context.stream
        self._epochs = epochs
        self._step = step
        self._evaluation = evaluation
        self._polish = polish
        self._state.save_checkpoint = self.save

    def begin(self, options: Options) -> None:
        """Fire ``INIT``, then load the checkpoint to resume from, if there is one.

        Args:
            options: As given to the trainer.

        Raises:
            TimeError: If an algorithm has a time in a unit that is not counted.
            CheckpointError: If the checkpoint cannot be loaded.
            ArgumentError: If ``autoresume`` does not know where checkpoints are.
        """
        if self._state.max_duration is None:
            # `fit` gets the length, and checks again.
            refuse_uncountable(self._loop.algorithms, self._loop.counts)
        else:
            self._loop.refuse_uncounted()
        self._loop.meet()
        self._state.sharded = self._group.kind == "fsdp2" or (
            self._group.kind is not None and checkpoint.has_shards(self._loop.state_dict())
        )
        found: list[Path] = self._group.ranks.from_rank_0(self._saved_checkpoints() if options.autoresume else [])
        self._state.found_no_checkpoint = options.autoresume and not found and options.load_path is None
        self._loop.fire(Event.BEFORE_LOAD)
        if found:
            self.load(*checkpoint.read_newest(found, self._group))
        elif options.load_path is not None:
            path = Path(options.load_path)
            load = self.load_weights if options.load_weights_only else self.load
            load(path, checkpoint.read(path, self._group), options.load_ignore_keys)
        self._loop.fire(Event.AFTER_LOAD)

    def _saved_checkpoints(self) -> list[Path]:
        for callback in self._state.callbacks:
            if isinstance(callback, CheckpointSaver):
                return callback.newest_first()
        raise ArgumentError("autoresume must know where checkpoints are: give save_folder, or a CheckpointSaver")

    def save(self, path: str | Path) -> None:
        """Write a checkpoint of the run; it is complete or absent. A collective: all ranks must call it.

        Args:
            path: Where to write it.

        Raises:
            CheckpointError: If an optimizer has a state for a parameter that was removed from it.
            ShardingError: If experts of the model were declared to differ by rank. On the other ranks, if rank 0 could
                not write. Rank 0 raises the error itself.
        """
        refuse_experts(self._state.model)  # they may have been declared since the start
        self._group.share_buffers(self._state.model)
        with self._loop.saving(path):
            checkpoint.write(self._entries(), Path(path), self._group)

    def _entries(self) -> dict[str, Any]:
        state = self._state
        return {
            **states.model_entries(state.model),
            "optimizers": [states.optimizer_state(one, state.model) for one in state.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in state.schedulers],
            "scaler": self._step.scaler.state_dict(),
            **self._loop.state_dict(),
            "callbacks": [(type(c).__qualname__, c.state_dict()) for c in state.callbacks],
            "timestamp": state.timestamp.state_dict(details=True),
            "evaluated_at": self._evaluation.evaluated_at,
            "eval_metrics": state.eval_metrics,
            "polish": self._polish.state_dict(),
            "drawn": self._epochs.completed,
            "skipped_in_a_row": self._step.skipped_in_a_row,
            **self._random_states(),
        }

    def _random_states(self) -> dict[str, Any]:
        """Return the states of the generators of all ranks, by rank; those of a shared stream once."""
        shared = self._stream.is_separate
        to_rank_0 = self._group.ranks.gather_to_rank_0
        return {
            "rng": to_rank_0(rng.get_state(self._stream.generators)),
            "epoch_rng": [self._epochs.epoch_rng] if shared else to_rank_0(self._epochs.epoch_rng),
            "data_rng": self._stream.get_state() if shared else None,
        }

    def load_weights(self, path: Path, saved: Mapping[str, Any], ignored: Sequence[str] = ()) -> None:
        """Load only the weights: the averaged ones, if there is an average.

        Args:
            path: The path of the checkpoint, for errors.
            saved: What was read.
            ignored: As for ``load``.

        Raises:
            CheckpointError: If it is the checkpoint of another model.
            ArgumentError: If ``ignored`` names something else.
        """
        self._load_model(path, _without(saved, ignored)["model"], ignored)

    def load(self, path: Path, saved: Mapping[str, Any], ignored: Sequence[str] = ()) -> None:
        """Resume from a checkpoint.

        Args:
            path: The path of the checkpoint, for errors.
            saved: What was read.
            ignored: Entries that are not loaded: ``"optimizers"``, ``"timestamp"``, ``"model/head.*"``.

        Raises:
            CheckpointError: If it is the checkpoint of another model, or of other optimizers, schedulers or data.
            ArgumentError: If ``ignored`` names something else.
        """
        saved = _without(saved, ignored)
        self._polish.load_state_dict(saved.get("polish"))
        for name, ours in (("optimizers", self._state.optimizers), ("schedulers", self._state.schedulers)):
            if saved[name] is not None and len(saved[name]) != len(ours):
                raise CheckpointError(
                    f"{path} must have as many {name} as the trainer, {len(ours)} (it has {len(saved[name])})"
                )
        weights = saved["model"] if saved["training_model"] is None else saved["training_model"]
        self._load_model(path, weights, ignored)
        dtypes = states.saved_dtypes(self._state.model, weights or {})
        pairs = list(zip(self._state.optimizers, saved["optimizers"] or (), strict=False))
        for optimizer, state in pairs:
            states.check_optimizer(optimizer, state, self._state.model)
        for optimizer, state in pairs:
            states.load_optimizer(optimizer, state, dtypes)
        for scheduler, state in zip(self._state.schedulers, saved["schedulers"] or (), strict=False):
            scheduler.load_state_dict(state)
        if saved["scaler"]:
            self._step.scaler.load_state_dict(saved["scaler"])
        if saved["algorithms"] is not None:
            _load_by_class("algorithm", saved["algorithms"], self._state.algorithms, path)
        _load_by_class("callback", saved["callbacks"] or (), self._state.callbacks, path)
        if saved["timestamp"] is not None:
            self._load_clock(path, saved)
        if saved["rng"] is not None:
            self._load_random_states(saved, path)

    def _load_model(self, path: Path, weights: Mapping[str, Tensor] | None, ignored: Sequence[str]) -> None:
        if weights is None:
            return
        model = self._state.model
        own = unwrap(model).state_dict(keep_vars=True)
        narrowed = {str(t.dtype): str(own[n].dtype) for n, t in weights.items() if n in own and _narrows(t, own[n])}
        if narrowed:
            warnings.warn(
                f"weights should be loaded into the dtype in which they were saved, to be the same ({path} has "
                f"{', '.join(narrowed)}, and the model {', '.join(narrowed.values())}: they are rounded)",
                PlanWarning,
                stacklevel=5,
            )
        try:
            states.load_model(model, _filled(weights, own, ignored))
        except RuntimeError as error:
            raise CheckpointError(f"the model must be that of {path}: {error}") from error

    def _load_clock(self, path: Path, saved: Mapping[str, Any]) -> None:
        timestamp, length = Timestamp.from_state_dict(saved["timestamp"]), self._state.timestamp.epoch_length
        generators = self._stream.generators
        had = len(generators) if saved["rng"] is None else len(saved["rng"][0]["generators"])
        if (saved["drawn"] and timestamp.epoch_length != length) or had != len(generators):
            raise CheckpointError(
                f"the data must be those of {path}, saved inside an epoch of {timestamp.epoch_length} batches, with "
                f"{had} generators of the data loader (got {length} batches and {len(generators)} generators); to "
                "continue with other data, load a checkpoint from the end of an epoch"
            )
        self._state.timestamp = self._state.previous_timestamp = replace(timestamp, epoch_length=length)
        self._state.eval_metrics = saved["eval_metrics"]
        if saved["evaluated_at"] is not None:
            self._evaluation.set_evaluated_at(saved["evaluated_at"])
        self._epochs.completed, self._step.skipped_in_a_row = saved["drawn"], saved["skipped_in_a_row"]

    def _load_random_states(self, saved: Mapping[str, Any], path: Path) -> None:
        own, of_epoch, of_data = saved["rng"], saved["epoch_rng"], saved["data_rng"]
        if len(own) == self._group.size and (of_data is not None) == self._stream.is_separate:
            rng.set_state(own[self._group.rank], self._stream.generators)
            self._epochs.epoch_rng = of_epoch[0 if self._stream.is_separate else self._group.rank]
            if of_data is not None:
                self._stream.set_state(of_data)
            return
        if saved["drawn"] and (self._epochs.own_batches or (of_data is None and len(own) > 1)):
            raise CheckpointError(
                "a checkpoint from inside an epoch of a DistributedSampler must be loaded by as many ranks, with a "
                f"DistributedSampler ({path} was saved by {len(own)} ranks, and {self._group.size} load it); load one "
                "from the end of an epoch"
            )
        warnings.warn(
            f"{path} was saved with world size {len(own)} and resumed with {self._group.size}: the order of the data "
            "is the same, and random numbers in the model, as in dropout, differ from those of the saved run",
            PlanWarning,
            stacklevel=4,
        )
        if self._group.size > 1:
            self._context.reseed()
        self._stream.set_state(of_data or own[0])
        self._epochs.epoch_rng = of_epoch[0]


def _narrows(saved: object, own: Tensor) -> bool:
    """Return whether saved values lose digits in the dtype of a model's tensor."""
    numeric = isinstance(saved, Tensor) and saved.is_floating_point() and own.is_floating_point()
    return numeric and torch.promote_types(saved.dtype, own.dtype) != own.dtype


def _filled(weights: Mapping[str, Tensor], own: Mapping[str, Tensor], ignored: Sequence[str]) -> Mapping[str, Tensor]:
    """Return weights, with the model's own in place of those that are ignored."""
    patterns = [pattern.removeprefix("state/").removeprefix("model/") for pattern in ignored]
    kept = {name: tensor for name, tensor in own.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}
    return {**weights, **kept} if kept else weights


def _without(saved: Mapping[str, Any], ignored: Sequence[str]) -> dict[str, Any]:
    """Return a checkpoint without what the patterns name; entries that are ignored are None."""
    left = dict(saved)
    for pattern in ignored:
        entry, _, inner = pattern.removeprefix("state/").partition("/")
        if entry not in _ENTRIES or (inner and entry != "model"):
            raise ArgumentError(
                f"load_ignore_keys must name entries of a checkpoint (got {pattern!r}); they are "
                f"{', '.join(_ENTRIES)}, and model/ with a pattern of names"
            )
        if entry == "model" and inner and inner != "*":
            if not any(fnmatchcase(name, inner) for name in saved["model"]):
                raise ArgumentError(f"load_ignore_keys must match tensors of the checkpoint (got {pattern!r})")
            for key in ("model", "training_model"):
                if left[key] is not None:
                    left[key] = {name: t for name, t in left[key].items() if not fnmatchcase(name, inner)}
        else:
            left |= dict.fromkeys((entry, *_WITH.get(entry, ())))
    return left


def _load_by_class(
    kind: str, saved: Sequence[tuple[str, dict[str, Any]]], ours: Sequence[Algorithm | Callback], path: Path
) -> None:
    """Load into each of ours the first saved state of its class that was not loaded yet."""
    left = list(saved)
    for one in ours:
        for entry in left:
            if entry[0] == type(one).__qualname__:
                one.load_state_dict(entry[1])
                left.remove(entry)
                break
        else:
            if isinstance(one, Algorithm) and one.swaps:
                warnings.warn(
                    f"{path} has no state of {one!r}: its average begins with the weights that training resumes from",
                    PlanWarning,
                    stacklevel=5,
                )
    if kind == "algorithm" and left:
        warnings.warn(
            f"{path} has states of algorithms that this trainer does not have: {', '.join(name for name, _ in left)}; "
            "training resumes from the training weights, without them",
            PlanWarning,
            stacklevel=5,
        )

"""Checkpoints of a run: what goes into one, and how a run resumes from one."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from polyak.algorithm import Algorithm
from polyak.errors import ArgumentError, CheckpointError, PlanWarning
from polyak.events import Event
from polyak.tensors.slots import unwrap
from polyak.time import Timestamp
from polyak.trainer import checkpoint
from polyak.trainer.callback import Callback
from polyak.trainer.epochs import Epochs
from polyak.trainer.evaluation import Evaluation
from polyak.trainer.parallel import Group
from polyak.trainer.state import TrainerState
from polyak.trainer.step import Step
from polyak.training import rng

# What goes together: an ignored clock begins a new epoch, ignored random numbers are all ignored.
_WITH = {"timestamp": ("drawn", "evaluated_at"), "rng": ("epoch_rng", "data_rng"), "model": ("training_model",)}
_ENTRIES = ("model", "optimizers", "schedulers", "scaler", "algorithms", "callbacks", "timestamp", "rng")


class Checkpoints:
    """Saves all that a resumed run depends on, and resumes from it.

    Args:
        state: Of the trainer.
        fire: Called with the events around saving.
        group: Who trains together.
        stream: What the data loader draws from.
        epochs: Knows where in the epoch the run stands.
        step: Has the gradient scaler.
        evaluation: Knows where the run was evaluated.
        draw_anew: Gives each rank random numbers of its own.
    """

    def __init__(
        self,
        state: TrainerState,
        fire: Callable[[Event], None],
        group: Group,
        *,
        stream: rng.Stream,
        epochs: Epochs,
        step: Step,
        evaluation: Evaluation,
        draw_anew: Callable[[], None],
    ) -> None:
        self._state = state
        self._fire = fire
        self._group = group
        self._stream = stream
        self._epochs = epochs
        self._step = step
        self._evaluation = evaluation
        self._draw_anew = draw_anew

    def save(self, path: str | Path) -> None:
        """Write a checkpoint of the run; it is complete or not there. All ranks must call this.

        Args:
            path: Where.

        Raises:
            CheckpointError: If an optimizer has a state for a parameter that was taken out of it.
            ShardingError: On the other ranks, if rank 0 could not write; on rank 0, what went wrong.
        """
        self._state.saving_to = Path(path)
        try:
            self._group.share_buffers(self._state.model)
            self._fire(Event.SAVE_START)
            checkpoint.write(
                {
                    **checkpoint.model_entries(self._state.model),
                    "optimizers": [_state_of(optimizer, self._state.model) for optimizer in self._state.optimizers],
                    "schedulers": [scheduler.state_dict() for scheduler in self._state.schedulers],
                    "scaler": self._step.scaler.state_dict(),
                    "algorithms": [(type(a).__qualname__, a.state_dict()) for a in self._state.algorithms],
                    "callbacks": [(type(c).__qualname__, c.state_dict()) for c in self._state.callbacks],
                    "timestamp": self._state.timestamp.state_dict(details=True),
                    "evaluated_at": self._evaluation.evaluated_at,
                    "eval_metrics": self._state.eval_metrics,
                    "drawn": self._epochs.completed,
                    "skipped_in_a_row": self._step.skipped_in_a_row,
                    **self._random_states(),
                },
                Path(path),
                self._group,
            )
        finally:
            self._fire(Event.SAVE_END)
            self._state.saving_to = None

    def _random_states(self) -> dict[str, Any]:
        """Return the states of the ranks' generators, by rank; what all draw alike, once."""
        apart = self._stream.apart
        return {
            "rng": self._group.to_first(rng.get_state(self._stream.generators)),
            "epoch_rng": [self._epochs.epoch_rng] if apart else self._group.to_first(self._epochs.epoch_rng),
            "data_rng": self._stream.get_state() if apart else None,
        }

    def load_weights(self, path: Path, saved: Mapping[str, Any], ignored: Sequence[str] = ()) -> None:
        """Load the weights for use, the averaged ones if there are any, and nothing else.

        Args:
            path: Of the checkpoint, for errors.
            saved: What was read.
            ignored: As for ``load``.

        Raises:
            CheckpointError: If the model is another.
            ArgumentError: If ``ignored`` names what is not there.
        """
        self._load_model(path, _without(saved, ignored)["model"], ignored)

    def load(self, path: Path, saved: Mapping[str, Any], ignored: Sequence[str] = ()) -> None:
        """Resume from a checkpoint.

        Args:
            path: Of the checkpoint, for errors.
            saved: What was read.
            ignored: Entries that are left as they are: ``"optimizers"``, ``"timestamp"``, ``"model/head.*"``.

        Raises:
            CheckpointError: If it is the checkpoint of another set-up.
            ArgumentError: If ``ignored`` names what is not there.
        """
        saved = _without(saved, ignored)
        for name, ours in (("optimizers", self._state.optimizers), ("schedulers", self._state.schedulers)):
            if saved[name] is not None and len(saved[name]) != len(ours):
                raise CheckpointError(
                    f"{path} must have as many {name} as the trainer, {len(ours)} (it has {len(saved[name])})"
                )
        weights = saved["model"] if saved["training_model"] is None else saved["training_model"]
        self._load_model(path, weights, ignored)
        dtypes = checkpoint.saved_dtypes(self._state.model, weights or {})
        for optimizer, state in zip(self._state.optimizers, saved["optimizers"] or (), strict=False):
            checkpoint.load_optimizer(optimizer, state, dtypes)
        for scheduler, state in zip(self._state.schedulers, saved["schedulers"] or (), strict=False):
            scheduler.load_state_dict(state)
        if saved["scaler"]:
            self._step.scaler.load_state_dict(saved["scaler"])
        _hand_out("algorithm", saved["algorithms"] or (), self._state.algorithms, path)
        _hand_out("callback", saved["callbacks"] or (), self._state.callbacks, path)
        if saved["timestamp"] is not None:
            self._load_clock(path, saved)
        if saved["rng"] is not None:
            self._load_random_states(saved, path)

    def _load_model(self, path: Path, weights: Mapping[str, Tensor] | None, ignored: Sequence[str]) -> None:
        if weights is None:
            return
        model = self._state.model
        own = unwrap(model).state_dict(keep_vars=True)
        try:
            checkpoint.load_model(model, _filled(weights, own, ignored))
        except RuntimeError as error:
            raise CheckpointError(f"the model must be that of {path}: {error}") from error

    def _load_clock(self, path: Path, saved: Mapping[str, Any]) -> None:
        timestamp, length = Timestamp.from_state_dict(saved["timestamp"]), self._state.timestamp.epoch_length
        generators = self._stream.generators
        had = len(generators) if saved["rng"] is None else len(saved["rng"][0]["generators"])
        if (saved["drawn"] and timestamp.epoch_length != length) or had != len(generators):
            raise CheckpointError(
                f"the data must be those of {path}, saved inside an epoch of {timestamp.epoch_length} batches with "
                f"{had} generators of the data loader's own (got {length} batches and "
                f"{len(generators)}); to go on with other data, load a checkpoint from the end of an epoch"
            )
        self._state.timestamp = self._state.previous_timestamp = replace(timestamp, epoch_length=length)
        self._state.eval_metrics = saved["eval_metrics"]
        if saved["evaluated_at"] is not None:
            self._evaluation.set_evaluated_at(saved["evaluated_at"])
        self._epochs.completed, self._step.skipped_in_a_row = saved["drawn"], saved["skipped_in_a_row"]

    def _load_random_states(self, saved: Mapping[str, Any], path: Path) -> None:
        own, of_epoch, of_data = saved["rng"], saved["epoch_rng"], saved["data_rng"]
        if len(own) == self._group.size and (of_data is not None) == self._stream.apart:
            rng.set_state(own[self._group.rank], self._stream.generators)
            self._epochs.epoch_rng = of_epoch[0 if self._stream.apart else self._group.rank]
            if of_data is not None:
                self._stream.set_state(of_data)
            return
        if saved["drawn"] and (self._epochs.own_batches or (of_data is None and len(own) > 1)):
            raise CheckpointError(
                "a checkpoint from inside an epoch that a DistributedSampler divides must be loaded by as many ranks, "
                f"with one ({path} was saved by {len(own)} ranks, and {self._group.size} load it); load one from the "
                "end of an epoch"
            )
        warnings.warn(
            f"{path} was saved by other ranks ({len(own)}) than go on ({self._group.size}): the order of the data goes "
            "on as it was, and what each rank draws at random besides, as in dropout, begins anew",
            PlanWarning,
            stacklevel=4,
        )
        if self._group.size > 1:
            self._draw_anew()
        self._stream.set_state(of_data or own[0])
        self._epochs.epoch_rng = of_epoch[0]


def _state_of(optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """Return an optimizer's state dict, which torch makes only where each state belongs to one of its parameters."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    removed = [key for key in optimizer.state if isinstance(key, Tensor) and id(key) not in held]
    if removed:
        names = {id(parameter): name for name, parameter in unwrap(model).named_parameters()}
        raise CheckpointError(
            f"an optimizer must have the parameters that it has states for (of {type(optimizer).__name__} were taken "
            f"out: {', '.join(names.get(id(one), 'a parameter without a name') for one in removed)}); to freeze "
            "parameters, set requires_grad to False and grad to None, and leave them in their optimizer"
        )
    return optimizer.state_dict()


def _filled(weights: Mapping[str, Tensor], own: Mapping[str, Tensor], ignored: Sequence[str]) -> Mapping[str, Tensor]:
    """Return weights with the model's own in the places of those that are ignored."""
    patterns = [pattern.removeprefix("state/").removeprefix("model/") for pattern in ignored]
    kept = {name: tensor for name, tensor in own.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}
    return {**weights, **kept} if kept else weights


def _without(saved: Mapping[str, Any], ignored: Sequence[str]) -> dict[str, Any]:
    """Return a checkpoint without what some patterns name; entries that are ignored are None."""
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


def _hand_out(
    kind: str, saved: Sequence[tuple[str, dict[str, Any]]], ours: Sequence[Algorithm | Callback], path: Path
) -> None:
    """Give each of ours the first saved state of its class that is left."""
    left = list(saved)
    for one in ours:
        for entry in left:
            if entry[0] == type(one).__qualname__:
                one.load_state_dict(entry[1])
                left.remove(entry)
                break
    if kind == "algorithm" and left:
        warnings.warn(
            f"{path} has the states of algorithms that this trainer has not: {', '.join(name for name, _ in left)}; "
            "training goes on from the training weights, without them",
            PlanWarning,
            stacklevel=5,
        )

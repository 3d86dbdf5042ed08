"""What hosts have in common: the algorithms in a loop, where it stands, and its optimizer's steps."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from polyak.algorithm import Algorithm, MetricLogger, NoLogger, check_algorithms, dispatch
from polyak.averaging.swap import swap_of
from polyak.errors import CheckpointError
from polyak.events import Event, elapsed_duration
from polyak.sharding import has_spread, is_fsdp, is_initialized, reshard
from polyak.tensors.slots import slots
from polyak.time import Time, Timestamp, TimeUnit
from polyak.training.steps import StepHooks, Unseen, counted_optimizer, refuse_masters

# Where weights that nobody counted would be noticed too late.
_CHECKED = {Event.EVAL_START, Event.PREDICT_START, Event.SAVE_START, Event.FIT_END}


@dataclass
class LoopState:
    """An ``events.State`` of plain values.

    Args:
        model: In training, wrapped or not.
        timestamp: Now.
        max_duration: How long the loop will go on, if that is known.
        saving_to: Where a checkpoint is being written, if one is and that is known.
    """

    model: nn.Module
    timestamp: Timestamp
    max_duration: Time | None = None
    saving_to: Path | None = None

    def get_elapsed_duration(self) -> Time | None:
        """Return the elapsed share of the run as ``dur``; None if ``max_duration`` is not known."""
        return elapsed_duration(self.timestamp, self.max_duration)


def as_algorithms(algorithms: Algorithm | Sequence[Algorithm]) -> list[Algorithm]:
    """Return what a host was given as a list.

    Args:
        algorithms: One or several.

    Raises:
        ArgumentError: If one of them is no algorithm, or one of another trainer.
        ValueError: If more than one of them lends an average.
    """
    listed = list(algorithms) if isinstance(algorithms, Iterable) else [algorithms]
    check_algorithms(listed)
    if sum(algorithm.lends for algorithm in listed) > 1:
        raise ValueError(
            "a model can hold one average at a time, so of the algorithms that lend one there can be one (got "
            f"{[algorithm for algorithm in listed if algorithm.lends]}); to compare averages, attach them apart"
        )
    return listed


class Loop:
    """Algorithms at work in the loop of another framework, whose adapter says what happens there.

    Args:
        algorithms: At work.
        model: In training, wrapped or not.
        logger: Where they may log.

    Raises:
        NotImplementedError: If the model's parameters are not whole in this process.

    Attributes:
        algorithms: As given.
        state: What they see; the adapter sets what its framework knows.
        counts: The units that the adapter counts; it adds samples and tokens where it does.
    """

    def __init__(self, algorithms: Sequence[Algorithm], model: nn.Module, logger: MetricLogger | None = None) -> None:
        _refuse_parts(model)
        self.algorithms = algorithms
        self.state = LoopState(model, Timestamp())
        self.counts = {TimeUnit.BATCH, TimeUnit.EPOCH}
        self._logger = logger or NoLogger()
        self._unseen: Unseen | None = None
        self._counted = 0  # batches since steps are counted
        self.fire(Event.INIT)

    def fire(self, event: Event) -> None:
        """Tell the algorithms what happened.

        Args:
            event: What.
        """
        if event is Event.FIT_START:
            self.refuse_uncounted()
        elif event in _CHECKED:
            self.warn_of_unseen()
        # A tensor made in inference mode cannot be changed outside it, where what is lent may have to be taken back.
        with torch.inference_mode(mode=False):
            dispatch(event, self.state, self.algorithms, self._logger)

    def refuse_uncounted(self) -> None:
        """Refuse algorithms with times in a unit that the loop does not count.

        Raises:
            TimeError: If there are any.
            ProfileError: If a profile is in such a unit.
        """
        for algorithm in self.algorithms:
            algorithm.refuse_uncounted(self.state, self.counts)

    def count(
        self, optimizer: object, after: Callable[[], object], before: Callable[[], object] | None = None
    ) -> StepHooks:
        """Count the steps of an optimizer until the hooks that are returned are removed.

        Args:
            optimizer: Wrapped or not.
            after: Called after each step that counts.
            before: Called before each step.

        Raises:
            OptimizerError: If its steps cannot be seen, or move other tensors than the model's.
        """
        counted = counted_optimizer(optimizer)
        refuse_masters(counted, self.state.model)
        hooks = StepHooks(counted, after, before)
        self.watch(hooks)
        return hooks

    def watch(self, hooks: StepHooks | None) -> None:
        """Warn from now on, at evaluations, saves and the end, if weights move without a step that is counted.

        Args:
            hooks: On the optimizer whose steps are counted; None if they are counted by hand.
        """
        self._unseen, self._counted = Unseen(self.state.model, hooks), 0

    def warn_of_unseen(self) -> None:
        """Warn, once, if weights have moved and no step was counted."""
        if self._unseen is not None:
            self._unseen.warn(self._counted)

    def end_batch(self, *, samples: int = 0, tokens: int = 0) -> None:
        """Count an optimizer step.

        Args:
            samples: Samples in it.
            tokens: Tokens in it.
        """
        self.state.timestamp = self.state.timestamp.to_next_batch(samples=samples, tokens=tokens)
        self._counted += 1
        self.fire(Event.BATCH_END)

    def begin_epoch(self) -> None:
        """Begin an epoch. One that was left before its end counts as one."""
        if self.state.timestamp.batch_in_epoch.value:
            self.state.timestamp = self.state.timestamp.to_next_epoch()
        self.fire(Event.EPOCH_START)

    def end_epoch(self) -> None:
        """Count the end of an epoch."""
        self.state.timestamp = self.state.timestamp.to_next_epoch()
        self.fire(Event.EPOCH_END)

    def between(self, start: Event, end: Event) -> "Between":
        """Return what fires ``start`` before a ``with`` block and ``end`` after it, however that ends.

        Args:
            start: Such as ``EVAL_START``.
            end: Such as ``EVAL_END``.
        """
        return Between(self, start, end)

    @contextmanager
    def saving(self, path: str | Path | None = None) -> Iterator[None]:
        """Surround the taking of a checkpoint.

        Args:
            path: Where it is being written, if that is known.
        """
        self.state.saving_to = None if path is None else Path(path)
        try:
            with self.between(Event.SAVE_START, Event.SAVE_END):
                yield
        finally:
            self.state.saving_to = None

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the algorithms, and where the loop stands."""
        return {
            # Lists, not tuples, into which `torch.distributed.checkpoint` does not look.
            "algorithms": [[type(a).__qualname__, a.state_dict()] for a in self.algorithms],
            "timestamp": self.state.timestamp.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned. Load the model's own state before.

        Args:
            state: As saved.

        Raises:
            CheckpointError: If it is the state of other algorithms.
            MismatchError: If names or shapes differ from the model's.
        """
        saved, ours = state["algorithms"], [type(a).__qualname__ for a in self.algorithms]
        if [name for name, _ in saved] != ours:
            raise CheckpointError(f"the state must be that of {ours} (got that of {[name for name, _ in saved]})")
        for algorithm, (_, own) in zip(self.algorithms, saved, strict=True):
            algorithm.load_state_dict(own)
        length = self.state.timestamp.epoch_length
        self.state.timestamp = replace(Timestamp.from_state_dict(state["timestamp"]), epoch_length=length)
        if self._unseen is not None and not self._counted:
            self._unseen.begin_anew()

    @property
    def in_parts(self) -> bool:
        """Whether the state is spread over ranks, so that each must save its own part of it. All ranks must ask."""
        model = self.state.model
        return is_initialized() and (
            is_fsdp(model)
            or has_spread(list(model.parameters()))
            or any(has_spread(algorithm.state_dict()) for algorithm in self.algorithms if algorithm.lends)
        )

    def save_parts(self, folder: Path, *, weights: bool) -> None:
        """Save what ``state_dict`` returns by ``torch.distributed.checkpoint``. All ranks must call this.

        Args:
            folder: To be made, in that of the checkpoint that is being written.
            weights: Whether to save the model's weights with it: where the rest of the checkpoint has averaged ones.
        """
        from polyak.sharding import dcp  # noqa: PLC0415  half a second that few need

        self.state.saving_to = folder.parent
        try:
            dcp.save(self._parts(weights), folder)
        finally:
            self.state.saving_to = None

    def load_parts(self, folder: Path, *, weights: bool) -> None:
        """Go on from what ``save_parts`` saved, on the same ranks or others. All ranks must call this.

        Args:
            folder: As given to ``save_parts``.
            weights: As given to ``save_parts``; the model gets them.

        Raises:
            CheckpointError: If it is the state of other algorithms.
        """
        from polyak.sharding import dcp  # noqa: PLC0415  see above

        state = self._parts(weights)
        dcp.load(state, folder)
        self.load_state_dict(state["loop"])

    def _parts(self, weights: bool) -> dict[str, Any]:
        parts: dict[str, Any] = {"loop": self.state_dict()}
        if weights:
            reshard(self.state.model)
            parts["weights"] = {slot.name: slot.tensor.detach() for slot in slots(self.state.model) if slot.persistent}
        return parts


class Between:
    """Fires one event before a ``with`` block and another after it, however that ends.

    An average that is swapped in by the first event belongs to the block: if an interrupt skips the second event, the
    training weights are restored by whoever next asks for them, since nobody has this object any more.

    Args:
        loop: Where the events are fired.
        start: Before the block.
        end: After it.
    """

    def __init__(self, loop: Loop, start: Event, end: Event) -> None:
        self._loop, self._start, self._end = loop, start, end

    def __enter__(self) -> None:
        """Fire the first event; after an error in it the second one too."""
        try:
            before = swap_of(self._loop.state.model)
            self._loop.fire(self._start)
            swap = swap_of(self._loop.state.model)
            if swap is not None and swap is not before:
                swap.scope = weakref.ref(self)
        except BaseException:
            self._loop.fire(self._end)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Fire the second event; if that is interrupted, once more."""
        try:
            self._loop.fire(self._end)
        except BaseException:
            self._loop.fire(self._end)
            raise


def _refuse_parts(model: nn.Module) -> None:
    """Refuse parameters that are elsewhere, or in one flat tensor: ZeRO-3's, which it marks, and the first FSDP's."""
    flat = any(cls.__name__ == "FullyShardedDataParallel" for m in model.modules() for cls in type(m).__mro__)
    if flat or any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise NotImplementedError(
            "each process must hold a model's parameters as they are for them to be averaged, and under "
            f"{'FullyShardedDataParallel' if flat else 'DeepSpeed ZeRO-3'} it does not; train with DDP or on one device"
        )

"""What hosts have in common: the algorithms in a loop, where it stands, its optimizer's steps; loops of one's own."""

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.optim import Optimizer

from polyak.algorithm import Algorithm, MetricLogger, NoLogger, dispatch
from polyak.errors import CheckpointError, LoanError
from polyak.events import Event, elapsed_duration
from polyak.select import slots, unwrap
from polyak.sharding import has_spread, is_fsdp, is_initialized, reshard
from polyak.swap import swap_of
from polyak.time import Time, Timestamp, as_span


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
        ValueError: If more than one of them lends an average.
    """
    listed = [algorithms] if isinstance(algorithms, Algorithm) else list(algorithms)
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
    """

    def __init__(self, algorithms: Sequence[Algorithm], model: nn.Module, logger: MetricLogger | None = None) -> None:
        _refuse_parts(model)
        self.algorithms = algorithms
        self.state = LoopState(model, Timestamp())
        self._logger = logger or NoLogger()
        self.fire(Event.INIT)

    def fire(self, event: Event) -> None:
        """Tell the algorithms what happened.

        Args:
            event: What.
        """
        # A tensor made in inference mode cannot be changed outside it, where what is lent may have to be taken back.
        with torch.inference_mode(mode=False):
            dispatch(event, self.state, self.algorithms, self._logger)

    def end_batch(self, *, samples: int = 0, tokens: int = 0) -> None:
        """Count an optimizer step.

        Args:
            samples: Samples in it.
            tokens: Tokens in it.
        """
        self.state.timestamp = self.state.timestamp.to_next_batch(samples=samples, tokens=tokens)
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
        import torch.distributed.checkpoint as dcp  # noqa: PLC0415  half a second that few need

        self.state.saving_to = folder.parent
        try:
            # Of what ranks have of their own, such as buffers, the first one's is saved.
            planner = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)
            dcp.save(self._parts(weights), checkpoint_id=folder, planner=planner)
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
        import torch.distributed.checkpoint as dcp  # noqa: PLC0415  see above

        state = self._parts(weights)
        dcp.load(state, checkpoint_id=folder)
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


class StepHooks:
    """Hooks on the steps of an optimizer, until they are removed.

    Steps that mixed precision skips, steps without gradients, a subclass's call of its parent's step, and the one that
    ``torch.distributed.checkpoint`` takes to have a state to load into, do not count.

    Args:
        optimizer: Of torch, in no other library's wrapper.
        after: Called after each step that counts.
        before: Called before each step.
    """

    def __init__(
        self, optimizer: Optimizer, after: Callable[[], object], before: Callable[[], object] | None = None
    ) -> None:
        def pre(optimizer: Optimizer, args: object, kwargs: object) -> None:
            del optimizer, args, kwargs
            if before is not None and not _is_rehearsal(sys._getframe(1)):  # noqa: SLF001
                before()

        def post(optimizer: Optimizer, args: object, kwargs: object) -> None:
            del args, kwargs
            hooked = sys._getframe(1)  # noqa: SLF001
            if _has_stepped(optimizer) and not _is_nested(hooked, optimizer) and not _is_rehearsal(hooked):
                after()

        self._hooks = [optimizer.register_step_pre_hook(pre), optimizer.register_step_post_hook(post)]

    def remove(self) -> bool:
        """Stop calling; return whether that was not done before."""
        counting = bool(self._hooks)
        while self._hooks:
            self._hooks.pop().remove()
        return counting


def innermost(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer that moves the weights, inside wrappers that keep it as ``optimizer``, as Accelerate's.

    Args:
        optimizer: Wrapped or not.
    """
    inner = getattr(optimizer, "optimizer", None)
    return innermost(inner) if isinstance(inner, Optimizer) else optimizer


class Attached:
    """Algorithms at work in a loop of one's own; ``attach`` makes it, ``polyak``'s or that of a host with such loops.

    As a context manager it detaches at the end of the block.

    Args:
        algorithms: One or several.
        model: In training, wrapped or not.
        optimizer: As for ``polyak.attach``.
        max_duration: As for ``polyak.attach``.
        steps_per_epoch: As for ``polyak.attach``.
        samples_per_step: As for ``polyak.attach``.
        tokens_per_step: As for ``polyak.attach``.
        logger: Where the algorithms log.

    Raises:
        TimeError: If ``max_duration`` is no time.
        ValueError: If more than one of the algorithms lends an average.
        NotImplementedError: If the model's parameters are not whole in this process.

    Attributes:
        algorithms: What is at work.
    """

    def __init__(
        self,
        algorithms: Algorithm | Sequence[Algorithm],
        model: nn.Module,
        optimizer: Optimizer | None,
        *,
        max_duration: Time | str | None = None,
        steps_per_epoch: int | None = None,
        samples_per_step: int = 0,
        tokens_per_step: int = 0,
        logger: MetricLogger | None = None,
    ) -> None:
        self._loop = Loop(as_algorithms(algorithms), model, logger)
        self._loop.state.timestamp = Timestamp(epoch_length=steps_per_epoch)
        self._loop.state.max_duration = None if max_duration is None else as_span("max_duration", max_duration, above=0)
        self.algorithms = self._loop.algorithms
        self._samples, self._tokens = samples_per_step, tokens_per_step
        self._fitting, self._detached = False, False
        self._hooks = StepHooks(innermost(optimizer), self._end_batch, self._begin) if optimizer is not None else None

    @property
    def algorithm(self) -> Algorithm:
        """The first of ``algorithms``."""
        return self.algorithms[0]

    @property
    def timestamp(self) -> Timestamp:
        """What has been counted so far."""
        return self._loop.state.timestamp

    def _begin(self) -> None:
        if not self._fitting:
            # Not in `attach`, so that a state can be loaded first.
            self._fitting = True
            self._loop.fire(Event.FIT_START)

    def _end_batch(self) -> None:
        self._loop.end_batch(samples=self._samples, tokens=self._tokens)
        if self.timestamp.epoch_length == self.timestamp.batch_in_epoch.value:
            self.end_epoch()

    def step(self) -> None:
        """Count a batch, whose weights have all moved. Only where ``attach`` was given no optimizer.

        Raises:
            ValueError: If an optimizer's steps are counted, or this is detached.
        """
        if self._hooks is not None or self._detached:
            reason = "it is detached" if self._detached else "those of the optimizer are counted"
            raise ValueError(f"steps are counted by hand where attach was given no optimizer (here {reason})")
        self._begin()
        self._end_batch()

    def end_epoch(self) -> None:
        """Count the end of an epoch. It is called for you if ``steps_per_epoch`` was given."""
        self._loop.end_epoch()

    @contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """Put the average in the model for a ``with`` block, however that ends: to evaluate it, or save it for use.

        Before averaging has begun, the model keeps its own weights.

        Raises:
            LoanError: If the model holds an average already.
        """
        if loan := swap_of(self._loop.state.model):
            raise LoanError(f"a model can hold one average at a time, and {loan.holder} has lent its own already")
        with self._loop.between(Event.EVAL_START, Event.EVAL_END):
            yield unwrap(self._loop.state.model)

    def state_dict(self, path: str | Path | None = None) -> dict[str, Any]:
        """Return the state of the algorithms and the clock, to be saved beside the model's and the optimizer's.

        Args:
            path: Where it will be saved, if an algorithm is to keep what it refers to as long as that is there.
        """
        self._loop.state.saving_to = None if path is None else Path(path)
        try:
            return self._loop.state_dict()
        finally:
            self._loop.state.saving_to = None

    @property
    def in_parts(self) -> bool:
        """Whether the state is spread over ranks, so that each must save its own part of it. All ranks must ask."""
        return self._loop.in_parts

    def save_parts(self, folder: Path) -> None:
        """Save what ``state_dict`` returns by ``torch.distributed.checkpoint``. All ranks must call this.

        Args:
            folder: To be made, in that of the checkpoint that is being written.
        """
        self._loop.save_parts(folder, weights=False)

    def load_parts(self, folder: Path) -> None:
        """Go on from what ``save_parts`` saved, on the same ranks or others. All ranks must call this.

        Args:
            folder: As given to ``save_parts``.

        Raises:
            CheckpointError: If it is the state of other algorithms.
        """
        self._loop.load_parts(folder, weights=False)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned. Load the model's and the optimizer's states before.

        Args:
            state: As saved.

        Raises:
            CheckpointError: If it is the state of other algorithms.
            MismatchError: If names or shapes differ from the model's.
        """
        self._loop.load_state_dict(state)

    def detach(self) -> None:
        """Stop counting. The algorithms keep what they have."""
        if self._hooks is not None:
            self._hooks.remove()
        if not self._detached:
            self._detached = True
            self._loop.fire(Event.FIT_END)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._loop.fire(Event.EXCEPTION)
        self.detach()


def _has_stepped(optimizer: Optimizer) -> bool:
    """Whether this step moved weights: a fused one is called even when the gradient scaler found an inf."""
    found_inf = getattr(optimizer, "found_inf", None)
    if found_inf is not None and bool(found_inf):
        return False
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])


def _is_nested(hooked: FrameType, optimizer: Optimizer) -> bool:
    """Whether the step that ``hooked`` runs was called by a step of the same optimizer.

    torch hooks the ``step`` of each class, so a subclass's that calls its parent's fires twice. A counter of depth
    would be wrong for good after a step that raised.
    """
    outer = hooked.f_back
    while outer is not None:
        if outer.f_code is hooked.f_code and outer.f_locals.get("args", (None,))[0] is optimizer:
            return True
        outer = outer.f_back
    return False


def _is_rehearsal(hooked: FrameType) -> bool:
    """Whether the step that ``hooked`` runs was called by ``torch.distributed.checkpoint``, with gradients of zeros.

    What that does to the optimizer could also be a real step, of a warm-up that begins with a learning rate of 0.
    """
    outer = hooked.f_back
    while outer is not None:
        if outer.f_code.co_name == "_init_optim_state":
            return True
        outer = outer.f_back
    return False

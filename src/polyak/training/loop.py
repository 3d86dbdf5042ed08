"""``Loop``: the events, the clock and the state of the algorithms in any training loop."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from polyak.algorithm import Algorithm, MetricLogger, NoLogger, dispatch
from polyak.events import Event
from polyak.time import Timestamp, TimeUnit
from polyak.training.between import Between
from polyak.training.optimizer import counted_optimizer, refuse_masters
from polyak.training.saved import check_saved
from polyak.training.second import warn_of_second_average
from polyak.training.state import LoopState
from polyak.training.steps import StepHooks
from polyak.training.uncountable import refuse_unmoved
from polyak.training.uncounted import Uncounted
from polyak.training.unregistered import warn_of_unregistered

# Where a warning of weights that moved without a counted step is not too late; and at FIT_END.
_SWAPPED_IN = frozenset({Event.EVAL_START, Event.PREDICT_START, Event.SAVE_START})


class Listener(Protocol):
    """The member of a callback that a loop calls."""

    def run_event(self, event: Event, state: Any, logger: Any) -> None:
        """Act on ``event``, after the algorithms."""
        ...


class Loop:
    """Algorithms, and callbacks after them, in a training loop: fires events, counts batches, saves states.

    Integrations translate the hooks of their framework to calls of its methods. The algorithms meet the model
    (``INIT``) by ``meet``, or before the first other event.

    Args:
        algorithms: In order. A list may grow later.
        state: What they read; the loop counts on its clock, the integration sets the rest.
        logger: Where they may log.
        callbacks: Called after the algorithms. A list may grow later.
        counts: The units that are counted.

    Raises:
        NotImplementedError: If this process does not hold the model's parameters as they are.

    Attributes:
        algorithms: As given.
        state: As given.
        counts: The units that are counted.
        uncounted: Warns of weights that move without a counted step; None before steps are counted.
        swapping: Whether algorithms may swap an average in; not so while an average is polished.
    """

    def __init__(
        self,
        algorithms: Sequence[Algorithm],
        state: LoopState,
        logger: MetricLogger | None = None,
        *,
        callbacks: Sequence[Listener] = (),
        counts: Iterable[TimeUnit] = (TimeUnit.BATCH, TimeUnit.EPOCH),
    ) -> None:
        _refuse_flat(state.model)
        self.algorithms = algorithms
        self.state = state
        self.counts = set(counts)
        self._callbacks = callbacks
        self._logger = logger or NoLogger()
        self._met = self._clock_checked = False  # the latter after a batch has shown which units are counted
        self.uncounted: Uncounted | None = None
        self._counted = 0  # batches since steps are counted
        self.swapping = True

    # Events

    def meet(self) -> None:
        """Let the algorithms meet the model, if they have not."""
        if not self._met:
            self._met = True
            self.fire(Event.INIT)

    def fire(self, event: Event) -> None:
        """Dispatch an event to the algorithms, then to the callbacks.

        Args:
            event: That has happened.
        """
        self.dispatch(event)
        if self._callbacks:
            self.notify(event)

    def dispatch(self, event: Event) -> None:
        """Dispatch an event to the algorithms alone; ``notify`` follows when the loop is interruptible again.

        Args:
            event: That has happened.
        """
        if not self._met:
            self.meet()
        if event is Event.BATCH_END and not self._clock_checked:
            self._clock_checked = True
            refuse_unmoved(self.algorithms, self.state, self.counts)
        elif event is Event.FIT_START:
            self._clock_checked = False
            self.refuse_uncounted()
            warn_of_second_average(self)
        elif event in _SWAPPED_IN:
            self.warn_of_uncounted()
        elif event is Event.FIT_END:
            self.warn_of_uncounted(ended=True)
            self.uncounted = None
        algorithms = self.algorithms
        if not self.swapping and event in _SWAPPED_IN:
            algorithms = [one for one in algorithms if not one.swaps]
        if torch.is_inference_mode_enabled():
            # A tensor made in inference mode cannot be changed outside it, where training weights may be restored.
            with torch.inference_mode(mode=False):
                dispatch(event, self.state, algorithms, self._logger)
        else:
            dispatch(event, self.state, algorithms, self._logger)

    def notify(self, event: Event) -> None:
        """Dispatch an event to the callbacks alone.

        Args:
            event: On which the algorithms have acted.
        """
        for callback in tuple(self._callbacks):
            callback.run_event(event, self.state, self._logger)

    def between(self, start: Event, end: Event) -> Between:
        """Return a context that fires ``start`` before its block and ``end`` after it, also after an error.

        Args:
            start: Such as ``EVAL_START``.
            end: Such as ``EVAL_END``.
        """
        return Between(self.fire, self.state, start, end)

    @contextmanager
    def saving(self, path: str | Path | None = None) -> Iterator[None]:
        """Surround the writing of a checkpoint with ``SAVE_START`` and ``SAVE_END``.

        Args:
            path: Where it is written, if that is known.
        """
        with self.state.writing(path), self.between(Event.SAVE_START, Event.SAVE_END):
            yield

    # The clock

    def end_batch(self, *, samples: int = 0, tokens: int = 0) -> None:
        """Count an optimizer step, and fire ``BATCH_END``.

        Args:
            samples: Samples in it.
            tokens: Tokens in it.
        """
        self.count_batch(samples, tokens)
        self.fire(Event.BATCH_END)

    def count_batch(self, samples: int = 0, tokens: int = 0, *, seconds: float = 0.0, steps: int = 1) -> None:
        """Count a batch without an event.

        Args:
            samples: Samples in it.
            tokens: Tokens in it.
            seconds: How long it took.
            steps: Optimizer steps in it: 0 where mixed precision skipped the step.
        """
        state = self.state
        state.previous_timestamp = now = state.timestamp
        state.timestamp = now.to_next_batch(samples, tokens, seconds=seconds, steps=steps)
        self._counted += steps

    def begin_epoch(self) -> None:
        """Fire ``EPOCH_START``. An epoch that was left before its end counts as one."""
        self.leave_epoch()
        self.fire(Event.EPOCH_START)

    def leave_epoch(self) -> None:
        """Count the epoch that was left before its end, if one was, without an event."""
        if self.state.timestamp.in_epoch:
            self.count_epoch()

    def end_epoch(self) -> None:
        """Count an epoch, and fire ``EPOCH_END``."""
        self.count_epoch()
        self.fire(Event.EPOCH_END)

    def end_full_epoch(self) -> None:
        """End the epoch if its last batch has ended."""
        if self.state.timestamp.ends_epoch:
            self.end_epoch()

    def count_epoch(self) -> None:
        """Count an epoch without an event."""
        self.state.previous_timestamp = self.state.timestamp
        self.state.timestamp = self.state.timestamp.to_next_epoch()

    def set_epoch_length(self, batches: int | None) -> None:
        """Set how many batches an epoch has, for its fractions.

        Args:
            batches: None if that is not known.
        """
        self.state.timestamp = replace(self.state.timestamp, epoch_length=batches)

    def reset_clock(self) -> None:
        """Set the clock back to the start. At the next ``FIT_START`` an average continues from there."""
        start = Timestamp(epoch_length=self.state.timestamp.epoch_length)
        self.state.timestamp = self.state.previous_timestamp = start

    # Checks

    def refuse_uncounted(self) -> None:
        """Refuse algorithms with times in a unit that the loop does not count.

        Raises:
            TimeError: If there are any.
            ProfileError: If a profile is in such a unit.
        """
        for algorithm in self.algorithms:
            algorithm.refuse_uncounted(self.state, self.counts)

    def count(
        self, optimizer: object, after: Callable[[], object], first: Callable[[], object] | None = None
    ) -> StepHooks:
        """Call ``after`` after each step of an optimizer that counts, until the returned hooks are removed.

        Args:
            optimizer: Wrapped or not.
            after: Called after each step that counts.
            first: Called before the first step.

        Raises:
            OptimizerError: If its steps cannot be seen, or move other tensors than the model's.
        """
        counted = counted_optimizer(optimizer)
        refuse_masters(counted, self.state.model)
        warn_of_unregistered(counted, self.state.model)
        hooks = StepHooks(counted, after, first)
        self.watch(hooks)
        return hooks

    def watch(self, hooks: StepHooks | None) -> None:
        """Warn from now on, at evaluations, saves and the end, if weights move without a step that is counted.

        Args:
            hooks: On the optimizer whose steps are counted; None if they are counted by hand.
        """
        self.uncounted, self._counted = Uncounted(self.state.model, hooks, self.warn_of_uncounted), 0

    def warn_of_uncounted(self, *, ended: bool = False) -> None:
        """Warn, once, if weights have moved and no step was counted.

        Args:
            ended: Whether the run has ended.
        """
        if self.uncounted is not None and len(self.algorithms):
            self.uncounted.warn(self._counted, ended=ended)

    # State

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the algorithms and the clock."""
        self.meet()
        return {
            # Lists, not tuples, which `torch.distributed.checkpoint` does not look into.
            "algorithms": [[type(a).__qualname__, a.state_dict()] for a in self.algorithms],
            "timestamp": self.state.timestamp.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from what ``state_dict`` returned. Load the model's own state first.

        Args:
            state: As saved.

        Raises:
            CheckpointError: If it is not such a state, or that of other algorithms.
            MismatchError: If names or shapes differ from the model's.
        """
        self.meet()
        check_saved(state, [type(algorithm).__qualname__ for algorithm in self.algorithms])
        for algorithm, (_, own) in zip(self.algorithms, state["algorithms"], strict=True):
            algorithm.load_state_dict(own)
        length = self.state.timestamp.epoch_length
        self.state.timestamp = replace(Timestamp.from_state_dict(state["timestamp"]), epoch_length=length)
        if self.uncounted is not None:
            self.uncounted.reset(self._counted)


def _refuse_flat(model: nn.Module) -> None:
    """Refuse parameters on other ranks (ZeRO-3 marks them), and parameters in one flat tensor (FSDP1)."""
    flat = any(cls.__name__ == "FullyShardedDataParallel" for m in model.modules() for cls in type(m).__mro__)
    if flat or any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise NotImplementedError(
            "each process must hold a model's parameters as they are for them to be averaged, and under "
            f"{'FullyShardedDataParallel' if flat else 'DeepSpeed ZeRO-3'} it does not; "
            + ("train with FSDP2 (fully_shard), DDP or on one device" if flat else "use polyak.hosts.deepspeed")
        )

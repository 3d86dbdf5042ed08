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

# At these events, and at FIT_END, the loop warns if weights have moved without a counted step.
_SWAPPED_IN = frozenset({Event.EVAL_START, Event.PREDICT_START, Event.SAVE_START})


class Listener(Protocol):
    """The member of a callback that a loop calls."""

    def run_event(self, event: Event, state: Any, logger: Any) -> None:
        """Act on ``event``, after the algorithms."""
        ...


class Loop:
    """Runs algorithms, and callbacks after them, in a training loop: fires events, counts batches, saves states.

    Integrations translate the hooks of their framework to calls of its methods. The algorithms meet the model
    (``INIT``) when ``meet`` is called, or before the first other event.

    Args:
        algorithms: The algorithms, in order. A list may grow later.
        state: The state that they read. The loop updates its clock, and the integration sets the rest.
        logger: Where algorithms log.
        callbacks: Called after the algorithms. A list may grow later.
        counts: The units that are counted.

    Raises:
        NotImplementedError: If this process does not hold the model's parameters as they are.

    Attributes:
        algorithms: As given.
        state: As given.
        counts: The units that are counted.
        uncounted: Warns of weights that move without a counted step; None before steps are counted.
        swapping: Whether algorithms may swap an average in. It is off while an average is polished.
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
        self._met = self._clock_checked = False  # the clock is checked after the first batch
        self.uncounted: Uncounted | None = None
        self._counted, self.swapping = 0, True  # batches since steps are counted

    # Events

    def meet(self) -> None:
        """Let the algorithms meet the model, if they have not."""
        if not self._met:
            self._met = True
            self.fire(Event.INIT)

    def fire(self, event: Event) -> None:
        """Dispatch an event to the algorithms, then to the callbacks.

        Args:
            event: The event that has happened.
        """
        self.dispatch(event)
        if self._callbacks:
            self.notify(event)

    def dispatch(self, event: Event) -> None:
        """Dispatch an event only to the algorithms; call ``notify`` when the loop may be interrupted again.

        Args:
            event: The event that has happened.
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
        unswapped = not self.swapping and event in _SWAPPED_IN
        algorithms = [one for one in self.algorithms if not one.swaps] if unswapped else self.algorithms
        if torch.is_inference_mode_enabled():
            # A tensor made in inference mode cannot be changed outside it, where training weights may be restored.
            with torch.inference_mode(mode=False):
                dispatch(event, self.state, algorithms, self._logger)
        else:
            dispatch(event, self.state, algorithms, self._logger)

    def notify(self, event: Event) -> None:
        """Dispatch an event only to the callbacks.

        Args:
            event: On which the algorithms have acted.
        """
        for callback in tuple(self._callbacks):
            callback.run_event(event, self.state, self._logger)

    def between(self, start: Event, end: Event) -> Between:
        """Return a context that fires ``start`` before its block and ``end`` after it, even if the block raises.

        Args:
            start: Such as ``EVAL_START``.
            end: Such as ``EVAL_END``.
        """
        return Between(self.fire, self.state, start, end)

    @contextmanager
    def saving(self, path: str | Path | None = None) -> Iterator[None]:
        """Return a context for writing a checkpoint, between ``SAVE_START`` and ``SAVE_END``.

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
        """Fire ``EPOCH_START``. If the previous epoch was left early, count it first."""
        self.leave_epoch()
        self.fire(Event.EPOCH_START)

    def leave_epoch(self) -> None:
        """Count the epoch that was left early, if there is one, without an event."""
        if self.state.timestamp.in_epoch:
            self.count_epoch()

    def end_epoch(self) -> None:
        """Count an epoch, and fire ``EPOCH_END``."""
        self.count_epoch()
        self.fire(Event.EPOCH_END)

    def end_full_epoch(self) -> None:
        """End the epoch if this was its last batch."""
        if self.state.timestamp.ends_epoch:
            self.end_epoch()

    def count_epoch(self) -> None:
        """Count an epoch without an event."""
        self.state.previous_timestamp = self.state.timestamp
        self.state.timestamp = self.state.timestamp.to_next_epoch()

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
            OptimizerError: If it has no step hooks, or steps other tensors than the model's.
        """
        counted = counted_optimizer(optimizer)
        refuse_masters(counted, self.state.model)
        warn_of_unregistered(counted, self.state.model)
        hooks = StepHooks(counted, after, first)
        self.watch(hooks)
        return hooks

    def watch(self, hooks: StepHooks | None) -> None:
        """From now on, warn at evaluations, saves and the end if weights have moved without a counted step.

        Args:
            hooks: The hooks on the optimizer whose steps are counted; None if they are counted by hand.
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
            state: The saved state.

        Raises:
            CheckpointError: If it is not such a state, or the state of other algorithms.
            MismatchError: If names or shapes differ from the model's.
        """
        self.meet()
        check_saved(state, [type(algorithm).__qualname__ for algorithm in self.algorithms])
        for algorithm, (_, own) in zip(self.algorithms, state["algorithms"], strict=True):
            algorithm.load_state_dict(own)
        length = self.state.timestamp.epoch_length
        self.state.timestamp = replace(Timestamp.from_state_dict(state["timestamp"]), epoch_length=length)
        self.weights_loaded()

    def weights_loaded(self) -> None:
        """Take the model's weights as they are now: no step has moved them, and nothing is wrong."""
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

"""``CountedLoop``: the user's own loop, in which polyak sees only the steps of an optimizer."""

import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from torch import nn
from torch.optim import Optimizer

from polyak.algorithm import Algorithm
from polyak.errors import PlanWarning
from polyak.events import Event
from polyak.training.loop import Loop
from polyak.training.options import LoopOptions
from polyak.training.state import LoopState
from polyak.training.steps import StepHooks


class _Reachable(Sequence[Algorithm]):
    """A sequence of algorithms that holds those that swap an average in by weak references.

    The optimizer keeps its hooks alive. Without weak references, an average that no variable refers to any more, such
    as after a notebook's cell was run again, would still be updated. A ``Recorder`` works without a variable.

    Args:
        algorithms: The algorithms, which their owner keeps alive.
    """

    def __init__(self, algorithms: Sequence[Algorithm]) -> None:
        self._held: list[Callable[[], Algorithm | None]] = [
            weakref.ref(algorithm) if algorithm.swaps else _constant(algorithm) for algorithm in algorithms
        ]

    @overload
    def __getitem__(self, index: int) -> Algorithm: ...
    @overload
    def __getitem__(self, index: slice) -> list[Algorithm]: ...
    def __getitem__(self, index: int | slice) -> Algorithm | list[Algorithm]:
        return list(self)[index]

    def __iter__(self) -> Iterator[Algorithm]:
        alive = []
        for held in self._held:
            if (algorithm := held()) is not None:
                alive.append(algorithm)
        return iter(alive)

    def __len__(self) -> int:
        return len(list(iter(self)))


def _constant(algorithm: Algorithm) -> Callable[[], Algorithm]:
    return lambda: algorithm


class CountedLoop(Loop):
    """Follows the steps of an optimizer, which keeps this object alive, or of a caller.

    Args:
        algorithms: The algorithms in use; their owner must keep those that swap an average in.
        model: The model in training, wrapped or not.
        optimizer: The optimizer whose steps are counted; None if the caller counts them.
        options: The options of the loop.

    Raises:
        TimeError: If an algorithm has a time in a unit that is not counted.
        ProfileError: If a profile is in such a unit.
        OptimizerError: If the steps of the optimizer cannot be seen, or move other tensors than the model's.
        NotImplementedError: If this process does not hold the model's parameters as they are.

    Attributes:
        hooks: The hooks on the optimizer; None if steps are counted by hand.
        by_hand: Whether steps are counted by hand.
        detached: Whether counting has stopped.
    """

    def __init__(
        self, algorithms: Sequence[Algorithm], model: nn.Module, optimizer: object, options: LoopOptions
    ) -> None:
        state = LoopState(model, options.start, options.duration)
        super().__init__(_Reachable(algorithms), state, options.logger, counts=options.counts)
        self._samples, self._tokens = options.samples_per_step, options.tokens_per_step
        self.by_hand = optimizer is None
        self.detached = self._fitting = False
        self.hooks: StepHooks | None = None
        super().meet()
        self.refuse_uncounted()
        if optimizer is None:
            self.watch(None)
        else:
            self.hooks = self.count(optimizer, self.finish_batch, self.begin)
        _detach_others(self)

    def begin(self) -> None:
        """Fire ``FIT_START`` before the first step, not in ``attach``, so that a state can be loaded in between."""
        if not self._fitting:
            self._fitting = True
            self.fire(Event.FIT_START)

    def finish_batch(self) -> None:
        """Count a batch, and the epoch that it ends."""
        self.end_batch(samples=self._samples, tokens=self._tokens)
        if self.state.timestamp.epoch_length is not None:
            self.end_full_epoch()

    def release(self) -> None:
        """Stop counting, without an event."""
        self.detached = True
        if self.hooks is not None:
            self.hooks.remove()

    def detach(self) -> None:
        """Stop counting, and fire ``FIT_END``."""
        if not self.detached:
            self.release()
            self.fire(Event.FIT_END)

    def state_for(self, path: str | Path | None) -> dict[str, Any]:
        """Return ``state_dict()``, and warn if weights have moved without a counted step.

        Args:
            path: Where it will be saved, if that is known.
        """
        self.warn_of_uncounted()
        with self.state.writing(path):
            return self.state_dict()

    # Copies

    def parts(self) -> dict[str, Any]:
        """Return everything that a copy needs except the algorithms, which their owner has, and the hooks."""
        kept = {"algorithms", "hooks", "uncounted"}
        optimizer = self.hooks.optimizer if self.hooks is not None and not self.detached else None
        return {"optimizer": optimizer, **{name: value for name, value in vars(self).items() if name not in kept}}

    @classmethod
    def of_parts(cls, parts: Mapping[str, Any], algorithms: Sequence[Algorithm]) -> "CountedLoop":
        """Return a loop that counts. Its model may be incomplete, if the model refers to what is being copied.

        Args:
            parts: Copies of what ``parts`` returned.
            algorithms: Copies of the algorithms.
        """
        loop = cls.__new__(cls)
        optimizer = parts["optimizer"]
        vars(loop).update({name: value for name, value in parts.items() if name != "optimizer"})
        vars(loop).update(algorithms=_Reachable(algorithms), hooks=None, uncounted=None, _met=False)
        if optimizer is not None:
            loop.hooks = StepHooks(optimizer, loop.finish_batch, loop.begin)
        if _is_complete(loop.state.model):
            loop.meet()
        with _LOCK:
            _LOOPS.append(weakref.ref(loop))
        return loop

    def meet(self) -> None:
        """Let the algorithms meet the model, if they have not. Those of a copy wait until the model is complete."""
        if not self._met:
            super().meet()
            if not self.detached:
                self.watch(self.hooks)


def _is_complete(model: nn.Module) -> bool:
    try:
        return list(model.parameters()) is not None
    except AttributeError:  # it refers to what is being copied, and is not complete yet
        return False


_LOOPS: list["weakref.ref[CountedLoop]"] = []
_LOCK = threading.Lock()


def _detach_others(loop: CountedLoop) -> None:
    """Detach other loops of the same algorithms, which would count each step twice, and loops without algorithms."""
    with _LOCK:
        others = [other for held in _LOOPS if (other := held()) is not None and not other.detached]
        _LOOPS[:] = [weakref.ref(other) for other in (*others, loop)]
    for other in others:
        shared = [algorithm for algorithm in other.algorithms if any(algorithm is ours for ours in loop.algorithms)]
        if shared:
            if other.by_hand or _optimizer_of(other) is not None:
                warnings.warn(
                    f"an algorithm must follow one loop, and {shared[0]!r} was attached already: it follows the new "
                    "loop from now on; call detach() of what the first attach returned before the second",
                    PlanWarning,
                    stacklevel=6,
                )
            other.detach()
        elif not other.algorithms and _optimizer_of(other) is _optimizer_of(loop):
            other.release()


def _optimizer_of(loop: CountedLoop) -> Optimizer | None:
    return None if loop.hooks is None else loop.hooks.optimizer

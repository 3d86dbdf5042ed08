"""Algorithms in a loop of one's own: ``Attached``, what ``attach`` returns."""

import copy
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, overload

from torch import nn
from torch.optim import Optimizer

from polyak.algorithm import Algorithm, MetricLogger
from polyak.averaging.swap import swap_of
from polyak.errors import CopyError, LoanError, PlanWarning, PolyakError
from polyak.events import Event
from polyak.tensors.slots import unwrap
from polyak.time import Time, Timestamp, TimeUnit, as_span
from polyak.training.loop import Loop, as_algorithms
from polyak.training.steps import StepHooks


class _Reachable(Sequence[Algorithm]):
    """Algorithms, without keeping those alive that are of no use to anybody once nobody else has them.

    The optimizer keeps what follows its steps. An average that no variable refers to any more, as when the cell of a
    notebook was run again, would be kept up for nobody. A ``Recorder`` works on without being referred to.

    Args:
        algorithms: The owner holds them.
    """

    def __init__(self, algorithms: Sequence[Algorithm]) -> None:
        self._held: list[Callable[[], Algorithm | None]] = [
            weakref.ref(algorithm) if algorithm.lends else _constant(algorithm) for algorithm in algorithms
        ]

    def _alive(self) -> list[Algorithm]:
        return [algorithm for held in self._held if (algorithm := held()) is not None]

    @overload
    def __getitem__(self, index: int) -> Algorithm: ...
    @overload
    def __getitem__(self, index: slice) -> list[Algorithm]: ...
    def __getitem__(self, index: int | slice) -> Algorithm | list[Algorithm]:
        return self._alive()[index]

    def __iter__(self) -> Iterator[Algorithm]:
        return iter(self._alive())

    def __len__(self) -> int:
        return len(self._alive())


def _constant(algorithm: Algorithm) -> Callable[[], Algorithm]:
    return lambda: algorithm


class CountedLoop(Loop):
    """A loop that is seen by nothing but the steps of its optimizer, which keeps it alive.

    Args:
        algorithms: At work; their owner must keep those that swap an average in.
        model: As for ``polyak.attach``.
        optimizer: As for ``polyak.attach``.
        max_duration: As for ``polyak.attach``.
        steps_per_epoch: As for ``polyak.attach``.
        samples_per_step: As for ``polyak.attach``.
        tokens_per_step: As for ``polyak.attach``.
        logger: As for ``polyak.attach``.

    Attributes:
        hooks: On the optimizer; None if steps are counted by hand.
        detached: Whether counting has stopped.
    """

    def __init__(
        self,
        algorithms: Sequence[Algorithm],
        model: nn.Module,
        optimizer: object,
        *,
        max_duration: Time | str | None,
        steps_per_epoch: int | None,
        samples_per_step: int,
        tokens_per_step: int,
        logger: MetricLogger | None,
    ) -> None:
        self._unmet = False
        super().__init__(_Reachable(algorithms), model, logger)
        self.state.timestamp = Timestamp(epoch_length=steps_per_epoch)
        self.state.max_duration = None if max_duration is None else as_span("max_duration", max_duration, above=0)
        per_step = {TimeUnit.SAMPLE: samples_per_step, TimeUnit.TOKEN: tokens_per_step}
        self.counts |= {unit for unit, number in per_step.items() if number}
        self._samples, self._tokens = samples_per_step, tokens_per_step
        self.by_hand = optimizer is None
        self.detached = self._fitting = False
        self.hooks: StepHooks | None = None
        self.refuse_uncounted()
        if optimizer is None:
            self.watch(None)
        else:
            self.hooks = self.count(optimizer, self.finish_batch, self.begin)
        _begin_instead_of_others(self)

    def begin(self) -> None:
        """Begin with the first step: not in ``attach``, so that a state can be loaded first."""
        if not self._fitting:
            self._fitting = True
            self.fire(Event.FIT_START)

    def finish_batch(self) -> None:
        """Count a batch, and the epoch that it ends."""
        self.end_batch(samples=self._samples, tokens=self._tokens)
        timestamp = self.state.timestamp
        if timestamp.epoch_length == timestamp.batch_in_epoch.value:
            self.end_epoch()

    def release(self) -> None:
        """Stop to count, without a word to the algorithms."""
        self.detached = True
        if self.hooks is not None:
            self.hooks.remove()

    def detach(self) -> None:
        """Stop to count."""
        if not self.detached:
            self.release()
            self.fire(Event.FIT_END)

    def state_for(self, path: str | Path | None) -> dict[str, Any]:
        """Return what ``state_dict`` does, and warn of weights that have moved uncounted.

        Args:
            path: Where it will be saved, if that is known.
        """
        self.warn_of_unseen()
        self.state.saving_to = None if path is None else Path(path)
        try:
            return self.state_dict()
        finally:
            self.state.saving_to = None

    def parts(self) -> dict[str, Any]:
        """Return what a copy is made of: all but the algorithms, which their owner has, and the hooks."""
        kept = {"algorithms", "hooks", "_unseen"}
        optimizer = self.hooks.optimizer if self.hooks is not None and not self.detached else None
        return {"optimizer": optimizer, **{name: value for name, value in vars(self).items() if name not in kept}}

    @classmethod
    def of_parts(cls, parts: Mapping[str, Any], algorithms: Sequence[Algorithm]) -> "CountedLoop":
        """Return a loop at work. Its model may be half made still, where that refers to what is being copied.

        Args:
            parts: Copies of what ``parts`` returned.
            algorithms: Copies of the algorithms.
        """
        loop = cls.__new__(cls)
        optimizer = parts["optimizer"]
        vars(loop).update({name: value for name, value in parts.items() if name != "optimizer"})
        vars(loop).update(algorithms=_Reachable(algorithms), hooks=None, _unseen=None, _unmet=True)
        if optimizer is not None:
            loop.hooks = StepHooks(optimizer, loop.finish_batch, loop.begin)
        if _is_complete(loop.state.model):
            loop.meet()
        with _LOCK:
            _LOOPS.append(weakref.ref(loop))
        return loop

    def meet(self) -> None:
        """Let copied algorithms meet the copied model, now that it is complete, if they have not yet."""
        if self._unmet:
            self._unmet = False
            super().fire(Event.INIT)
            if not self.detached:
                self.watch(self.hooks)

    def fire(self, event: Event) -> None:
        """Tell the algorithms what happened.

        Args:
            event: What.
        """
        self.meet()
        super().fire(event)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the algorithms, and where the loop stands."""
        self.meet()
        return super().state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned; see ``Loop``."""
        self.meet()
        super().load_state_dict(state)


def _is_complete(model: nn.Module) -> bool:
    try:
        return list(model.parameters()) is not None
    except AttributeError:  # it refers to what is being copied, and is half made
        return False


_LOOPS: list["weakref.ref[CountedLoop]"] = []
_LOCK = threading.Lock()


def _begin_instead_of_others(loop: CountedLoop) -> None:
    """Let the other loops of the same algorithms end, which would count each step again, and those without any left."""
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
                    stacklevel=5,
                )
            other.detach()
        elif not other.algorithms and _optimizer_of(other) is _optimizer_of(loop):
            other.release()


def _optimizer_of(loop: CountedLoop) -> Optimizer | None:
    return None if loop.hooks is None else loop.hooks.optimizer


class Attached:
    """Algorithms at work in a loop of one's own; ``attach`` makes it, ``polyak``'s or that of a host with such loops.

    As a context manager it detaches at the end of the block. An average is kept up as long as this, or the algorithm
    itself, is referred to. A copy of this, made together with its model and optimizer, follows the copied ones.

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
        TimeError: If ``max_duration`` is no time, or a time is in a unit that is not counted.
        ProfileError: If a profile is in a unit that is not counted.
        ValueError: If more than one of the algorithms swaps an average in.
        NotImplementedError: If the model's parameters are not whole in this process.
        OptimizerError: If the steps of the optimizer cannot be seen, or move other tensors than the model's.

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
        self.algorithms: Sequence[Algorithm] = as_algorithms(algorithms)
        self._loop = CountedLoop(
            self.algorithms,
            model,
            optimizer,
            max_duration=max_duration,
            steps_per_epoch=steps_per_epoch,
            samples_per_step=samples_per_step,
            tokens_per_step=tokens_per_step,
            logger=logger,
        )

    @property
    def algorithm(self) -> Algorithm:
        """The first of ``algorithms``."""
        return self.algorithms[0]

    @property
    def loop(self) -> CountedLoop:
        """What follows the steps; it does not keep an average that nobody refers to any more."""
        return self._loop

    @property
    def timestamp(self) -> Timestamp:
        """What has been counted so far."""
        return self._loop.state.timestamp

    def step(self) -> None:
        """Count a batch, whose weights have all moved. Only where ``attach`` was given no optimizer.

        Raises:
            ValueError: If an optimizer's steps are counted, or this is detached.
        """
        if not self._loop.by_hand or self._loop.detached:
            reason = "it is detached" if self._loop.detached else "those of the optimizer are counted"
            raise ValueError(f"steps are counted by hand where attach was given no optimizer (here {reason})")
        self._loop.begin()
        self._loop.finish_batch()

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
        if swap := swap_of(self._loop.state.model):
            raise LoanError(f"a model can hold one average at a time, and {swap.owner} has swapped its own in already")
        with self._loop.between(Event.EVAL_START, Event.EVAL_END):
            yield unwrap(self._loop.state.model)

    def state_dict(self, path: str | Path | None = None) -> dict[str, Any]:
        """Return the state of the algorithms and the clock, to be saved next to the model's and the optimizer's.

        Args:
            path: Where it will be saved, if an algorithm is to keep what it refers to as long as that is there.
        """
        return self._loop.state_for(path)

    @property
    def in_parts(self) -> bool:
        """Whether the state is spread over ranks, so that each must save its own part of it. All ranks must ask."""
        return self._loop.in_parts

    def save_parts(self, folder: Path) -> None:
        """Save what ``state_dict`` returns by ``torch.distributed.checkpoint``. All ranks must call this.

        Args:
            folder: To be made, in that of the checkpoint that is being written.
        """
        self._loop.warn_of_unseen()
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
        self._loop.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._loop.fire(Event.EXCEPTION)
        self.detach()

    # Copies

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a copy that follows the copies of the model and the optimizer, and logs to the same place."""
        other = self.__class__.__new__(self.__class__)
        memo[id(self)] = other
        parts = self._loop.parts()
        memo[id(parts["_logger"])] = parts["_logger"]
        try:
            algorithms = copy.deepcopy(self.algorithms, memo)
        except PolyakError:
            raise
        except Exception as error:
            raise CopyError(
                f"what attach returned, with {self.algorithms}, cannot be copied: {error}; {_INSTEAD}"
            ) from error
        other.__setstate__({"algorithms": algorithms, "loop": copy.deepcopy(parts, memo)})
        return other

    def __getstate__(self) -> dict[str, Any]:
        parts = self._loop.parts()
        try:
            pickle.dumps(parts["_logger"])
        except Exception as error:
            raise CopyError(
                f"what attach returned can be pickled if its logger can, and {parts['_logger']!r} cannot: {error}; "
                f"{_INSTEAD}"
            ) from error
        return {"algorithms": self.algorithms, "loop": parts}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.algorithms = state["algorithms"]
        self._loop = CountedLoop.of_parts(state["loop"], self.algorithms)


_INSTEAD = "copy the model and the optimizer, attach a new algorithm to them, and load this one's state_dict()"

"""``Attached``: what ``attach`` returns."""

import copy
import pickle
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

from torch import nn
from torch.optim import Optimizer

from polyak.algorithm import Algorithm, as_algorithms
from polyak.averaging.habits import OF_AN_AVERAGE, kind_of
from polyak.errors import CallError, CopyError, FixedError, PolyakError
from polyak.events import Event
from polyak.tensors.slots import unwrap
from polyak.time import Timestamp
from polyak.training.counted import CountedLoop
from polyak.training.handle import Followed, Handle
from polyak.training.options import LoopOptions
from polyak.training.summary import summary


class Attached(Handle):
    """The handle of an average in your own training loop, and of its other algorithms. ``attach`` makes it.

    ``model`` is the averaged module, ``applied()`` swaps the average into your own model for a block, ``save`` writes
    the averaged weights, and ``state_dict`` is for resuming. As a context manager, it detaches at the end of the block.
    An average is updated as long as a variable refers to this object, or to the algorithm itself. If this is copied
    together with its model and optimizer, the copy follows the copied ones.

    Args:
        algorithms: One or several.
        model: The model in training, wrapped or not.
        optimizer: The optimizer whose steps are counted; None if ``step`` counts them.
        options: The options of the loop.

    Raises:
        TimeError: If an algorithm has a time in a unit that is not counted.
        ProfileError: If a profile is in such a unit.
        ArgumentError: If more than one of the algorithms swaps an average in.
        NotImplementedError: If this process does not hold the model's parameters as they are.
        OptimizerError: If the optimizer has no step hooks, or steps other tensors than the model's.

    Attributes:
        algorithms: The algorithms in use.
    """

    def __init__(
        self,
        algorithms: Algorithm | Sequence[Algorithm],
        model: nn.Module,
        optimizer: Optimizer | None,
        options: LoopOptions,
    ) -> None:
        self.algorithms: Sequence[Algorithm] = as_algorithms(algorithms)
        self._loop = CountedLoop(self.algorithms, model, optimizer, options)

    @property
    def algorithm(self) -> Algorithm:
        """The first of ``algorithms``."""
        return self.algorithms[0]

    @property
    def loop(self) -> CountedLoop:
        """The loop that follows the steps. It does not keep an average alive."""
        return self._loop

    @property
    def timestamp(self) -> Timestamp:
        """The clock: what has been counted so far."""
        return self._loop.state.timestamp

    def step(self) -> None:
        """Count a batch, after all weights have moved. Use it only if ``attach`` was given no optimizer.

        Raises:
            ValueError: If an optimizer's steps are counted, or this is detached.
        """
        if not self._loop.by_hand or self._loop.detached:
            reason = "it is detached" if self._loop.detached else "those of the optimizer are counted"
            advice = "attach again" if self._loop.detached else "delete this call"
            raise ValueError(f"steps are counted by hand where attach was given no optimizer (here {reason}); {advice}")
        self._loop.begin()
        self._loop.finish_batch()

    def end_epoch(self) -> None:
        """Count an epoch. With ``steps_per_epoch`` epochs are counted without this call."""
        self._loop.end_epoch()

    def _follows(self) -> CountedLoop:
        return self._loop

    def _swapped_in(self, followed: Followed) -> AbstractContextManager[None]:
        return followed.between(Event.EVAL_START, Event.EVAL_END)  # which logs, as an evaluation does

    def state_dict(self, path: str | Path | None = None) -> dict[str, Any]:
        """Return the state of the algorithms and the clock, to be saved next to the model's and the optimizer's.

        Args:
            path: Where it will be saved. A ``Recorder`` keeps the files that the state refers to as long as it exists.
        """
        return self._loop.state_for(path)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from what ``state_dict`` returned. Load the states of the model and the optimizer first.

        Args:
            state: The saved state.

        Raises:
            CheckpointError: If it is the state of other algorithms.
            MismatchError: If names or shapes differ from the model's.
        """
        self._loop.load_state_dict(state)

    def detach(self) -> None:
        """Stop counting. The algorithms keep their averages."""
        self._loop.detach()

    def __enter__(self) -> Self:
        """Return this.

        Raises:
            CallError: If it is detached, as after a block before.
        """
        if self._loop.detached:
            raise CallError("a block of what attach returned must begin while it counts (it is detached); attach again")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._loop.fire(Event.EXCEPTION)
        self.detach()

    def __repr__(self) -> str:
        loop = self._loop
        return summary(unwrap(loop.state.model), self.algorithms, loop.state.timestamp, detached=loop.detached)

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and name != "algorithms":
            what = OF_AN_AVERAGE.get(name, "it is read, and its settings are those of the EMA that was attached")
            raise FixedError(f"{name} of what attach returned cannot be assigned (got {kind_of(value)}); {what}")
        object.__setattr__(self, name, value)

    if not TYPE_CHECKING:

        def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
            """Refuse a call: the averaged module is ``model``."""
            del args, kwargs
            raise CallError(
                "what attach returned cannot be called; call ema.model(...), or the model in `with ema.applied():`"
            )

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

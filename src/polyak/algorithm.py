"""What acts on events: ``Algorithm``, and ``dispatch``, by which every host calls them."""

import pickle
import sys
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Protocol

from polyak.errors import ArgumentError, CopyError
from polyak.events import Event, State
from polyak.time import TimeUnit


class MetricLogger(Protocol):
    """Where an algorithm may log numbers. Every host's logger has this one method."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log ``metrics`` by name, at ``step`` batches."""
        ...


class NoLogger:
    """A logger for hosts that have none."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Drop the metrics."""


class Algorithm(ABC):
    """Something that changes training at events. Asking (``match``) changes nothing; acting (``apply``) does.

    Example:
        >>> class Count(Algorithm):
        ...     n = 0
        ...     def match(self, event, state):
        ...         return event is Event.BATCH_END
        ...     def apply(self, event, state, logger):
        ...         self.n += 1

    Attributes:
        lends: Whether it puts other weights in the model for evaluation. A loop can have one that does.
    """

    lends: ClassVar[bool] = False

    @abstractmethod
    def match(self, event: Event, state: State) -> bool:
        """Return whether this wants to act on ``event``, without changing anything."""

    @abstractmethod
    def apply(self, event: Event, state: State, logger: MetricLogger) -> None:
        """Act on ``event``."""

    def refuse_uncounted(self, state: State, counted: Collection[TimeUnit]) -> None:  # noqa: B027  most have no times
        """Refuse times that the loop does not count, before its first batch.

        Args:
            state: What is known of the run.
            counted: Units that the loop counts.

        Raises:
            TimeError: If there are any; it names the argument, the unit and the remedy.
            ProfileError: If they are those of a profile.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return all that later decisions depend on, as tensors and plain containers."""
        return {"repr": repr(self)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027  nothing to do unless there is state
        """Go on from what ``state_dict`` returned.

        Args:
            state: As saved.
        """


def dispatch(event: Event, state: State, algorithms: Sequence[Algorithm], logger: MetricLogger) -> None:
    """Ask all algorithms whether they act on ``event``, then let those act, in order.

    Events that begin with ``AFTER`` run in reverse order, as in Composer.

    Args:
        event: What happened.
        state: What there is.
        algorithms: Who may act.
        logger: Where they may log.
    """
    acting = [algorithm for algorithm in algorithms if algorithm.match(event, state)]
    for algorithm in reversed(acting) if event.name.startswith("AFTER") else acting:
        algorithm.apply(event, state, logger)


def check_algorithms(algorithms: Sequence[object]) -> None:
    """Check that what a loop was given are algorithms of ours.

    Args:
        algorithms: As given.

    Raises:
        ArgumentError: If one is not; of a class that other trainers have under the same name, it says what to import.
    """
    for one in algorithms:
        if isinstance(one, Algorithm):
            continue
        kind, advice = type(one), "derive from polyak.Algorithm"
        if isinstance(one, type):
            advice = "make one of it with parentheses"
        elif any(cls.__module__.partition(".")[0] == "composer" for cls in kind.__mro__):
            advice = f"this one is for Composer's trainer: `from polyak import {kind.__name__}` for any other loop"
        raise ArgumentError(
            f"algorithms must be instances of polyak.Algorithm (got {one!r} of {kind.__module__}.{kind.__qualname__}); "
            f"{advice}"
        )


def check_event(event: object, name: str) -> None:
    """Check that an event is one of ours, for algorithms of which Composer's trainer has a class of its own.

    Args:
        event: As given.
        name: Of the algorithm's class.

    Raises:
        ArgumentError: If it is not; it says what to import.
    """
    if not isinstance(event, Event):
        raise ArgumentError(
            f"the event must be one of polyak's (got {event!r} of {type(event).__module__}); in MosaicML Composer's "
            f"trainer, use the {name} made for it: `from polyak.hosts.composer import {name}`"
        )


# These copy functions without a name, too.
_BY_VALUE = {"copy", "cloudpickle", "dill"}


def check_pickles(name: str, value: object) -> None:
    """Check that an argument of an algorithm can be pickled with it; called by ``__getstate__``.

    Args:
        name: Of the argument.
        value: What was given.

    Raises:
        CopyError: If not, as with lambdas.
    """
    pickler = sys._getframe(2).f_globals.get("__name__", "")  # noqa: SLF001
    if _BY_VALUE.intersection(pickler.split(".")):
        return
    try:
        pickle.dumps(value)
    except Exception as error:
        raise CopyError(
            f"{name} must be a function that can be imported for the algorithm to be pickled (got {value!r}: {error}); "
            "define it with `def` at the top of a module"
        ) from error

"""``Algorithm``, which acts on events, and ``dispatch``, with which every training loop calls it."""

import pickle
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

from polyak.errors import ArgumentError, CopyError
from polyak.events import Event, State
from polyak.time import TimeUnit


class MetricLogger(Protocol):
    """Where an algorithm may log numbers. The logger of every integration has this one method."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log ``metrics`` by name, at ``step`` batches."""
        ...


class NoLogger:
    """A logger for loops that have none."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Drop the metrics."""


class Algorithm(ABC):
    """Changes training at events. ``match`` only asks whether to act; ``apply`` acts.

    Example:
        >>> class Count(Algorithm):
        ...     n = 0
        ...     def match(self, event, state):
        ...         return event is Event.BATCH_END
        ...     def apply(self, event, state, logger):
        ...         self.n += 1

    Attributes:
        swaps: Whether it swaps other weights into the model for evaluation. A loop can have one such algorithm.
    """

    swaps: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "lends" in vars(cls):
            warnings.warn(f"`lends` of {cls.__name__} is deprecated; name it `swaps`", DeprecationWarning, stacklevel=2)
            cls.swaps = vars(cls)["lends"]

    @property
    def lends(self) -> bool:
        """Deprecated name of ``swaps``."""
        warnings.warn("`Algorithm.lends` is deprecated; read `swaps`", DeprecationWarning, stacklevel=2)
        return self.swaps

    @abstractmethod
    def match(self, event: Event, state: State) -> bool:
        """Return whether to act on ``event``. Asking changes nothing."""

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
        """Return everything that later decisions depend on, as tensors and plain containers."""
        return {"repr": repr(self)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027  nothing to do unless there is state
        """Resume from what ``state_dict`` returned.

        Args:
            state: The saved state.
        """


# As in Composer, the last algorithm acts first where something has ended.
_REVERSED = frozenset(event for event in Event if event.name.startswith("AFTER"))


def dispatch(event: Event, state: State, algorithms: Iterable[Algorithm], logger: MetricLogger) -> None:
    """Ask all algorithms whether they act on ``event``, then let those act, in order.

    At events that begin with ``AFTER`` they act in reverse order, as in Composer.

    Args:
        event: The event that has happened.
        state: The state of the loop.
        algorithms: The algorithms, in order.
        logger: Where they may log.
    """
    acting = []
    for algorithm in algorithms:
        if algorithm.match(event, state):
            acting.append(algorithm)
    if event in _REVERSED:
        acting.reverse()
    for algorithm in acting:
        algorithm.apply(event, state, logger)


def as_algorithms(algorithms: Algorithm | Iterable[Algorithm]) -> list[Algorithm]:
    """Return one or several algorithms as a list that one loop can run.

    Args:
        algorithms: One or several.

    Raises:
        ArgumentError: If one of them is not an algorithm, is one of another trainer, or is given twice; if more than
            one of them swaps an average into the model.
    """
    listed = list(algorithms) if isinstance(algorithms, Iterable) else [algorithms]
    check_algorithms(listed)
    if len({id(algorithm) for algorithm in listed}) < len(listed):
        raise ArgumentError(f"algorithms must be different ones (got {listed}); give each once")
    check_one_swaps([algorithm for algorithm in listed if algorithm.swaps])
    return listed


def check_one_swaps(swapping: Sequence[object]) -> None:
    """Check that at most one of a loop's algorithms swaps an average into the model.

    Args:
        swapping: Those that do.

    Raises:
        ArgumentError: If there are several.
    """
    if len(swapping) > 1:
        raise ArgumentError(
            "a model can hold one average at a time, so there can be one algorithm that swaps one in (got "
            f"{list(swapping)}); to compare averages, give each its own loop or attach(), or record the "
            "run by a Recorder"
        )


def check_algorithms(algorithms: Sequence[object]) -> None:
    """Check that all are algorithms of polyak.

    Args:
        algorithms: As given.

    Raises:
        ArgumentError: If one is not; of a class that other trainers have under the same name, it says what to import.
    """
    for one in algorithms:
        if isinstance(one, Algorithm):
            continue
        if isinstance(one, type):
            raise ArgumentError(
                f"algorithms must be instances of polyak.Algorithm (got the class {one.__name__}); create one, with "
                f"parentheses: {one.__name__}(...)"
            )
        kind, advice = type(one), "derive from polyak.Algorithm"
        if is_composers(one):
            advice = f"this one is for Composer's trainer: `from polyak import {kind.__name__}` for any other loop"
        raise ArgumentError(
            f"algorithms must be instances of polyak.Algorithm (got {one!r} of {kind.__module__}.{kind.__qualname__}); "
            f"{advice}"
        )


def is_composers(algorithm: object) -> bool:
    """Return whether an object is an algorithm for Composer's trainer.

    Args:
        algorithm: An algorithm of any class.
    """
    return any(cls.__module__.partition(".")[0] == "composer" for cls in type(algorithm).__mro__)


def check_event(event: object, name: str) -> None:
    """Check that an event is one of polyak's, for algorithms that have another class for Composer's trainer.

    Args:
        event: As given.
        name: The name of the algorithm's class.

    Raises:
        ArgumentError: If it is not; it says what to import.
    """
    if not isinstance(event, Event):
        raise ArgumentError(
            f"the event must be one of polyak's (got {event!r} of {type(event).__module__}); in MosaicML Composer's "
            f"trainer, use the {name} made for it: `from polyak.hosts.composer import {name}`"
        )


# These also copy functions without a name.
_BY_VALUE = {"copy", "cloudpickle", "dill"}


def check_pickles(name: str, value: object) -> None:
    """Check that an argument of an algorithm can be pickled with it; called by ``__getstate__``.

    Args:
        name: The name of the argument.
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

"""What a reader of a family of checkpoints returns: averages that were kept during training, and their profiles."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isclose
from pathlib import Path
from typing import Any, Protocol, Self, TypedDict

from polyak.checkpoints.opening import Checkpoint
from polyak.checkpoints.stored import StoredTensor
from polyak.compat.words import shown
from polyak.errors import ArgumentError, CheckpointError
from polyak.profiles import Profile
from polyak.time import Time, TimeUnit


class Said(TypedDict, total=False):
    """What the user tells ``Record.from_checkpoints`` about checkpoints that do not say it themselves.

    Attributes:
        stored: The profiles of the averages: one, or one for each average of a step, in their order.
        update_every: The number of steps between two updates, of ``PostHocEMA``.
        step_size_correction: Whether nitrous-ema's option of that name was on.
        batch_size: Images in a batch, of EDM2. Otherwise it is what ``training_options.json`` says, or else 1.
        times: When each checkpoint was saved, such as ``"100ba"``. Otherwise the files or their names say it.
        key: Where the weights are in a file, such as ``"ema"``.
        prefix: How the names of the tensors to take begin, such as ``"teacher."``.
        max_duration: The length of the run, for times in ``dur``. Otherwise it ends at the last checkpoint.
    """

    stored: Profile | Sequence[Profile] | None
    update_every: int | None
    step_size_correction: bool
    batch_size: int | None
    times: Sequence[Time | str] | None
    key: str | None
    prefix: str | None
    max_duration: Time | str | None


@dataclass(frozen=True, slots=True)
class Options:
    """What the user says about checkpoints that do not say it themselves.

    Args:
        stored: The profiles of the averages; None for those that the files or their names say.
        update_every: The number of steps between two updates of an average.
        corrected: Whether nitrous-ema's ``step_size_correction`` was on.
        batch_size: Samples in a batch, where files count samples.
        times: When each checkpoint was saved, in the order of the paths.
        key: Where the weights are in a file, such as ``"ema"``.
        prefix: How the names of the tensors to take begin.
    """

    stored: tuple[Profile, ...] | None = None
    update_every: int | None = None
    corrected: bool = False
    batch_size: int | None = None
    times: Mapping[Path, Time] = field(default_factory=dict)
    key: str | None = None
    prefix: str | None = None

    @classmethod
    def of(cls, paths: Sequence[Path], said: Said) -> Self:
        """Return options with a time for each path.

        Args:
            paths: The paths of the checkpoints.
            said: What the user says of them.

        Raises:
            ArgumentError: If there are more or fewer times than paths.
        """
        stored, times = said.get("stored"), said.get("times")
        if times is not None and len(times) != len(paths):
            raise ArgumentError(
                f"times must have a value for each path (got {len(times)} for {len(paths)}); give as many"
            )
        return cls(
            None if stored is None else tuple(stored) if isinstance(stored, Sequence) else (stored,),
            said.get("update_every"),
            said.get("step_size_correction", False),
            said.get("batch_size"),
            {path: Time.from_input(time) for path, time in zip(paths, times or (), strict=False)},
            said.get("key"),
            said.get("prefix"),
        )


@dataclass(frozen=True, slots=True)
class Average:
    """An average in a checkpoint.

    Args:
        checkpoint: The file, with the tensors of the average.
        name: The name of the average, for people.
        updates: How many updates of the average, or steps of the run, there were when it was saved.
        clock: The run's clock at that moment, by unit.
        profile: How much each moment counts; None if these are the weights of the moment alone.
        origin: The reading of the profile's clock where averaging began.
        last: The reading of the profile's clock at the last update; None for that when it was saved.
        copied: The names of tensors that are of the moment and no averages.
    """

    checkpoint: Checkpoint
    name: str
    updates: int
    clock: Mapping[TimeUnit, float]
    profile: Profile | None
    origin: float = 0.0
    last: float | None = None
    copied: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Series:
    """The averages of one run.

    Args:
        kind: What they are, for people.
        averages: Oldest first; of one moment, those with the oldest weights first.
        begin: The run's clock where their profiles begin, by unit: 0 where it is not said.
        raw: The weights of the last moment themselves, if the newest checkpoint has them.
        left_out: Names in the folder that were not taken, with the reason.
    """

    kind: str
    averages: Sequence[Average]
    begin: Mapping[TimeUnit, float] = field(default_factory=dict)
    raw: Mapping[str, StoredTensor] | None = None
    left_out: Sequence[str] = ()


class Family(Protocol):
    """The members of a family's module."""

    @property
    def KIND(self) -> str:  # noqa: N802  a constant of the module
        """What it reads, as text for messages."""
        ...

    @property
    def accepts(self) -> Callable[[Path, Mapping[Any, Any]], bool]:
        """Whether a checkpoint with this content belongs to the family."""
        ...

    @property
    def read(self) -> Callable[[Sequence[Path], Options], Series]:
        """Return the averages in checkpoints."""
        ...


@dataclass(frozen=True, slots=True)
class PlainMean:
    """The plain mean of all updates of an average."""

    @property
    def unit(self) -> None:
        """None: its clock counts updates."""
        return

    @property
    def recursive(self) -> bool:
        """Whether one buffer can follow the profile during training."""
        return True

    def decay(self, before: float, now: float) -> float:
        """Return the share of the average at ``now`` that was in it at ``before``.

        Args:
            before: The earlier number of updates.
            now: The later one.
        """
        return 1.0 if now == before else before / now

    def __str__(self) -> str:
        return "plain mean of all updates"


def as_count(path: Path, name: str, value: float | None) -> int:
    """Return a count from a checkpoint.

    Args:
        path: The path of the checkpoint.
        name: The name of the count.
        value: What it says.

    Raises:
        CheckpointError: If it says none, or one that is not whole or below 0.
    """
    if value is None or value < 0 or not isclose(value, round(value)):
        raise CheckpointError(
            f"{shown(path)} must say its {name}, a whole number (got {shown(value)}); leave it out, or save it again"
        )
    return round(value)


def clock_before(first: Average, second: Average | None) -> dict[TimeUnit, float]:
    """Return the run's clock at update 0 of an average that counts its updates, if it advances as between two saves.

    Args:
        first: The first checkpoint.
        second: The next one, if there is one.
    """
    if second is None or second.updates <= first.updates:
        return {}
    rate = first.updates / (second.updates - first.updates)
    units = first.clock.keys() & second.clock.keys()
    return {unit: max(0.0, first.clock[unit] - rate * (second.clock[unit] - first.clock[unit])) for unit in units}

"""The recommended average of a record with the reasons, and the default that needs no evaluation."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from polyak.averaging.schedule import AUTO_SHARE
from polyak.profiles import HalfLife, Profile, named
from polyak.time import Time, TimeUnit

if TYPE_CHECKING:
    from polyak.record.reader import Record


@dataclass(frozen=True, slots=True)
class Comparison:
    """Compares the best average of a sweep with the default one, a half-life of a sixteenth of the run.

    Args:
        metric: The metric that decides.
        maximize: Whether a higher value is better.
        default: The default average.
        default_value: Its metric.
        best: The best average.
        best_value: Its metric.
        gain: By how much the best is better; 0 where the default is the best.
        interval: The 95 % interval of the gain, from the same examples under both averages, wide enough for a best that
            was chosen among ``averages``; None where the evaluation does not return what it follows from.
        examples: How many values the evaluation returned for each average.
        averages: How many averages were evaluated.
        raw: The metric of the raw weights; None where the record does not keep them.
    """

    metric: str
    maximize: bool
    default: Profile
    default_value: float
    best: Profile
    best_value: float
    gain: float
    interval: tuple[float, float] | None
    examples: int
    averages: int
    raw: float | None = None

    def to_plain(self) -> dict[str, Any]:
        """Return the numbers in a form that JSON can hold, and profiles in words."""
        words = {"default": named(self.default).describe(), "best": named(self.best).describe()}
        return {name: words.get(name, getattr(self, name)) for name in self.__dataclass_fields__}


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The average of a record to take, and why. ``recommend`` returns it.

    Args:
        record: The record.
        profile: The profile of the average.
        reason: Why, in words.
        error: The estimated error of the average, as ``Record.error``.
        comparison: What an evaluation said; None without one.
    """

    record: "Record"
    profile: Profile
    reason: str
    error: float
    comparison: Comparison | None = None

    @property
    def half_life(self) -> Time | None:
        """The half-life; None if the recommended profile is of another kind."""
        return named(self.profile).half_life

    def average(
        self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """Return the average by name, for ``load_state_dict``; see ``Record.average``.

        Args:
            device: The device for the result; None for the CPU.
            dtype: The dtype for the tensors that are averaged; None for float32, and float64 where the record keeps
                that.

        Raises:
            RecordError: If a file is missing, truncated or damaged.
        """
        return self.record.average(self.profile, device=device, dtype=dtype)

    def export(self, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write the average to a safetensors file; see ``Record.export``.

        Args:
            path: The file. An existing one is replaced once the new one is complete.
            dtype: As for ``average``.

        Raises:
            RecordError: If a file is missing, truncated or damaged, or the disk refuses.
        """
        self.record.export(self.profile, path, dtype=dtype)

    def __str__(self) -> str:
        return f"{named(self.profile).describe()}: {self.reason}"


def unit_of(record: "Record") -> TimeUnit:
    """Return the unit of a run's length, in which ``EMA("auto")`` counts; batches where the length is not known.

    Args:
        record: A record.
    """
    if record.max_duration is None or record.max_duration.unit is TimeUnit.DURATION:
        return TimeUnit.BATCH
    return record.max_duration.unit


def length_of(record: "Record", unit: TimeUnit) -> float:
    """Return how long a record is.

    Args:
        record: A record with a segment.
        unit: The unit of the result.
    """
    start, end = record.segments[0].start, record.segments[-1].end
    return end.clock(unit, record.max_duration) - start.clock(unit, record.max_duration)


def share_of(record: "Record", share: float) -> Time:
    """Return a share of the length of a record as a time.

    Args:
        record: A record with a segment.
        share: Above 0.
    """
    unit = unit_of(record)
    return Time(length_of(record, unit) * share, unit)


def sixteenth(record: "Record") -> HalfLife:
    """Return the average that needs no evaluation: a half-life of a sixteenth of what was recorded, unbiased.

    At the end of a run whose ``max_duration`` is known it is that of ``EMA("auto")``.

    Args:
        record: A record with a segment.
    """
    return HalfLife(share_of(record, AUTO_SHARE), unbiased=True)

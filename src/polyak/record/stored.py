"""``StoredAverage``: a checkpoint of another library, used like a segment of a record."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

from polyak.profiles import Profile
from polyak.record.manifest import Segment


@dataclass(frozen=True, slots=True)
class StoredAverage(Segment):
    """An average that was kept during training and saved at ``end``. Its weights may reach back to the run's start.

    Averages of one moment have the same ``start``, the moment before, and the one with the oldest weights comes first.

    Args:
        name: The name of its file, for people; with a ``:`` and a place, if the file has several averages.
        profile: How much each moment of the run counts in it; None if it is the weights of ``end`` alone.
        origin: The reading of the profile's clock where averaging began.
        last: The reading of the profile's clock at the last update of the average; None for that at ``end``.
        rounding: What storing it loses of each number, relative to the number.
        index: Its place among the checkpoints of the record.
    """

    name: str = ""
    profile: Profile | None = None
    origin: float = 0.0
    last: float | None = None
    rounding: float = 0.0
    index: int = 0

    @property
    def file(self) -> str:
        """Its name, with a hash that changes if this checkpoint or one before it is replaced."""
        return f"{self.name}@{self.sha256[:16]}"


def all_stored(segments: Sequence[Segment]) -> TypeGuard[Sequence[StoredAverage]]:
    """Return whether segments are checkpoints of another library. In a record, all of them are or none.

    Args:
        segments: The segments of a record.
    """
    return bool(segments) and isinstance(segments[0], StoredAverage)

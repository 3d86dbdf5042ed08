"""The moments at which averages of a record can end: shares of the record or times, each the end of a segment."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from polyak.errors import TimeError
from polyak.record.manifest import Segment
from polyak.time import Time, TimeUnit

if TYPE_CHECKING:
    from polyak.record.reader import Record

_SHOWN = 4


def ends(record: "Record", at: str | Time | Sequence[str | Time]) -> list[Segment]:
    """Return the segments that end at given moments, oldest first.

    Args:
        record: The record.
        at: Shares of the record such as ``"50%"``, or times such as ``"0.5dur"`` and ``"1000ba"``, in a list or
            separated by commas. For a share, and in ``dur``, the nearest end of a segment is taken.

    Raises:
        TimeError: If one is neither, or no segment ends at that time.
    """
    given = [at] if isinstance(at, str | Time) else at
    one_by_one = [part for one in given for part in (one.split(",") if isinstance(one, str) else [one])]
    found = {_end(record, one) for one in one_by_one}
    if not found:
        raise TimeError("at must have at least one moment (got none); give a share such as 50%, or a time")
    return sorted(found, key=lambda segment: segment.end.updates)


def moment(segment: Segment) -> Time:
    """Return the end of a segment in batches.

    Args:
        segment: The segment of a record.
    """
    return Time(segment.end.clock(TimeUnit.BATCH), TimeUnit.BATCH)


def resolved(record: "Record", at: str | Time | int | None) -> str | Time | int | None:
    """Return a moment as ``fit`` takes it: for a share such as ``"50%"`` the nearest end of a segment, in batches.

    Args:
        record: The record.
        at: A moment.

    Raises:
        TimeError: If it is a share that is out of range.
    """
    if isinstance(at, str) and at.strip().endswith("%") and record.segments:
        return moment(_end(record, at))
    return at


def _end(record: "Record", at: str | Time) -> Segment:
    if isinstance(at, str) and at.strip().endswith("%"):
        share = _share(at.strip())
        return min(
            reversed(record.segments), key=lambda one: abs(one.end.updates - share * record.segments[-1].end.updates)
        )
    try:
        time = Time.from_input(at)
    except TimeError as error:
        raise TimeError(
            f"a moment must be a share of the record such as 50%, or a time (got {at!r}): {error}"
        ) from None
    clocks = [one.end.clock(time.unit, record.max_duration) for one in record.segments]
    # Of equal ones the last.
    near = sorted(range(len(clocks) - 1, -1, -1), key=lambda i: abs(clocks[i] - float(time)))
    if time.unit is not TimeUnit.DURATION and not math.isclose(clocks[near[0]], float(time), abs_tol=1e-9):
        listed = ", ".join(str(Time(clocks[i], time.unit)) for i in sorted(near[:_SHOWN]))
        raise TimeError(
            f"a moment must be the end of a segment (got {time}); near it are {listed}; a share such as 50% takes the "
            "nearest"
        )
    return record.segments[near[0]]


def _share(text: str) -> float:
    try:
        share = float(text.removesuffix("%")) / 100
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise TimeError(f"a share of the record must be above 0% and at most 100% (got {text!r}); 100% is its end")
    return share

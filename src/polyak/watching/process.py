"""``watch``: reads a record while another process writes it, until the run ends."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from polyak.errors import RecordError, TimeError
from polyak.record import Edge, Record
from polyak.record.manifest import MANIFEST
from polyak.sweeping.returned import Evaluate
from polyak.time import Time, Timestamp, TimeUnit, as_span
from polyak.watching.log import Log
from polyak.watching.moment import COOLDOWNS, HALF_LIVES, RAW, Moment, check_options, read_moment

_EVERY = Time(1 / 20, TimeUnit.DURATION)


@dataclass(frozen=True, slots=True)
class Due:
    """When a moment is read.

    Args:
        every: As for ``watch``.
    """

    every: Time | None

    def at(self, record: Record, last: Moment | None) -> bool:
        """Return whether an interval has ended since the last moment, or the run has.

        Args:
            record: The record as it is now.
            last: The last moment; None if there is none.

        Raises:
            TimeError: If the record does not count the unit of the interval.
        """
        if not record.segments:
            return False
        end, every = record.segments[-1].end, self._interval(record)
        # A record that is shorter than at the last moment is that of a run that was resumed, or of a new one.
        before = Timestamp() if last is None or last.updates > end.updates else last.timestamp
        if self.ended(record):
            return last is None or last.updates != end.updates or last.get(RAW) is None
        if last is not None and last.updates == end.updates:
            return False
        return _passed(end, every, record) > before.intervals(every, record.max_duration)

    @staticmethod
    def ended(record: Record) -> bool:
        """Return whether the run has ended: its record then keeps the raw weights.

        Args:
            record: The record as it is now.
        """
        return record.raw is not None

    def _interval(self, record: Record) -> Time:
        every = _EVERY if self.every is None else self.every
        if every.unit is TimeUnit.DURATION and record.max_duration is None:
            raise TimeError(
                "the time between readings must be in a unit that the run counts, and the length of this one is not "
                f"known (got every={self.every}): give a time such as '500ba'"
            )
        end = record.segments[-1].end
        if not end.clock(every.unit, record.max_duration) > 0:
            raise TimeError(
                f"the time between readings must be in a unit that the run counts, and it counts no {every.unit} (got "
                f"every={every}): give a time such as '500ba'"
            )
        return every


def _passed(end: Edge, every: Time, record: Record) -> int:
    return end.timestamp.intervals(every, record.max_duration)


def watch(
    record: str | Path,
    evaluate: Evaluate,
    every: str | Time | int | None = None,
    *,
    results: str | Path | None = None,
    half_lives: Sequence[float] = HALF_LIVES,
    cooldowns: Sequence[float] = COOLDOWNS,
    metric: str | None = None,
    maximize: bool | None = None,
    minimize: bool | None = None,
    patience_s: float = 3600.0,
    poll_s: float = 1.0,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[Moment]:
    """Yield what a run would score with its averages, again and again while it writes its record.

    Each moment has the metrics of the newest mean of the record, which is nearly raw, of averages with half-lives of a
    sixteenth and other shares of the run so far, and of virtual cooldowns. The raw weights are there once the run has
    ended. It ends with the run, or if the record is deleted or does not grow for ``patience_s``. Nothing of the run is
    changed, and it is slowed down only by sharing the disk and the devices that ``evaluate`` uses.

    Args:
        record: The folder of the record. It need not exist yet.
        evaluate: As for ``sweep``.
        every: The time of training between two moments; None for a twentieth of the run, where its
            ``max_duration`` is known.
        results: A JSON Lines file that keeps the moments. It is continued if it exists.
        half_lives: Shares of the run so far.
        cooldowns: Shares of the run so far.
        metric: As for ``sweep``.
        maximize: As for ``sweep``.
        minimize: As for ``sweep``.
        patience_s: For how long the record may stay as it is.
        poll_s: How often the folder is looked at.
        say: Called with a sentence that says what is waited for, and why this ends.

    Raises:
        ArgumentError: If ``evaluate`` cannot be called, or a length is not a share of the run.
        EvaluationError: As ``sweep``.
        RecordError: If a file of the record is damaged.
        TimeError: If the run does not count the unit of ``every``.
        WatchError: If ``results`` has something else.
    """
    check_options(evaluate, half_lives=half_lives, cooldowns=cooldowns, maximize=maximize, minimize=minimize)
    due = Due(None if every is None else as_span("every", every, above=0, steps=True))
    folder = Path(record).absolute()
    with Log(None if results is None else Path(results)) as log:
        growth = _Growth(patience_s)
        while True:
            found = _opened(folder)
            last = log.moments[-1] if log.moments else None
            if found is not None:
                growth.note(found)
            if found is not None and due.at(found, last):
                try:
                    moment = read_moment(
                        found,
                        evaluate,
                        half_lives=half_lives,
                        cooldowns=cooldowns,
                        metric=metric,
                        maximize=maximize,
                        minimize=minimize,
                    )
                except RecordError:
                    if (folder / MANIFEST).exists():
                        raise
                    continue  # deleted meanwhile
                log.add(moment)
                yield moment
                continue
            if (reason := growth.over(found, folder, say)) is not None:
                say(reason)
                return
            time.sleep(poll_s)


class _Growth:
    """Says when there is nothing more to wait for.

    Args:
        patience_s: As for ``watch``.
    """

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._since = time.monotonic()
        self._updates: int | None = None  # None before there was a record
        self._waits = False

    def note(self, record: Record) -> None:
        """Note how long the record is now.

        Args:
            record: The record.
        """
        updates = record.segments[-1].end.updates if record.segments else 0
        if updates != self._updates:
            self._updates, self._since = updates, time.monotonic()

    def over(self, record: Record | None, folder: Path, say: Callable[[str], None]) -> str | None:
        """Return why to end; None to wait.

        Args:
            record: The record as it is now; None if there is none.
            folder: The folder of the record.
            say: As for ``watch``.
        """
        if record is not None:
            if record.segments and Due.ended(record):
                return "the run has ended"
        elif self._updates is not None:
            return f"the record in {folder} is gone"
        elif not self._waits:
            self._waits = True
            say(f"waiting for a record in {folder}")
        if time.monotonic() - self._since > self._patience_s:
            return f"the record in {folder} has not grown for {self._patience_s:g} s"
        return None


def _opened(folder: Path) -> Record | None:
    """Return the record in a folder; None if there is none."""
    try:
        return Record(folder)
    except RecordError:
        if (folder / MANIFEST).exists():
            raise
        return None

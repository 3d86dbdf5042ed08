"""The clock of a record, which is never set back."""

from dataclasses import replace
from typing import Any

from polyak.time import Time, Timestamp

_COUNTERS = ("batch", "epoch", "iteration", "sample", "token", "total_wct")


class RecordClock:
    """Reads the loop's clock, and continues if that starts from 0 again.

    Attributes:
        ahead: By counter, how far the record's clock is ahead of the loop's.
    """

    def __init__(self) -> None:
        self.ahead = dict[str, float]()

    def now(self, timestamp: Timestamp) -> Timestamp:
        """Return the record's clock.

        Args:
            timestamp: The loop's clock.
        """
        counters = {name: getattr(timestamp, name) for name in self.ahead}
        ahead: dict[str, Any] = {name: t + Time(self.ahead[name], t.unit) for name, t in counters.items()}
        return replace(timestamp, **ahead)

    def resume(self, timestamp: Timestamp, start: Timestamp) -> None:
        """Continue at ``start`` if the loop's clock is before it.

        Args:
            timestamp: The loop's clock.
            start: The record's clock where the open segment starts.
        """
        if self.now(timestamp).batch < start.batch:
            units = {name: getattr(timestamp, name).unit for name in _COUNTERS}
            self.ahead = {name: start.elapsed(unit) - timestamp.elapsed(unit) for name, unit in units.items()}

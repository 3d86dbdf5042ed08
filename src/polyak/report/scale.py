"""Where values lie in a panel, and how numbers are written beside it. Nothing is drawn here."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scale:
    """Where a value lies in a panel.

    Args:
        low: At its beginning.
        high: At its end, above ``low``.
        log: Whether evenly spaced in the logarithm.
    """

    low: float
    high: float
    log: bool = False

    def at(self, value: float) -> float:
        """Return the place of a value, from 0 to 1; those beyond the ends are put at the ends.

        Args:
            value: Any.

        Example:
            >>> Scale(1, 100, log=True).at(10)
            0.5
        """
        low, high, value = (
            (math.log(self.low), math.log(self.high), math.log(max(value, self.low)))
            if self.log
            else (self.low, self.high, value)
        )
        return min(1.0, max(0.0, (value - low) / (high - low)))

    @property
    def ticks(self) -> list[float]:
        """Round values, about five."""
        if not self.log:
            step = _round_step((self.high - self.low) / 4)
            first = math.ceil(self.low / step - 1e-9)
            last = math.floor(self.high / step + 1e-9)
            return [round(i * step, 12) for i in range(first, last + 1)]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for digits in ((1,), (1, 3), (1, 2, 5)):
            found = [d * 10.0**e for e in decades for d in digits if self.low <= d * 10.0**e <= self.high * (1 + 1e-9)]
            if len(found) >= 3:
                return found
        return found


def _round_step(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    return next(digit * power for digit in (1, 2, 2.5, 5, 10) if digit * power >= least * (1 - 1e-9))


def span(values: Sequence[float], *, zero: bool = False, margin: float = 0.08) -> Scale:
    """Return a scale that holds all values, with room around them.

    Args:
        values: At least one.
        zero: Whether it begins at 0.
        margin: Share of the room.
    """
    low, high = (0.0, max(*values, 0.0)) if zero else (min(values), max(values))
    room = margin * (high - low) or 0.1 * abs(high) or 1.0
    return Scale(low if zero else low - room, high + room)


def number(value: float) -> str:
    """Write a number at an axis.

    Args:
        value: Any.

    Example:
        >>> number(0.25), number(1000.0), number(16384), number(2_500_000)
        ('0.25', '1,000', '16,384', '2.5M')
    """
    if abs(value) >= 1e9:
        return f"{value / 1e9:g}G"
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def side(height: float, points: Sequence[tuple[float, float]], *, width: float, line: float) -> tuple[bool, bool]:
    """Return where the name of a level line is clear of points: whether at the right end, and whether above the line.

    Args:
        height: Of the line, from 0 to 1.
        points: To keep clear of, from 0 to 1 each.
        width: Of the name.
        line: Height of the name.
    """

    def clearance(right: bool, above: bool) -> float:
        middle = height + (line if above else -line)
        if not line / 2 <= middle <= 1 - line / 2:
            return -1.0
        near = [abs(y - middle) for x, y in points if (x > 1 - width if right else x < width)]
        return min(near, default=1.0)

    # Of places alike, the first: at the right, above. What is clear enough is not made better by more.
    places = [(right, above) for right in (True, False) for above in (True, False)]
    return max(places, key=lambda place: min(clearance(*place), 1.5 * line))

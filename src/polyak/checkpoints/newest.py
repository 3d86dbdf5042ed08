"""Selections of the newest checkpoints: the last N, or N of them at a distance, such as every second one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from polyak.errors import ArgumentError

_Any = TypeVar("_Any")
_USUAL = (1, 2, 3, 5)  # and ten times as many, and so on


@dataclass(frozen=True, slots=True)
class Newest:
    """The newest checkpoint, and older ones at a distance.

    Args:
        count: How many in all.
        every: Their distance: 1 for all, 2 for every second one, counted back from the newest.
    """

    count: int
    every: int = 1

    def of(self, checkpoints: Sequence[_Any]) -> list[_Any]:
        """Return them.

        Args:
            checkpoints: All, the newest last.

        Example:
            >>> Newest(3, every=2).of(["a", "b", "c", "d", "e", "f"])
            ['b', 'd', 'f']
        """
        return [*checkpoints[:: -self.every]][: self.count][::-1]

    def describe(self) -> str:
        """Return words for people.

        Example:
            >>> Newest(5).describe(), Newest(3, every=2).describe(), Newest(1).describe()
            ('last 5', '3, every 2nd', 'newest')
        """
        if self.count == 1:
            return "newest"
        return f"last {self.count}" if self.every == 1 else f"{self.count}, every {_ordinal(self.every)}"


def _ordinal(number: int) -> str:
    ending = "th" if 10 < number % 100 < 14 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def choices(total: int, counts: Sequence[int] | None = None, spacings: Sequence[int] = (1, 2, 4)) -> list[Newest]:
    """Return which of the newest checkpoints to try: each number at each distance, as far as there are so many.

    Args:
        total: How many checkpoints there are.
        counts: The numbers; None for 1, 2, 3, 5, 10, 20, 30, 50 and so on, and all.
        spacings: The distances.

    Raises:
        ArgumentError: If a number is below 1, or larger than there are checkpoints.

    Example:
        >>> [one.describe() for one in choices(4)]
        ['newest', 'last 2', 'last 3', 'last 4', '2, every 2nd']
    """
    for name, values in (("counts", counts), ("spacings", spacings)):
        if values is not None and not (values and all(type(one) is int and one >= 1 for one in values)):
            raise ArgumentError(f"{name} must be whole numbers of at least 1 (got {[*values]}); correct them")
    if counts is not None and max(counts) > total:
        raise ArgumentError(f"counts must be at most the number of checkpoints (got {max(counts)} for {total})")
    found = dict[Newest, None]()
    for every in sorted({*spacings}):
        most = -(-total // every)
        for count in sorted({*(_usual(most) if counts is None else counts)}):
            if count <= most:
                found[Newest(count, every if count > 1 else 1)] = None
    return [*found]


def _usual(most: int) -> Iterator[int]:
    ten = 1
    while ten <= most:
        yield from (one * ten for one in _USUAL if one * ten <= most)
        ten *= 10
    yield most

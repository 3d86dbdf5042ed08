"""What commands print: lines, sizes, and the clock of a run."""

from polyak.compat.words import printable
from polyak.time import Timestamp, TimeUnit


def say(line: str) -> None:
    """Print a line to stdout.

    Args:
        line: The line. Control characters, which names from files can have, are escaped.
    """
    print(printable(line))


def clocks(timestamp: Timestamp) -> dict[TimeUnit, float]:
    """Return the clock of a run in all units that it counted.

    Args:
        timestamp: A moment after the start of the run.
    """
    readings = {unit: timestamp.elapsed(unit) for unit in TimeUnit if unit is not TimeUnit.DURATION}
    return {unit: value for unit, value in readings.items() if value}


def size(size_bytes: int) -> str:
    """Return a size as text for people.

    Args:
        size_bytes: The size, at least 0.

    Example:
        >>> size(512), size(1_536_000), size(98_765_432)
        ('512 B', '1.5 MB', '98.8 MB')
    """
    value = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"

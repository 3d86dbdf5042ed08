"""What commands print on stdout: sentences as wide as the terminal, sizes, and the clock of a run."""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from polyak.printable import printable
from polyak.report.columns import fields, table, wrapped
from polyak.time import Timestamp, TimeUnit

__all__ = ["clocks", "fields", "size", "table", "terminal_width", "to_json", "written"]

_LEAST = 20


def terminal_width() -> int:
    """Return the width of the terminal; the variable ``COLUMNS`` comes first, and 80 is for a file or a pipe."""
    return max(_LEAST, shutil.get_terminal_size((80, 24)).columns)


def written(*sentences: str) -> str:
    """Return sentences as lines for the terminal, each on a line of its own.

    Args:
        *sentences: Control characters, which names from files can have, are escaped.
    """
    return "\n".join(wrapped(printable(one), terminal_width()) for one in sentences)


def to_json(plain: Mapping[str, Any], *, one_line: bool = False) -> str:
    """Return an object as JSON. What is NaN or infinite becomes null.

    Args:
        plain: The object.
        one_line: Whether without line breaks.
    """
    return json.dumps(_finite(plain), indent=None if one_line else 2, ensure_ascii=True, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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

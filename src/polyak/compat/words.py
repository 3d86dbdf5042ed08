"""How names and values from files are shown: short, and without control characters for the terminal."""

from collections.abc import Iterable
from pathlib import PurePath

from polyak.printable import printable

__all__ = ["listed", "printable", "shown"]

_MOST = 6


def shown(value: object, most: int = 80) -> str:
    r"""Return a value as short text for an error or a note, with unprintable characters escaped.

    Args:
        value: Text, an error, a number, or a path, which is shown as a whole; of anything else only the kind is shown.
        most: How many characters are shown of text.

    Example:
        >>> shown("\x1b[2Jweight"), shown([1, 2]), shown(3.0)
        ('\\x1b[2Jweight', 'a list', '3.0')
    """
    if isinstance(value, PurePath):
        return printable(str(value))
    if isinstance(value, (str, bytes, BaseException)):
        text = str(value)[: most + 1]
    elif isinstance(value, float) or value is None or (isinstance(value, int) and abs(value) < 1 << 64):
        text = str(value)
    else:
        return f"a {type(value).__name__}"
    escaped = printable(text)
    return escaped if len(text) <= most else f"{escaped[:most]}..."


def listed(names: Iterable[object]) -> str:
    """Return the first names for an error or a note.

    Args:
        names: Any number of names.
    """
    given = list(names)
    return ", ".join(shown(name) for name in given[:_MOST]) + (", ..." if len(given) > _MOST else "")

"""Plain text for a terminal: sentences, fields and tables, as wide as the terminal is. Lines break at words only."""

import textwrap
from collections.abc import Sequence

_GAP = "  "
_LEAST = 12  # characters for a column of text; below that, each row becomes a block of lines


def wrapped(text: str, width: int, *, first: str = "", rest: str | None = None) -> str:
    """Return text in lines of at most ``width`` characters. A word that is longer has a line of its own.

    Args:
        text: Words; line breaks in it are spaces.
        width: The width of the terminal.
        first: What the first line begins with.
        rest: What the other lines begin with; None for as many spaces as ``first`` has characters.

    Example:
        >>> print(wrapped("one two three", 12, first="- "))
        - one two
          three
    """
    rest = " " * len(first) if rest is None else rest
    lines = textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(lines) or first.rstrip()


def fields(rows: Sequence[tuple[str, str]], width: int) -> str:
    """Return names and their values, one below the other.

    Args:
        rows: The pairs.
        width: The width of the terminal.

    Example:
        >>> print(fields([("format", "safetensors"), ("size", "2 kB")], 80))
        format  safetensors
        size    2 kB
    """
    longest = max((len(name) for name, _ in rows), default=0)
    if width - longest - len(_GAP) < _LEAST:
        return "\n".join(f"{name}\n{wrapped(value, width, first=_GAP)}" for name, value in rows)
    return "\n".join(wrapped(value, width, first=f"{name.ljust(longest)}{_GAP}") for name, value in rows)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], width: int, *, text: int = 0) -> str:
    """Return a table, or, where the terminal is too narrow for it, a block of lines for each row.

    Args:
        headings: One for each column; "" for a column that needs none.
        rows: Their cells. All columns but ``text`` and the first are flush right.
        width: The width of the terminal.
        text: The column whose cells may be broken into several lines.

    Example:
        >>> print(table(["weights", "loss"], [["raw", "0.71"], ["half-life 10ba", "0.6"]], 80))
        weights         loss
        --------------------
        raw             0.71
        half-life 10ba   0.6
    """
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    spare = width - sum(widths) - len(_GAP) * (len(widths) - 1)
    if spare < 0:
        room = widths[text] + spare
        if room < min(_LEAST, widths[text]):
            return "\n".join(_block(headings, row, width) for row in rows)
        longest = max((len(word) for row in (headings, *rows) for word in row[text].split()), default=0)
        if longest > room:
            return "\n".join(_block(headings, row, width) for row in rows)
        widths[text] = room
    lines = [*_lines(headings, widths, text), "-" * (sum(widths) + len(_GAP) * (len(widths) - 1))]
    for row in rows:
        lines += _lines(row, widths, text)
    return "\n".join(lines)


def _lines(row: Sequence[str], widths: Sequence[int], text: int) -> list[str]:
    """Return the lines of a row: one, or as many as the cell with text needs."""
    parts = wrapped(row[text], widths[text]).splitlines() or [""]
    lines: list[str] = []
    for number, part in enumerate(parts):
        cells = [part if i == text else cell if number == 0 else "" for i, cell in enumerate(row)]
        aligned = [
            cell.ljust(size) if i in {0, text} else cell.rjust(size)
            for i, (cell, size) in enumerate(zip(cells, widths, strict=True))
        ]
        lines.append(_GAP.join(aligned).rstrip())
    return lines


def _block(headings: Sequence[str], row: Sequence[str], width: int) -> str:
    rest = [(heading, cell) for heading, cell in zip(headings[1:], row[1:], strict=True) if cell]
    inner = fields(rest, width - len(_GAP))
    title = f"{headings[0]} {row[0]}" if row[0].isdigit() else row[0]
    return "\n".join([wrapped(title, width), *(f"{_GAP}{line}" for line in inner.splitlines())])

"""The progress of a command, on stderr."""

import sys

from polyak.cli.output import terminal_width
from polyak.printable import printable

_STEP = 0.1  # of the work, between two lines


class Progress:
    """One line that changes on a terminal, elsewhere a line for every tenth of the work; for a ``with`` block.

    Args:
        name: What the lines begin with.
        lines: Whether to write lines where there is no terminal.
    """

    def __init__(self, name: str, *, lines: bool = True) -> None:
        self._name = name
        self._lines = lines
        self._terminal = sys.stderr.isatty()
        self._shown = -1.0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal and self._shown >= 0:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def show(self, done: int, total: int, name: str) -> None:
        """Show the progress.

        Args:
            done: The number of evaluations that are done.
            total: The largest number of evaluations.
            name: The name of the next one.
        """
        share = done / total
        line = printable(f"{self._name}: {share:4.0%}, {done} of at most {total} done; now {name}")
        if self._terminal:
            self._shown = share
            sys.stderr.write(f"\r\x1b[K{line[: terminal_width() - 1]}")
        elif self._lines and share >= self._shown + _STEP - 1e-9:
            self._shown = share
            sys.stderr.write(f"{line}\n")
        sys.stderr.flush()

"""What commands print on stderr: errors, notes, and the traceback of a user's error."""

import importlib
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import TextIO

from polyak.cli.output import terminal_width
from polyak.errors import PlanWarning, QuarantineWarning
from polyak.printable import printable
from polyak.report.columns import wrapped

_OURS = (str(Path(__file__).parents[1]), str(Path(importlib.__file__).parent), "<frozen ")


def tell(message: str) -> None:
    """Write a message to stderr: as wide as the terminal, and as one line where there is none.

    Args:
        message: Line breaks in it are spaces.
    """
    line = printable(" ".join(message.split()))
    if sys.stderr.isatty() or "COLUMNS" in os.environ:
        line = wrapped(line, terminal_width(), rest="  ")
    sys.stderr.write(line + "\n")


def tell_traceback(error: BaseException) -> None:
    """Write the traceback of an error in a function of the user, from the first line of their code on.

    Args:
        error: The error.
    """
    shown = traceback.TracebackException.from_exception(error)
    frames = list(shown.stack)
    first = next((i for i, frame in enumerate(frames) if not frame.filename.startswith(_OURS)), len(frames))
    if first == len(frames) and not isinstance(error, SyntaxError):
        return  # not in their code: the message says what it is
    shown.stack = traceback.StackSummary.from_list(frames[first:])
    for line in "".join(shown.format()).splitlines():
        sys.stderr.write(printable(line) + "\n")


def show_warning(  # noqa: PLR0917  the signature of warnings.showwarning
    name: str,
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Write a warning to stderr, one of polyak as a note.

    Args:
        name: The name of the command.
        message: As for ``warnings.showwarning``.
        category: As for ``warnings.showwarning``.
        filename: As for ``warnings.showwarning``.
        lineno: As for ``warnings.showwarning``.
        file: Not used.
        line: As for ``warnings.showwarning``.
    """
    del file
    if issubclass(category, PlanWarning | QuarantineWarning):
        tell(f"{name}: note: {message}")
    else:
        for one in warnings.formatwarning(message, category, filename, lineno, line).splitlines():
            sys.stderr.write(printable(one) + "\n")


def in_words(error: OSError) -> str:
    """Return an error of the system as a sentence, without numbers and temporary names.

    Args:
        error: Any error.
    """
    reason = error.strerror or str(error)
    name = None if error.filename is None else Path(os.fsdecode(error.filename))
    return reason if name is None else f"{name.parent if name.name.startswith('.') else name}: {reason}"

"""What every command has, and how it reads its arguments."""

import importlib.util
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Mapping
from typing import Protocol

from polyak.compat.words import printable
from polyak.errors import PolyakError, TimeError
from polyak.time import Time, TimeUnit


class Command(Protocol):
    """The members of a command's module. To add a command, write one and put it in ``polyak.cli.COMMANDS``.

    The first line of its docstring is what ``polyak --help`` says of it.
    """

    @property
    def NAME(self) -> str:  # noqa: N802  a constant of the module
        """What comes after ``polyak``."""
        ...

    def configure(self, parser: ArgumentParser) -> None:
        """Add the arguments, and the examples below them.

        Args:
            parser: Of this command.
        """
        ...

    def run(self, arguments: Namespace) -> int:
        """Do what was asked, and return the exit code.

        Args:
            arguments: As parsed.
        """
        ...


REFUSED = 2  # the exit code


class UsageError(PolyakError, ValueError):
    """What was asked cannot be done; the message is one line."""


def say(line: str) -> None:
    """Write a line for people to stdout.

    Args:
        line: With names and values out of files, too: what a terminal would obey in it is escaped.
    """
    print(printable(line))


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return a reader of whole numbers, for ``type=``.

    Args:
        least: The smallest that is accepted.
        most: The largest, if there is one.
    """
    bounds = f"of at least {least}" if most is None else f"from {least} to {most}"

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            raise ArgumentTypeError(f"it must be a whole number {bounds} (got {text!r})")
        return value

    return read


def span(units: Mapping[TimeUnit, str]) -> Callable[[str], Time]:
    """Return a reader of spans that are finite and above 0, for ``type=``.

    Args:
        units: Those that are accepted, each with an example.
    """

    def read(text: str) -> Time:
        try:
            time = Time.from_timestring(text)
        except TimeError:
            time = None
        if time is None or time.unit not in units or not 0 < time.value < float("inf"):
            examples = " or ".join(", ".join(units.values()).rsplit(", ", 1))
            raise ArgumentTypeError(f"it must be a time above 0, such as {examples} (got {text!r})")
        return time

    return read


def require(extra: str, packages: Mapping[str, str]) -> None:
    """See that the packages of an extra are installed.

    Args:
        extra: What to install if they are not.
        packages: What each is called on PyPI, by the name under which it is imported.

    Raises:
        UsageError: If one is missing.
    """
    missing = [package for module, package in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UsageError(
            f"this command needs {', '.join(packages.values())} (missing: {', '.join(missing)}); install what it needs "
            f"with: pip install 'polyak[{extra}]'"
        )

"""The members of a command, and the parsers of its arguments."""

import importlib.util
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Mapping
from typing import Protocol

from polyak.errors import PolyakError, TimeError
from polyak.time import Time, TimeUnit


class Command(Protocol):
    """The members of a command's module. To add a command, write a module and add it to ``polyak.cli.COMMANDS``.

    The first line of the module's docstring is its line in ``polyak --help``.
    """

    @property
    def NAME(self) -> str:  # noqa: N802  a constant of the module
        """The word after ``polyak``."""
        ...

    def configure(self, parser: ArgumentParser) -> None:
        """Add the arguments and the examples to a parser.

        Args:
            parser: The parser of this command.
        """
        ...

    def run(self, arguments: Namespace) -> int:
        """Run the command; return the exit code.

        Args:
            arguments: The parsed arguments.
        """
        ...


REFUSED = 2  # the exit code


class UsageError(PolyakError, ValueError):
    """The arguments do not allow the command to run; the message is one line."""


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return a parser of whole numbers for ``type=`` of an argument.

    Args:
        least: The smallest valid number.
        most: The largest valid number; None for no limit.
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
    """Return a parser of finite times above 0 for ``type=`` of an argument.

    Args:
        units: The valid units, each with an example.
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
    """Check that the packages of an extra are installed.

    Args:
        extra: The extra that installs them.
        packages: Their names on PyPI, by the name of the module.

    Raises:
        UsageError: If a package is missing.
    """
    missing = [package for module, package in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UsageError(
            f"this command needs {', '.join(packages.values())} (missing: {', '.join(missing)}); install with: "
            f"pip install 'polyak[{extra}]'"
        )

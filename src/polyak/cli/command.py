"""The members of a command, and the parsers of its arguments."""

import importlib.util
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from polyak.errors import PolyakError, TimeError
from polyak.time import Time, TimeUnit


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command prints on stdout: the text, or with ``--json`` the object.

    Args:
        text: The text for people, with the line breaks of the terminal.
        plain: For programs. It has the keys of the command's ``JSON``.
        one_line: Whether the object is printed on one line, since others follow.
    """

    text: str
    plain: Mapping[str, Any]
    one_line: bool = False


class Command(Protocol):
    """The members of a command's module. To add a command, write a module and add it to ``polyak.cli.COMMANDS``.

    The first line of the module's docstring is its line in ``polyak --help``. A module imports torch, and what does,
    when it runs: the help needs neither.
    """

    @property
    def NAME(self) -> str:  # noqa: N802  a constant of the module
        """The word after ``polyak``."""
        ...

    @property
    def JSON(self) -> Mapping[str, str]:  # noqa: N802
        """What the object of ``--json`` has, by key."""
        ...

    def configure(self, parser: ArgumentParser) -> None:
        """Add the arguments and the examples to a parser.

        Args:
            parser: The parser of this command.
        """
        ...

    def run(self, arguments: Namespace) -> Answer | Iterator[Answer] | None:
        """Run the command; return what it prints, one after another if it is several; None on ranks but rank 0.

        Args:
            arguments: The parsed arguments.
        """
        ...


REFUSED = 2  # the exit code


class UsageError(PolyakError, ValueError):
    """The arguments do not allow the command to run."""


class UserCodeError(UsageError):
    """A function of the user failed: the error that it raised is the cause of this one."""


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


def one_of(words: Sequence[str]) -> Callable[[str], str]:
    """Return a parser of a word out of a few for ``type=`` of an argument.

    Args:
        words: The valid ones.
    """

    def read(text: str) -> str:
        if text not in words:
            raise ArgumentTypeError(f"it must be {either(words)} (got {text!r})")
        return text

    return read


def either(words: Sequence[str]) -> str:
    """Return words as an enumeration.

    Args:
        words: At least one.

    Example:
        >>> either(["a", "b", "c"])
        'a, b or c'
    """
    return " or ".join(", ".join(words).rsplit(", ", 1))


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
            raise ArgumentTypeError(f"it must be a time above 0, such as {either(list(units.values()))} (got {text!r})")
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
    missing = [package for module, package in packages.items() if not installed(module)]
    if missing:
        raise UsageError(
            f"this command needs {', '.join(packages.values())} (missing: {', '.join(missing)}); install with: "
            f"pip install 'polyak[{extra}]'"
        )


def installed(module: str) -> bool:
    """Return whether a package can be imported, without importing it.

    Args:
        module: Its name.
    """
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # `sys.modules` has no specification for it
        return False

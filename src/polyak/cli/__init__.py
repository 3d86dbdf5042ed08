"""The command ``polyak``: one file per command. A command reads arguments, calls the library and prints."""

import argparse
import io
import sys
import textwrap
import warnings
from collections.abc import Sequence
from functools import partial
from typing import NoReturn, TextIO

import polyak
from polyak.cli import average, convert, demo, inspect, plan, reconstruct, sweep
from polyak.cli.command import REFUSED, Command
from polyak.compat.words import printable
from polyak.errors import PlanWarning, PolyakError, QuarantineWarning

COMMANDS: tuple[Command, ...] = (average, convert, demo, inspect, plan, reconstruct, sweep)

_INTERRUPTED = 130  # 128 plus the number of SIGINT, as in shells


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(REFUSED, printable(f"{self.prog}: {message}; see {self.prog} --help") + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="polyak",
        description=textwrap.fill(polyak.__doc__ or "", 79),
        epilog="To try it on real data, in a minute on any computer:\n  polyak demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"polyak {polyak.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command")
    for command in COMMANDS:
        summary, _, rest = (command.__doc__ or "").partition("\n")
        one = commands.add_parser(
            command.NAME,
            help=summary.rstrip("."),
            description=f"{summary}\n{rest}".strip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.configure(one)
        one.set_defaults(run=command.run, refuse=one.error)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code: 0, 2 after an error (printed as one line), 130 after Ctrl-C.

    Args:
        argv: The arguments; None for those of the process.
    """
    parser = _parser()
    arguments, unknown = parser.parse_known_args(argv)
    if arguments.command is None:
        if unknown:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        parser.print_help()
        return 0
    if unknown:
        arguments.refuse(f"unrecognized arguments: {' '.join(unknown)}")
    name = f"polyak {arguments.command}"

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names can have characters outside its encoding
            stream.reconfigure(errors="backslashreplace")
    with warnings.catch_warnings():
        warnings.showwarning = partial(_show_warning, name)
        for category in (PlanWarning, QuarantineWarning):
            warnings.simplefilter("always", category)
        try:
            return arguments.run(arguments)
        except (PolyakError, OSError) as error:
            _say(f"{name}: {error}")
            return REFUSED
        except (MemoryError, RecursionError) as error:
            limit = "needs more memory than there is" if isinstance(error, MemoryError) else "is nested too deeply"
            _say(f"{name}: a file must have a size that can be read (one {limit}); check that it is the right file")
            return REFUSED
        except KeyboardInterrupt:
            _say(f"{name}: interrupted; run the same command again to resume")
            return _INTERRUPTED


def _say(message: str) -> None:
    """Write a message as one line."""
    sys.stderr.write(printable(" ".join(message.split())) + "\n")


def _show_warning(  # noqa: PLR0917  the signature of warnings.showwarning
    name: str,
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Write a warning to stderr, those of polyak as one line."""
    del file
    if issubclass(category, PlanWarning | QuarantineWarning):
        _say(f"{name}: note: {message}")
    else:
        lines = warnings.formatwarning(message, category, filename, lineno, line).splitlines()
        sys.stderr.write("".join(f"{printable(one)}\n" for one in lines))

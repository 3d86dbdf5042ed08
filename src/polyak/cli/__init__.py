"""The command ``polyak``: one file per command. A command reads arguments, calls the library and answers.

Nothing here imports torch before a command runs, so that the help is there in an instant.
"""

import argparse
import io
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import partial
from pathlib import Path

import polyak
from polyak.cli import average, convert, demo, diff, env, inspect, plan, recommend, reconstruct, soup, sweep, watch
from polyak.cli.command import REFUSED, Answer, Command, UserCodeError, either
from polyak.cli.messages import in_words, show_warning, tell, tell_traceback
from polyak.cli.output import to_json
from polyak.cli.parser import Formatter, Parser, meant
from polyak.errors import PlanWarning, PolyakError, QuarantineWarning

COMMANDS: tuple[Command, ...] = (
    average,
    convert,
    demo,
    diff,
    env,
    inspect,
    plan,
    recommend,
    reconstruct,
    soup,
    sweep,
    watch,
)

_INTERRUPTED = 130  # 128 plus the number of SIGINT, as in shells
_RESUMABLE = (average.NAME, demo.NAME, sweep.NAME)

_EPILOG = """\
examples:
  polyak demo                   train a small model and see what averaging does
  polyak sweep --help           choose the half-life of a run that was recorded
"""


def _summary() -> str:
    return (polyak.__doc__ or "").partition("\n\n")[0]


def _parser() -> Parser:
    parser = Parser(
        prog="polyak", description=_summary(), epilog=_EPILOG, formatter_class=Formatter, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"polyak {polyak.__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", prog=parser.prog)
    for command in COMMANDS:
        summary, _, rest = (command.__doc__ or "").partition("\n")
        one = commands.add_parser(
            command.NAME,
            help=summary.rstrip("."),
            description=f"{summary}\n{rest}".strip(),
            formatter_class=Formatter,
            allow_abbrev=False,
        )
        command.configure(one)
        one.add_argument("--json", action="store_true", help="print one JSON object, for programs; see below")
        keys = "\n".join(f"  {key:<16}  {meaning}" for key, meaning in command.JSON.items())
        one.epilog = f"{(one.epilog or '').rstrip()}\n\nthe object of --json:\n{keys}"
        one.set_defaults(run=command.run, parser=one)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code: 0, 2 after an error, 130 after Ctrl-C.

    Args:
        argv: The arguments; None for those of the process.
    """
    with _open_streams():
        return _main(argv)


@contextmanager
def _open_streams() -> Iterator[None]:
    """Open stdout and stderr for a ``with`` block, where they are closed, as some schedulers do."""
    closed = [name for name in ("stdout", "stderr") if getattr(sys, name) is None]
    with Path(os.devnull).open("w") as nowhere:
        for name in closed:
            setattr(sys, name, nowhere)
        try:
            yield
        finally:
            for name in closed:
                setattr(sys, name, None)


def _main(argv: Sequence[str] | None) -> int:
    arguments = _parsed(_parser(), sys.argv[1:] if argv is None else argv)
    if arguments is None:
        return 0
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names can have characters outside its encoding
            stream.reconfigure(errors="backslashreplace")
    name = f"polyak {arguments.command}"
    with warnings.catch_warnings():
        warnings.showwarning = partial(show_warning, name)
        for category in (PlanWarning, QuarantineWarning):
            warnings.simplefilter("always", category)
        return _run(arguments, name)


def _parsed(parser: Parser, argv: Sequence[str]) -> argparse.Namespace | None:
    """Return the arguments; None after the help was printed."""
    names = [command.NAME for command in COMMANDS]
    first = next((one for one in argv if not one.startswith("-")), None)
    if first is not None and first not in names and argv[0] == first:
        hint = meant(first, names)
        parser.error(f"COMMAND must be {either(names)} (got {first!r}{hint and f'; {hint}'})")
    if dashed := next((one for one in argv if one.startswith("-") and os.path.lexists(one)), None):
        parser.error(f"a path that begins with - must be written ./{dashed} (got {dashed})")
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        (parser if arguments.command is None else arguments.parser).unrecognized(unknown)
    if arguments.command is None:
        parser.print_help()
        return None
    return arguments


def _run(arguments: argparse.Namespace, name: str) -> int:
    try:
        for answer in _answers(arguments):
            print(to_json(answer.plain, one_line=answer.one_line) if arguments.json else answer.text, flush=True)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except PolyakError as error:
        if not _is_told_elsewhere(error):
            _tell_users_error(error)
            tell(f"{name}: {error}")
        return REFUSED
    except OSError as error:
        tell(f"{name}: {in_words(error)}")
        return REFUSED
    except (MemoryError, RecursionError) as error:
        limit = "needs more memory than there is" if isinstance(error, MemoryError) else "is nested too deeply"
        tell(f"{name}: a file must have a size that can be read (one {limit}); check that it is the right file")
        return REFUSED
    except KeyboardInterrupt:
        resume = "; run the same command again to resume" if arguments.command in _RESUMABLE else ""
        tell(f"{name}: interrupted{resume}")
        return _INTERRUPTED
    return 0


def _answers(arguments: argparse.Namespace) -> Iterator[Answer]:
    """Yield what a command prints: one answer, or one after another as long as it runs."""
    # Functions of the user may print: with --json, stdout has the object alone.
    quiet = partial(redirect_stdout, sys.stderr) if arguments.json else nullcontext
    with quiet():
        found = arguments.run(arguments)
    if not isinstance(found, Iterator):
        yield from () if found is None else (found,)
        return
    while True:
        with quiet():
            answer = next(found, None)
        if answer is None:
            return
        yield answer


def _is_told_elsewhere(error: PolyakError) -> bool:
    """Return whether another rank of torchrun prints the error."""
    from polyak.sweeping.workers import is_of_another_rank

    return is_of_another_rank(error)


def _tell_users_error(error: PolyakError) -> None:
    """Write the traceback of the error in a function of the user, if that is the cause."""
    from polyak.sweeping.results import EvaluationError

    if isinstance(error, EvaluationError | UserCodeError) and error.__cause__ is not None:
        tell_traceback(error.__cause__)

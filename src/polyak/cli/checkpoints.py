"""The arguments of commands that read checkpoints of any library."""

import glob
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from polyak.cli.command import UsageError

if TYPE_CHECKING:
    from polyak.checkpoints import Checkpoint


def add_checkpoints(parser: ArgumentParser) -> None:
    """Add the argument CKPT, which may be given several times.

    Args:
        parser: The parser of a command.
    """
    parser.add_argument("checkpoints", nargs="+", metavar="CKPT", help="a checkpoint, or a pattern such as 'run/*.pt'")


def add_place(parser: ArgumentParser) -> None:
    """Add the arguments that say where the weights are in a checkpoint.

    Args:
        parser: The parser of a command.
    """
    parser.add_argument("--key", metavar="KEY", help="where the weights are in a file, such as model or ema")
    parser.add_argument("--prefix", metavar="PREFIX", help="take the tensors whose names begin so, such as teacher.")


def add_direction(parser: ArgumentParser) -> None:
    """Add the arguments that say which values of a metric are better.

    Args:
        parser: The parser of a command.
    """
    sense = parser.add_mutually_exclusive_group()
    sense.add_argument(
        "--minimize", "--min", action="store_true", help="lower is better (default for a loss, an error, a perplexity)"
    )
    sense.add_argument("--maximize", "--max", action="store_true", help="higher is better, as for an accuracy")


def maximize_of(arguments: Namespace, metric: str, function: str = "") -> bool:
    """Return whether a higher value of a metric is better.

    Args:
        arguments: The parsed arguments, with those of `add_direction`.
        metric: Its name.
        function: The name of the function that returns it.

    Raises:
        PolyakError: If neither the arguments nor the name say it.
    """
    from polyak.sweeping.direction import direction

    return direction(metric, function, maximize=True if arguments.maximize else False if arguments.minimize else None)


def open_all(arguments: Namespace) -> "list[Checkpoint]":
    """Open the checkpoints, those of a pattern in natural order.

    Args:
        arguments: The parsed arguments, with those of `add_checkpoints` and `add_place`.

    Raises:
        UsageError: If a pattern matches nothing, or a checkpoint is given twice.
        CheckpointError: If one cannot be read safely.
    """
    from polyak.checkpoints import open_checkpoint

    allow_many_files()
    return [open_checkpoint(path, arguments.key, arguments.prefix) for path in _expanded(arguments.checkpoints)]


def require_new(output: Path, *, force: bool) -> None:
    """See that an output is new, or may be replaced.

    Args:
        output: A file or a folder.
        force: Whether a file may be replaced.

    Raises:
        UsageError: If it is not so.
    """
    is_empty = output.is_dir() and not any(output.iterdir())
    if output.exists() and not is_empty and not (force and output.is_file()):
        said = "a folder that has files; choose another" if output.is_dir() else "there; choose another, or add --force"
        raise UsageError(f"-o must be new (got {output}, which is {said})")


@contextmanager
def writing(output: Path) -> Iterator[None]:
    """Let errors of the disk in a ``with`` block name the output, and not a temporary file.

    Args:
        output: A file or a folder.

    Raises:
        OSError: In place of one.
    """
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(output)) from error


def allow_many_files() -> None:
    """Let the process open as many files as the system allows: each checkpoint may be many."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _expanded(given: Sequence[str]) -> list[Path]:
    """Return the paths that were given, those of a pattern in natural order."""
    from polyak.checkpoints.moments import in_natural_order
    from polyak.checkpoints.patterns import matching
    from polyak.compat.words import listed

    found = list[Path]()
    for one in given:
        inside = [Path(one)] if Path(one).exists() or not glob.has_magic(one) else matching(one)
        if not inside:
            raise UsageError(f"a pattern must match checkpoints ({one} matches none); check the path")
        found += sorted(inside, key=in_natural_order)
    real = [_identity(path) for path in found]
    if twice := [path for i, path in enumerate(found) if real[i] in real[:i]]:
        raise UsageError(f"each checkpoint must be given once (twice: {listed(twice)}); leave one out")
    return found


def _identity(path: Path) -> object:
    """Return what is the same for two names of one file or folder: links, symbolic or hard, are followed."""
    try:
        found = path.stat()
    except OSError:
        return os.path.realpath(path)  # to open it says what is wrong
    return (found.st_dev, found.st_ino) if found.st_ino else os.path.realpath(path)

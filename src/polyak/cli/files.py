"""The files that commands write: a suffix says the format, and nothing is overwritten without being asked."""

import os
from argparse import ArgumentParser
from pathlib import Path

from polyak.cli.command import UsageError

SUFFIX = ".safetensors"
_WRITTEN = set[Path]()  # by this process: a program that calls commands in a loop may write one file again and again


def add_output(parser: ArgumentParser) -> None:
    """Add the arguments ``-o`` and ``--force``.

    Args:
        parser: The parser of a command.
    """
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="the safetensors file to write")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")


def note_written(output: Path) -> None:
    """Remember a file that a command has written: the same process may replace it.

    Args:
        output: The file.
    """
    _WRITTEN.add(Path(os.path.realpath(output)))


def check_output(output: Path, *, force: bool, source: Path) -> None:
    """Check that a file can be written.

    Args:
        output: The file.
        force: Whether an existing one is replaced.
        source: What the command reads, a file or a folder, which must stay as it is.

    Raises:
        UsageError: If it cannot.
    """
    # Path.resolve would raise for links in a circle.
    at, to = Path(os.path.realpath(source)), Path(os.path.realpath(output))
    if output.is_dir():
        raise UsageError(f"-o must be a file, not a folder (got {output}); add the name of a file to it")
    if to == at or (source.is_dir() and at in to.parents):
        raise UsageError(f"-o must not be the input or in its folder (got {output}); choose another file")
    if output.suffix != SUFFIX:
        raise UsageError(f"-o must end in {SUFFIX}, the only format that is written (got {output}); choose that name")
    if not output.parent.is_dir():
        raise UsageError(f"-o must be in a folder that exists (there is no folder {output.parent}); make it first")
    if output.exists() and not output.is_file():
        raise UsageError(f"-o must be a regular or new file (got {output}); choose another")
    if output.exists() and not force and to not in _WRITTEN:
        raise UsageError(f"-o must be a new file ({output} exists); choose another, or add --force to replace it")

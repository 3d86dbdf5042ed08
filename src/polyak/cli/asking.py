"""The arguments of commands that read a record: the record, and profiles."""

from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyak.cli.command import UsageError
from polyak.cli.output import size
from polyak.errors import PolyakError
from polyak.profiles import NamedProfile, forms, options, parse, parse_words

if TYPE_CHECKING:
    from polyak.record import Record

_MOST_MANIFEST_BYTES = 64_000_000


def add_record(parser: ArgumentParser) -> None:
    """Add the argument RECORD.

    Args:
        parser: The parser of a command.
    """
    parser.add_argument("record", type=Path, metavar="RECORD", help="the folder that a Recorder wrote")


def open_record(folder: Path) -> "Record":
    """Open a record in a folder that can contain anything.

    Args:
        folder: The folder.

    Raises:
        UsageError: If it is a file, or the manifest is not a file, or is far too large.
        RecordError: If there is no record, or it is not valid.
    """
    from polyak.record import Record
    from polyak.record.manifest import MANIFEST

    if folder.exists() and not folder.is_dir():
        raise UsageError(f"RECORD must be a folder ({folder} is a file); give the folder that a Recorder wrote")
    manifest = folder / MANIFEST
    if manifest.exists() and not (manifest.is_file() and manifest.stat().st_size <= _MOST_MANIFEST_BYTES):
        raise UsageError(
            f"a record's {MANIFEST} must be a file of at most {size(_MOST_MANIFEST_BYTES)} (it is not in {folder}); "
            "give the folder that a Recorder wrote"
        )
    return Record(folder)


def profile_of(form: str) -> Callable[[str], NamedProfile]:
    """Return a parser of profiles for ``type=`` of an argument.

    Args:
        form: The name of the form.
    """

    def read(text: str) -> NamedProfile:
        try:
            return parse(form, text)
        except PolyakError as error:
            raise ArgumentTypeError(str(error)) from None
        except ValueError:
            raise ArgumentTypeError(f"it must be a number (got {text!r})") from None

    return read


def add_profiles(group: Any) -> None:
    """Add an option for each kind of profile, and one for any in words.

    Args:
        group: Of options that exclude each other, of a parser.
    """
    for form in options():
        group.add_argument(
            f"--{form.name}", dest="profile", type=profile_of(form.name), metavar=form.metavar, help=form.help
        )
    group.add_argument(
        "--profile",
        dest="profile",
        type=_profile_in_words,
        metavar="WORDS",
        help="any of these in words, such as 'cooldown 20%%, 1-sqrt, floor 0.1, snap'",
    )


def _profile_in_words(text: str) -> NamedProfile:
    try:
        return parse_words(text)
    except PolyakError as error:
        raise ArgumentTypeError(str(error)) from None
    except ValueError:
        raise ArgumentTypeError(f"its value must be a number (got {text!r})") from None


def half_lives(text: str) -> list[NamedProfile]:
    """Parse half-lives separated by commas, for ``type=`` of an argument.

    Args:
        text: Such as ``10ba,100ba``.
    """
    return [profile_of("unbiased")(part) for part in text.split(",")]


def profiles(text: str) -> list[NamedProfile]:
    """Parse profiles separated by commas, for ``type=`` of an argument.

    Args:
        text: Such as ``half-life=500ba,window=10ep,power=0.1``.

    Raises:
        ArgumentTypeError: If a profile has no such form or no value, or the value cannot be parsed.
    """
    found: list[NamedProfile] = []
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in forms() or not value:
            raise ArgumentTypeError(
                f"it must be profiles such as window=10ep,power=0.1 (got {part!r}); there are {', '.join(forms())}"
            )
        found.append(profile_of(name)(value))
    return found

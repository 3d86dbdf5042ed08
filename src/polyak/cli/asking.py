"""The arguments of commands that read a record: the record, and profiles."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyak.cli.command import UsageError, whole
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
    parser.add_argument(
        "record",
        type=Path,
        metavar="RECORD",
        help="the folder that a Recorder wrote, a folder of checkpoints of another library, or a pattern such as "
        "'run/*.pt'",
    )
    group = parser.add_argument_group("checkpoints of another library")
    group.add_argument(
        "--stored",
        type=profiles,
        metavar="LIST",
        help="the profiles of the averages in them, where the files do not say them, such as half-life=1000ba or "
        "power=0.05,power=0.28",
    )
    group.add_argument("--update-every", type=whole(1), metavar="N", help="steps between two updates, of PostHocEMA")
    group.add_argument("--step-size-correction", action="store_true", help="nitrous-ema's option of that name was on")
    group.add_argument("--batch-size", type=whole(1), metavar="N", help="images in a batch, of EDM2")
    group.add_argument("--key", metavar="KEY", help="where the weights are in a file, such as model or ema")
    group.add_argument("--prefix", metavar="PREFIX", help="take the tensors whose names begin so, such as teacher.")


def open_record(folder: Path, arguments: Namespace | None = None) -> "Record":
    """Open a record in a folder that can contain anything.

    Args:
        folder: The folder, or a pattern of checkpoints.
        arguments: The parsed arguments, with those of `add_record`; None for a record that a Recorder wrote.

    Raises:
        UsageError: If it is a file, or the manifest is not a file, or is far too large.
        RecordError: If there is no record, or it is not valid.
        CheckpointError: If checkpoints cannot be read safely, or are not of one run.
    """
    if arguments is not None and (found := _of_checkpoints(folder, arguments)) is not None:
        return found
    if not folder.exists():
        raise UsageError(f"RECORD must be there (there is no {folder}); check the path")
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


def _of_checkpoints(folder: Path, arguments: Namespace) -> "Record | None":
    from polyak.checkpoints.series import holds_checkpoints
    from polyak.cli.checkpoints import allow_many_files
    from polyak.record import Record
    from polyak.record.manifest import MANIFEST

    names = ("stored", "update_every", "step_size_correction", "batch_size", "key", "prefix")
    given = {name: value for name in names if (value := getattr(arguments, name))}
    if (folder / MANIFEST).exists() or not holds_checkpoints(folder):
        if given:
            option = f"--{next(iter(given)).replace('_', '-')}"
            raise UsageError(
                f"{option} must be for checkpoints of another library ({folder} has none in it); leave it out, or give "
                "their folder"
            )
        return None
    allow_many_files()
    return Record.from_checkpoints(folder, **given)


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
        group: A group of options that exclude each other, of a parser.
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

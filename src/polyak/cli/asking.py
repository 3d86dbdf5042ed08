"""How commands that read a record are asked: which profile, which moment, which function of the user's."""

import importlib
import importlib.util
import sys
import traceback
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from polyak.cli.command import UsageError
from polyak.errors import PolyakError
from polyak.profiles import HalfLife, PowerFunction, Profile, Smoothing, Uniform, Window
from polyak.record import Record
from polyak.record.manifest import MANIFEST
from polyak.time import Timestamp, TimeUnit

_MOST_MANIFEST_BYTES = 64_000_000
_PROFILES: Mapping[str, Callable[[str], Profile]] = {
    "half-life": HalfLife,
    "unbiased": lambda text: HalfLife(text, unbiased=True),
    "window": Window,
    "uniform-from": Uniform,
    "power": lambda text: PowerFunction(float(text)),
    "smoothing": lambda text: Smoothing(float(text)),
}


def add_record(parser: ArgumentParser) -> None:
    """Add the argument RECORD.

    Args:
        parser: Of a command.
    """
    parser.add_argument("record", type=Path, metavar="RECORD", help="the folder that a Recorder wrote")


def open_record(folder: Path) -> Record:
    """Open a record that may be anything.

    Args:
        folder: Where it is.

    Raises:
        UsageError: If what should be its manifest is no file, or far too large for one.
        RecordError: If there is no record, or it is not as it must be.
    """
    manifest = folder / MANIFEST
    if manifest.exists() and not (manifest.is_file() and manifest.stat().st_size <= _MOST_MANIFEST_BYTES):
        raise UsageError(
            f"a record's {MANIFEST} must be a file of at most {size(_MOST_MANIFEST_BYTES)} (not so in {folder}); give "
            "the folder that a Recorder wrote"
        )
    return Record(folder)


def profile_of(name: str) -> Callable[[str], Profile]:
    """Return a reader of profiles, for ``type=``.

    Args:
        name: Of the kind of profile.
    """

    def read(text: str) -> Profile:
        try:
            return _PROFILES[name](text)
        except PolyakError as error:
            raise ArgumentTypeError(str(error)) from None
        except ValueError:
            raise ArgumentTypeError(f"it must be a number (got {text!r})") from None

    return read


def half_lives(text: str) -> list[Profile]:
    """Read half-lives between commas, for ``type=``.

    Args:
        text: As ``10ba,100ba``.
    """
    return [profile_of("unbiased")(part) for part in text.split(",")]


def profiles(text: str) -> list[Profile]:
    """Read profiles between commas, for ``type=``.

    Args:
        text: As ``half-life=500ba,window=10ep,power=0.1``.
    """
    found: list[Profile] = []
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in _PROFILES or not value:
            raise ArgumentTypeError(
                f"it must be profiles such as window=10ep,power=0.1 (got {part!r}); there are {', '.join(_PROFILES)}"
            )
        found.append(profile_of(name)(value))
    return found


def load_function(spec: str, option: str) -> Callable[..., Any]:
    """Import a function of the user's.

    Args:
        spec: ``FILE.py:FUNCTION`` or ``package.module:FUNCTION``.
        option: That it was given to, to name it in errors.

    Raises:
        UsageError: If it cannot be imported, or there is no such function.
    """
    source, _, name = spec.rpartition(":")
    if not source or not name:
        raise UsageError(f"{option} must be FILE.py:FUNCTION or package.module:FUNCTION (got {spec!r})")
    try:
        module = _load_file(Path(source), option) if source.endswith(".py") else _load_module(source)
    except UsageError:
        raise
    except Exception as error:  # whatever the user's file does
        last = traceback.format_exception_only(error)[-1].strip()
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise UsageError(
            f"{option}: {source} cannot be imported: {last} ({frame.filename}, line {frame.lineno})"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        here = (one for one, value in vars(module).items() if callable(value) and not one.startswith("_"))
        raise UsageError(
            f"{option}: there is no function {name!r} in {source}; it has {', '.join(sorted(here)) or 'none'}"
        )
    return function


def _load_file(path: Path, option: str) -> Any:
    if not path.is_file():
        raise UsageError(f"{option}: there is no file {path}")
    path = path.resolve()
    name = f"polyak_user_{path.stem}"
    if name in sys.modules and sys.modules[name].__file__ == str(path):
        return sys.modules[name]
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.path.insert(0, str(path.parent))  # what lies beside the file can be imported, as when it is run
    sys.modules[name] = module
    try:
        specification.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _load_module(name: str) -> Any:
    sys.path.insert(0, str(Path.cwd()))
    return importlib.import_module(name)


def clocks(timestamp: Timestamp) -> dict[TimeUnit, float]:
    """Return what a run's clock shows in all units that it counted.

    Args:
        timestamp: A moment after the start of the run.
    """
    readings = {unit: timestamp.elapsed(unit) for unit in TimeUnit if unit is not TimeUnit.DURATION}
    return {unit: value for unit, value in readings.items() if value}


def size(size_bytes: int) -> str:
    """Write a size for people.

    Args:
        size_bytes: At least 0.

    Example:
        >>> size(512), size(1_536_000), size(98_765_432)
        ('512 B', '1.5 MB', '98.8 MB')
    """
    value = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"

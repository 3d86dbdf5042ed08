"""Pickles of modules (``.pkl``), as EDM2 and other projects of NVIDIA's save their networks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyak.checkpoints.stored import Files, Found
from polyak.compat.pickled_modules import PickledModule, load_modules
from polyak.compat.words import shown
from polyak.errors import CheckpointError

FORMAT = "pickle of a module"
_SUFFIXES = (".pkl", ".pickle")
_ZIP = b"PK"


def accepts(path: Path) -> bool:
    """Return whether it is a file with the suffix of a pickle that ``torch.save`` did not write.

    Args:
        path: Of a checkpoint.
    """
    if path.suffix not in _SUFFIXES or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(2) != _ZIP


def read(path: Path, files: Files) -> Found:
    """Read what is in the pickle, but no tensor.

    Args:
        path: Of the file.
        files: Opens it.

    Raises:
        CheckpointError: If it is no such pickle, or is damaged.
    """
    return Found({key: value.state_dict for key, value in modules_in(path, files).items()})


def modules_in(path: Path, files: Files) -> Mapping[str, PickledModule]:
    """Return the modules in a pickle by their key.

    Args:
        path: Of the file.
        files: Opens it.

    Raises:
        CheckpointError: If there is none, or the file is damaged.
    """
    content: Mapping[str, Any] = load_modules(files.open(path))
    found = {key: value for key, value in content.items() if isinstance(value, PickledModule)}
    if not found:
        raise CheckpointError(
            f"a pickle must have a module in it ({shown(path)} has none); save the state dict with torch.save"
        )
    return found

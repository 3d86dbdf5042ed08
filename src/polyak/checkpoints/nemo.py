"""NeMo's archives (``.nemo``): an uncompressed tar of a configuration and a file of torch with the weights."""

import tarfile
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from polyak.checkpoints.stored import Files, Found
from polyak.compat.files import load
from polyak.compat.pickles import Window
from polyak.compat.words import listed, shown
from polyak.errors import CheckpointError

FORMAT = "NeMo archive"
_WEIGHTS = "model_weights.ckpt"
_MOST_ENTRIES = 10_000


def accepts(path: Path) -> bool:
    """Return whether it is a file with NeMo's suffix.

    Args:
        path: The path of a checkpoint.
    """
    return path.suffix == ".nemo" and not path.is_dir()


def read(path: Path, files: Files) -> Found:
    """Read what is in the file of torch in the archive, but no tensor.

    Args:
        path: The path of the archive.
        files: Opens it.

    Raises:
        CheckpointError: If it is not such an archive, is compressed or is damaged.
    """
    data = files.open(path)
    try:
        with tarfile.open(fileobj=cast(BinaryIO, Window(data)), mode="r:") as archive:
            entries = [one for one, _ in zip(archive, range(_MOST_ENTRIES), strict=False)]
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{shown(path)} must be an uncompressed tar archive ({shown(error)}); unpack it, and give {_WEIGHTS}"
        ) from None
    found = [one for one in entries if PurePosixPath(one.name).name == _WEIGHTS and one.isreg() and not one.issparse()]
    if len(found) != 1:
        raise CheckpointError(
            f"{shown(path)} must have one {_WEIGHTS} (it has {listed(one.name for one in entries) or 'nothing'}); "
            "unpack it, and give the weights"
        )
    begin, size = found[0].offset_data, found[0].size
    if begin + size > len(data):
        raise CheckpointError(f"{shown(path)} is truncated; copy it again")
    return Found(load(path, data=data[begin : begin + size], unchecked=files.unchecked))

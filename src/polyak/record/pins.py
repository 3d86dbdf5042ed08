"""Pins keep files of a record on disk because checkpoints refer to them."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from polyak.errors import RecordError
from polyak.record.files import check_size
from polyak.record.manifest import Manifest, Pin, Segment


def pin_of(folder: Path, manifest: Manifest, checkpoint: str | Path | None) -> Pin:
    """Return a pin of the files that a record consists of.

    Args:
        folder: The folder of the record.
        manifest: The manifest of the record.
        checkpoint: The checkpoint that refers to the files; None if its path is not known.
    """
    relative = None if checkpoint is None else Path(os.path.relpath(checkpoint, folder)).as_posix()
    return Pin(manifest.current_files, relative)


def without_gone(folder: Path, pins: Mapping[str, Pin]) -> dict[str, Pin]:
    """Return the pins whose checkpoints still exist, and those without a path.

    Args:
        folder: The folder of the record.
        pins: The pins, by name.
    """
    return {name: pin for name, pin in pins.items() if pin.path is None or (folder / pin.path).exists()}


def check_kept(folder: Path, pins: Mapping[str, Pin], segments: Iterable[Segment]) -> None:
    """Check that the files that a checkpoint refers to are still on disk.

    Args:
        folder: The folder of the record.
        pins: The pins, by name; an error lists them.
        segments: What the checkpoint refers to.

    Raises:
        RecordError: If a file is missing or has another size.
    """
    try:
        for segment in segments:
            check_size(folder, segment)
    except RecordError as error:
        raise RecordError(
            f"{folder} can be rewound only to a checkpoint whose files it still has; it is pinned to {sorted(pins)}: "
            f"resume from one of these, or record to another folder ({error})"
        ) from error

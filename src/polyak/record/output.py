"""Writes a segment to the disk under a temporary name: as one file, or as one file per rank."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from polyak.record.differences import with_scales
from polyak.record.files import Source
from polyak.storage.atomic import TEMPORARY
from polyak.storage.safetensors import TensorInfo, write_tensors


@dataclass(frozen=True, slots=True)
class Written:
    """A segment that is on disk under a temporary name.

    Args:
        path: The temporary name, in the folder of the record.
        size_bytes: As in ``Segment``.
        sha256: As in ``Segment``.
        sharded: As in ``Segment``.
    """

    path: Path
    size_bytes: int
    sha256: str
    sharded: bool


class Output(Protocol):
    """Writes segments: ``OneFile``, or ``shards.ShardFiles``."""

    def write(
        self,
        folder: Path,
        tensors: Mapping[str, TensorInfo],
        like: Mapping[str, Tensor],
        source: Source,
        metadata: Mapping[str, str],
    ) -> Written:
        """Write a segment under a temporary name, and flush it to the disk.

        Args:
            folder: The folder of the record.
            tensors: What is written.
            like: Tensors that are sharded as what is written is.
            source: Gives the values.
            metadata: The metadata for the headers of the files.

        Raises:
            OSError: If the disk refuses.
        """
        ...


class OneFile:
    """Writes each segment to one file, from one process."""

    def write(
        self,
        folder: Path,
        tensors: Mapping[str, TensorInfo],
        like: Mapping[str, Tensor],
        source: Source,
        metadata: Mapping[str, str],
    ) -> Written:
        """Write a segment; see ``Output``."""
        del like
        path = folder / f"stretch{TEMPORARY}"
        with source as read:
            size_bytes, sha256 = write_tensors(path, with_scales(tensors), lambda name: read(name, None), metadata)
        return Written(path, size_bytes, sha256, sharded=False)

"""``Contents``: the segments, tensors and files of a record on disk."""

import shlex
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

from polyak.errors import RecordError
from polyak.record.appender import settle
from polyak.record.files import SegmentFile, check_content, check_size, hash_in, open_segment
from polyak.record.manifest import Segment, load_manifest
from polyak.record.moments import moment
from polyak.storage.safetensors import TensorInfo
from polyak.time import Time


class Contents:
    """The segments and tensors of a record, and its files; ``Record`` says what each attribute is.

    Args:
        folder: The folder of the record.

    Raises:
        RecordError: If there is no record, or its manifest is wrong.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()
        settle(self.folder)  # a loop that has just ended may still be writing
        manifest = load_manifest(self.folder)
        self.segments: tuple[Segment, ...] = manifest.segments
        self.tensors: Mapping[str, TensorInfo] = manifest.tensors
        self.aliases: Mapping[str, str] = manifest.aliases
        self.max_duration: Time | None = manifest.max_duration
        self.raw: Segment | None = manifest.raw
        self.owner: object = None  # of a temporary folder
        self._verified = set[Path]()

    @property
    def arguments(self) -> str | None:
        """The arguments with which commands open the record; None if there are no such arguments."""
        return shlex.quote(str(self.folder))

    @property
    def moments(self) -> tuple[Time, ...]:
        """Where an average can end, in batches: the end of each segment. They are dense at the end of the run."""
        return tuple(map(moment, self.segments))

    @property
    def stretches(self) -> tuple[Segment, ...]:
        """The earlier name of ``segments``."""
        return self.segments

    def open(self, segment: Segment) -> AbstractContextManager[SegmentFile]:
        """Open a segment's file for the length of a ``with`` block; its ``read(name)`` returns one tensor.

        Args:
            segment: One of ``segments``. Each is an averaged model by itself.

        Raises:
            RecordError: If the file is missing, truncated or foreign. If it does not have its hash, the first ``read``
                raises that.
        """
        return open_segment(self.folder, segment, self.tensors, self._verified)

    def open_raw(self) -> AbstractContextManager[SegmentFile]:
        """Open the raw weights of the averaged tensors, at the end of the record, for the length of a ``with`` block.

        Raises:
            RecordError: If the record has none, or the file is missing, truncated or foreign.
        """
        if self.raw is None:
            raise RecordError(
                f"a record keeps the raw weights once its run has ended without an error, and {self.folder} has none: "
                "the run has not ended so, or an earlier version of polyak recorded it; take them from a checkpoint"
            )
        averaged = {name: info for name, info in self.tensors.items() if info.averaged}
        return open_segment(self.folder, self.raw, averaged, self._verified)

    def raw_weights(self, *, device: torch.device | str | None = None) -> dict[str, Tensor]:
        """Return the raw weights at the end of the record by name, bit for bit, in the model's dtypes.

        Args:
            device: The device for the result; None for the CPU.

        Raises:
            RecordError: If the record has none, or a file is missing, truncated, damaged or foreign.
        """
        result: dict[str, Tensor] = {}
        with self.open_raw() as raw, self.open(self.segments[-1]) as last:
            for name, info in self.tensors.items():
                # A copy: what is read is backed by the file, which a resumed run deletes.
                result[name] = (raw if info.averaged else last).read(name).clone()
        return self._completed(result, device)

    def verify(self) -> None:
        """Check all files against the hashes in the manifest, including those that are kept for checkpoints.

        Raises:
            RecordError: If one differs.
        """
        current = [*self.segments, *filter(None, [self.raw])]
        for segment in current:
            check_size(self.folder, segment)
        # Reading the manifest verifies it too. The name of a pinned file has the beginning of its hash.
        pinned = load_manifest(self.folder).files
        hashes = {name: hash_in(name) for name in pinned} | {one.file: one.sha256 for one in current}
        for name, sha256 in sorted(hashes.items()):
            check_content(self.folder, name, sha256)

    def _completed(self, tensors: Mapping[str, Tensor], device: torch.device | str | None) -> dict[str, Tensor]:
        result = {name: tensor.to(device) for name, tensor in tensors.items()}
        return result | {alias: result[name] for alias, name in self.aliases.items()}

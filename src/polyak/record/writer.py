"""The writer of a record: append a segment, merge segments as they age, rewind, pin."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from polyak.errors import RecordError
from polyak.record.files import Source
from polyak.record.folder import check_tensors
from polyak.record.manifest import Edge, Manifest, Pin, Segment, linked, segments_from_plain
from polyak.record.merging import (
    Files,
    Kept,
    encoded,
    given,
    kept_as,
    merged_as,
    own_dtype,
    separate_as,
)
from polyak.record.output import OneFile, Output
from polyak.record.pins import check_kept, pin_of, without_gone
from polyak.record.shared import SharedManifest
from polyak.sharding import Communicator, OneProcess, Ranks
from polyak.storage.safetensors import DTYPE_NAMES, TensorInfo
from polyak.time import Time


class Writer:
    """Writes the record in a folder. There is one writer at a time, used by one thread.

    Ranks that write a record together each have a ``Writer`` and make the same calls. Each writes its shards of a
    segment; rank 0 does the rest.

    Args:
        folder: Where the record is, or will be.
        tensors: What is kept, by name. A record that exists must keep the same.
        per_level: Segments of one level that are kept in addition to the two that merge next, at least 1; None merges
            none.
        max_duration: The length of the run, if known.
        aliases: Further names of tied tensors, and the name that each is kept under.
        ranks: Those that write it together, in a group that only this writer uses; None for one process.
        back_up: Whether to begin an empty record. One that exists is moved to a folder inside this one, ``backup-1`` or
            the next number that is free, where it can be read.
        overwrite: Whether to begin an empty record. One that exists is deleted, with the files that checkpoints refer
            to.

    Raises:
        RecordError: If another writer has it, the folder cannot be written, or holds a record that cannot be read, or
            one with another ``per_level``.
        MismatchError: If the record that exists keeps other tensors.
        ShardingError: If another rank has failed, keeps other tensors or does not see the same folder.

    Example:
        >>> import torch
        >>> tensors = {"weight": TensorInfo(torch.float32, (2,), averaged=True)}
        >>> from polyak.time import Timestamp
        >>> start, end = Edge(0, Timestamp()), Edge(1, Timestamp().to_next_batch())
        >>> with Writer("my-record", tensors) as writer:
        ...     writer.append({"weight": torch.ones(2)}, start, end).num_updates
        1
    """

    def __init__(
        self,
        folder: str | Path,
        tensors: Mapping[str, TensorInfo],
        *,
        per_level: int | None = 4,
        max_duration: Time | None = None,
        aliases: Mapping[str, str] | None = None,
        ranks: Communicator | None = None,
        back_up: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.folder = Path(folder).absolute()  # the program may change its directory
        self._ranks = ranks or OneProcess()
        self._output = _output(self._ranks)
        self._shared = SharedManifest(self.folder, self._ranks)
        try:
            self._own = set(tensors)
            held, tied = dict(tensors), dict(aliases or {})
            if isinstance(self._ranks, Ranks) and self._ranks.differ:
                held, tied = self._ranks.union(held), self._ranks.union(tied)
                wrong = {name: str(info) for name, info in tensors.items() if held[name] != info}
                self._ranks.agree(f"the tensors of the record in {self.folder}", {"kept otherwise": wrong})
            wanted = Manifest(held, per_level, max_duration, tied)
            self._shared.open(wanted, back_up=back_up, overwrite=overwrite)
        except BaseException:
            self.close()
            raise

    @property
    def _manifest(self) -> Manifest:
        return self._shared.current

    @property
    def segments(self) -> tuple[Segment, ...]:
        """What the record holds, oldest first."""
        return self._manifest.segments

    stretches = segments  # its earlier name

    @property
    def raw(self) -> Segment | None:
        """The raw weights that the record holds, if it holds them; see ``keep_raw``."""
        return self._manifest.raw

    @property
    def pins(self) -> Mapping[str, Pin]:
        """What is kept for checkpoints, by name."""
        return self._manifest.pins

    def append(self, tensors: Mapping[str, Tensor], start: Edge, end: Edge) -> Segment:
        """Write a segment, and merge older ones. After an error, the same call may be repeated.

        Whether the record then has the segment already, because only what came after failed, makes no difference.

        Args:
            tensors: The means over the updates after ``start``, up to and including ``end``; of the tensors that are
                not averaged, their values at ``end``. On any device. Several ranks give sharded tensors.
            start: Where the record ends so far; on an empty record, update 0.
            end: Where the segment ends.

        Raises:
            RecordError: If the segment does not start where the record ends, or the disk refuses.
            MismatchError: If the tensors are not those of the record.
            ShardingError: If the ranks that write together give different segments.
        """
        manifest = self._manifest
        check_tensors(_held(manifest.tensors, self._own), tensors)
        facts = {"start": start.updates, "end": end.updates, "segments so far": len(manifest.segments)}
        self._ranks.agree("the segment to be written", facts)
        if manifest.segments:
            newest, last = manifest.segments[-1], manifest.segments[-1].end
            if (start.updates, end.updates) == (newest.start.updates, last.updates):
                return newest  # a call made again
            if start.updates != last.updates:
                raise RecordError(
                    f"a segment must start where {self.folder} ends, after {last.updates} updates (got "
                    f"{start.updates}): rewind the record to the checkpoint that the run resumed from, or record to "
                    "another folder"
                )
            start = last  # the same moment, which a loop may by now call the start of the next epoch
        with self._shared.changing(f"adding a segment to {self.folder}"):
            # What is merged is compared with its hash first, so that damage does not get into a file with a new hash.
            files = Files(self.folder, manifest.tensors)
            kept = kept_as(files, manifest.segments, tensors, self._ranks)
            segment = self._write(files, given(tensors), tensors, (start, end), kept)
            segments = self._merge(files, [*manifest.segments, segment], tensors)
            # The raw weights were those where the record ended before.
            self._shared.commit(replace(manifest, segments=tuple(segments), raw=None))
        return segments[-1]  # which may have been written again

    def keep_raw(self, weights: Mapping[str, Tensor]) -> None:
        """Keep the raw weights at the end of the last segment, until the next segment is appended.

        After an error the same call may be made again.

        Args:
            weights: Those of the tensors that are averaged, each in the dtype in which it is kept. On any device.
                Several ranks give sharded tensors.

        Raises:
            RecordError: If the record has no segment, or the disk refuses.
            MismatchError: If the tensors are not the averaged ones of the record.
            ShardingError: If another rank has failed.
        """
        if not self.segments:
            raise RecordError(f"raw weights must follow a segment, and {self.folder} has none: append one first")
        averaged = {name: info for name, info in _held(self._manifest.tensors, self._own).items() if info.averaged}
        self._ranks.on_every_rank("the raw weights", lambda: check_tensors(averaged, weights))
        kept = {name: replace(info, dtype=own_dtype(weights[name], DTYPE_NAMES)) for name, info in averaged.items()}
        end = self.segments[-1].end
        with self._shared.changing(f"adding the raw weights to {self.folder}"):
            # Another object than for segments: it plans once, and these are other tensors.
            files, output = Files(self.folder, self._manifest.tensors), _output(self._ranks)
            raw = self._write(files, given(weights), weights, (end, end), Kept(kept), output=output)
            self._shared.commit(replace(self._manifest, raw=raw))

    def state_dict(self) -> dict[str, Any]:
        """Return what ``rewind`` needs, as plain containers. ``pin`` it, or later merges may delete the files."""
        raw = None if self.raw is None else self.raw.to_plain()
        return {"stretches": [segment.to_plain() for segment in self.segments], "raw": raw}

    def rewind(self, state: Mapping[str, Any]) -> None:
        """Make the record what it was when ``state_dict`` was called.

        Args:
            state: What that returned.

        Raises:
            RecordError: If files that it refers to are gone, or the disk refuses.
        """
        segments = segments_from_plain(state["stretches"])
        raw = None if state.get("raw") is None else Segment.from_plain(state["raw"], "raw")
        if segments == self.segments and raw == self.raw:
            return
        referred = [*segments, *filter(None, [raw])]
        self._ranks.on_rank_0(lambda: check_kept(self.folder, self.pins, referred))
        with self._shared.changing(f"rewinding {self.folder}"):
            self._shared.commit(replace(self._manifest, segments=segments, raw=raw))

    def pin(self, name: str, path: str | Path | None = None) -> None:
        """Keep the files that the record now consists of until ``unpin``.

        Args:
            name: The name of the pin; one of the same name is replaced.
            path: The checkpoint that refers to these files, for ``unpin_gone``.

        Raises:
            RecordError: If the disk refuses.
        """
        self._set_pins({**self.pins, name: pin_of(self.folder, self._manifest, path)})

    def unpin(self, name: str) -> None:
        """Remove a pin, and delete the files that nothing else refers to.

        Args:
            name: The name of the pin; it is no error if there is none.

        Raises:
            RecordError: If the disk refuses.
        """
        self._set_pins({other: pin for other, pin in self.pins.items() if other != name})

    def unpin_gone(self) -> None:
        """Remove every pin whose checkpoint was deleted. Call this when no checkpoint is being written.

        Raises:
            RecordError: If the disk refuses.
        """
        self._set_pins(self._ranks.on_rank_0(lambda: without_gone(self.folder, self.pins)))

    def close(self) -> None:
        """Let the next writer in. What was appended is already on disk."""
        self._shared.close()
        self._ranks.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _set_pins(self, pins: Mapping[str, Pin]) -> None:
        if pins != self.pins:
            with self._shared.changing(f"changing the pins of {self.folder}"):
                self._shared.commit(replace(self._manifest, pins=dict(pins)))

    def _merge(self, files: Files, segments: list[Segment], like: Mapping[str, Tensor]) -> list[Segment]:
        """Merge what is due, after one more segment of level 0."""
        level = 0
        while (i := due([segment.level for segment in segments], level, self._manifest.per_level)) is not None:
            older, newer, *rest = segments[i:]
            kept, mean, level = merged_as(files, segments, i, like, self._ranks), files.mean_of(older, newer), level + 1
            merged = self._write(files, mean, like, (older.start, newer.end), kept, level)
            if rest and (after := rest[0]).before is not None:  # without differences newer's file can be deleted
                kept, mean = separate_as(files, after), files.source(after)
                rest[0] = self._write(files, mean, like, (after.start, after.end), kept, after.level)
            segments = linked([*segments[:i], merged, *rest])
        return segments

    def _write(  # noqa: PLR0917  all that a segment is
        self,
        files: Files,
        source: Source,
        like: Mapping[str, Tensor],
        edges: tuple[Edge, Edge],
        kept: Kept,
        level: int = 0,
        output: Output | None = None,
    ) -> Segment:
        updates = f"{edges[0].updates}-{edges[1].updates}"
        metadata = {"format": "pt", "polyak.updates": updates, **kept.metadata}
        written = (output or self._output).write(self.folder, kept.infos, like, encoded(files, source, kept), metadata)
        segment = Segment(*edges, level, written.size_bytes, written.sha256, written.sharded, kept.before)
        return self._shared.name(written, segment)


def _held(tensors: Mapping[str, TensorInfo], own: Collection[str]) -> dict[str, TensorInfo]:
    """Return the tensors of the record that this rank has, in full or in part."""
    return {name: info for name, info in tensors.items() if name in own}


def due(levels: Sequence[int], level: int, per_level: int | None) -> int | None:
    """Return which segment is to merge with the next: the oldest of a level that has more than ``per_level + 1``.

    Args:
        levels: The levels of all segments, oldest first.
        level: The level in question.
        per_level: As for ``Writer``.

    Example:
        >>> due([1, 0, 0, 0, 0], 0, per_level=2)
        1
    """
    return levels.index(level) if per_level is not None and levels.count(level) > per_level + 1 else None


def _output(ranks: Communicator) -> Output:
    if isinstance(ranks, OneProcess):
        return OneFile()
    from polyak.record.shards import ShardFiles  # noqa: PLC0415  importing DCP takes as long as half of torch

    return ShardFiles(ranks)

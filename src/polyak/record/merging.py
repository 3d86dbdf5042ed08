"""Decides in which dtypes a new segment, and the mean of two segments, are stored."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from polyak.record.differences import LONGEST, SCALE, is_difference, steps_of
from polyak.record.files import Box, Read, SegmentFile, Source, check_size, open_segment
from polyak.record.manifest import Segment
from polyak.record.precision import as_differences, in_full, narrow, shard_of, widened
from polyak.sharding import Communicator, local
from polyak.storage.safetensors import TensorInfo

# What this rank has of tensors that only other stages of a pipeline have.
_NOTHING = torch.empty(0)

Infos = Mapping[str, TensorInfo]


@dataclass(frozen=True, slots=True)
class Kept:
    """How a segment keeps its tensors.

    Args:
        infos: The facts about tensors, by name.
        before: The segment that some of them are differences from; None if none is.
        scales: The scales of the differences, by name.
    """

    infos: Infos
    before: Segment | None = None
    scales: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def metadata(self) -> dict[str, str]:
        """The description of this in the file's metadata."""
        before = self.before
        return {} if before is None else {"polyak.before": f"{before.start.updates}-{before.end.updates}"}


@dataclass(frozen=True, slots=True)
class Files:
    """Opens the segments of a record in order to change it. Each file is checked against its hash once.

    Args:
        folder: The folder of the record.
        infos: How the record keeps its tensors.
    """

    folder: Path
    infos: Infos
    _verified: set[Path] = field(default_factory=set)

    @property
    def have_differences(self) -> bool:
        """Whether means are kept as differences where that is accurate enough."""
        return any(map(is_difference, self.infos.values()))

    def open(self, segment: Segment, *, verify: bool = True) -> AbstractContextManager[SegmentFile]:
        """Open a segment for the length of a ``with`` block.

        Args:
            segment: One of the record.
            verify: Whether what is read must not be damaged.

        Raises:
            RecordError: If it is missing or truncated, or holds something else.
        """
        verified = self._verified if verify else set(check_size(self.folder, segment))
        return open_segment(self.folder, segment, self.infos, verified)

    @contextmanager
    def source(self, segment: Segment) -> Iterator[Read]:
        """Yield a function that reads a segment.

        Args:
            segment: One of the record.
        """
        with self.open(segment) as file:
            yield file.read

    @contextmanager
    def mean_of(self, older: Segment, newer: Segment) -> Iterator[Read]:
        """Yield a function that reads the mean of two segments.

        Args:
            older: A segment.
            newer: The next.
        """
        with self.open(older) as old, self.open(newer) as new:

            def read(name: str, box: Box | None) -> Tensor:
                if not self.infos[name].averaged:
                    return new.read(name, box)
                exact = torch.complex128 if self.infos[name].dtype.is_complex else torch.float64
                total = old.read(name, box).to(exact).mul_(older.num_updates)
                total.add_(new.read(name, box), alpha=newer.num_updates)
                return total.div_(older.num_updates + newer.num_updates)

            yield read


def kept_as(files: Files, segments: Sequence[Segment], tensors: Mapping[str, Tensor], ranks: Communicator) -> Kept:
    """Return how a new segment keeps its tensors.

    Args:
        files: The files of the record.
        segments: The segments that the record has so far.
        tensors: Those of the new segment.
        ranks: Those that write together.
    """
    if files.have_differences:
        return _differing_as(files, given(tensors), _before(segments, 0), tensors, ranks)
    names, before = narrow(files.infos), segments[-1] if segments else None

    def own(name: str) -> Tensor:
        return local(tensors[name]) if name in tensors else _NOTHING

    if not names or before is None:
        return Kept(widened(files.infos, names, own, lambda name: None if name in tensors else _NOTHING, ranks))
    # Damage in the segment before would change at most how this one is kept: no hash is needed.
    with files.open(before, verify=False) as file:
        return Kept(widened(files.infos, names, own, _shards(file.read, tensors), ranks))


def merged_as(
    files: Files, segments: Sequence[Segment], i: int, like: Mapping[str, Tensor], ranks: Communicator
) -> Kept:
    """Return how the mean of two segments keeps its tensors: in float16 where both do, or where it is enough now.

    Args:
        files: The files of the record.
        segments: The segments that the record has so far.
        i: The older of the two; the newer is the next.
        like: Tensors that are sharded as those of the mean are.
        ranks: Those that write together.
    """
    pair = segments[i], segments[i + 1]
    if files.have_differences:
        return _differing_as(files, files.mean_of(*pair), _before(segments[:i], pair[0].level + 1), like, ranks)
    if not (names := narrow(files.infos)):
        return Kept(files.infos)
    with files.open(pair[0]) as old, files.open(pair[1]) as new, files.mean_of(*pair) as read:
        wide = [name for name in names if torch.float32 in (old.dtype(name), new.dtype(name))]
        mean = _shards(read, like)
        return Kept(widened(files.infos, wide, lambda name: _or_empty(mean(name)), _shards(old.read, like), ranks))


def _differing_as(
    files: Files, source: Source, before: Segment | None, like: Mapping[str, Tensor], ranks: Communicator
) -> Kept:
    if before is None:
        return Kept(in_full(files.infos))
    with source as read, files.source(before) as reference:
        infos, scales = as_differences(files.infos, _shards(read, like), _shards(reference, like), ranks)
    return Kept(infos, before, scales) if any(map(is_difference, infos.values())) else Kept(infos)


def _before(segments: Sequence[Segment], level: int) -> Segment | None:
    """Return the segment from which the next one of a level may have differences; None if there is none."""
    newest = segments[-1] if segments else None
    return newest if newest and newest.level == level and newest.num_differences < LONGEST else None


def separate_as(files: Files, segment: Segment) -> Kept:
    """Return how a segment keeps its tensors without differences: those that were differences in float32.

    Args:
        files: The files of the record.
        segment: A segment with differences.
    """
    with files.open(segment) as file:
        return Kept(in_full({name: replace(info, dtype=file.dtype(name)) for name, info in files.infos.items()}))


@contextmanager
def given(tensors: Mapping[str, Tensor]) -> Iterator[Read]:
    """Yield a function that reads tensors in memory.

    Args:
        tensors: By name. The box that a rank is asked for is its local shard.
    """
    yield lambda name, _: local(tensors[name])


def encoded(files: Files, source: Source, kept: Kept) -> Source:
    """Return a source that reads what the file of a segment holds.

    Args:
        files: The files of the record.
        source: Gives the means.
        kept: How the segment keeps its tensors.
    """
    return source if kept.before is None else _differences(source, files.source(kept.before), kept)


@contextmanager
def _differences(source: Source, before: Source, kept: Kept) -> Iterator[Read]:
    with source as mean, before as reference:

        def read(name: str, box: Box | None) -> Tensor:
            if name not in kept.infos:
                return kept.scales[name.removesuffix(SCALE)]
            if not is_difference(kept.infos[name]):
                return mean(name, box)
            return steps_of(mean(name, box).detach().cpu() - reference(name, box), kept.scales[name])

        yield read


def own_dtype(tensor: Tensor, names: Mapping[torch.dtype, str]) -> torch.dtype:
    """Return the dtype of a tensor, or float32 if files have no name for it.

    Args:
        tensor: Any tensor.
        names: The dtypes that files have, with their names.
    """
    return tensor.dtype if tensor.dtype in names else torch.float32


def _shards(read: Read, like: Mapping[str, Tensor]) -> Callable[[str], Tensor | None]:
    return lambda name: shard_of(read, name, like[name]) if name in like else _NOTHING


def _or_empty(shard: Tensor | None) -> Tensor:
    return _NOTHING if shard is None else shard

"""What a new segment and the mean of two segments hold, and in which dtypes."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from polyak.record.differences import SCALE, is_difference, scales_of, steps_of
from polyak.record.files import Box, Read, SegmentFile, Source, check_size, open_segment
from polyak.record.manifest import Segment
from polyak.record.precision import as_differences, in_full, narrow, shard_of, widened
from polyak.sharding import Communicator, local
from polyak.storage.safetensors import TensorInfo

# What this rank has of tensors that only other stages of a pipeline have.
_NOTHING = torch.empty(0)

Infos = Mapping[str, TensorInfo]


@dataclass(frozen=True, slots=True)
class Files:
    """Opens the segments of a record to change it. Each file is compared with its hash once.

    Args:
        folder: The folder of the record.
        infos: How the record keeps its tensors.
    """

    folder: Path
    infos: Infos
    _verified: set[Path] = field(default_factory=set)

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
        """Give a function that reads a segment, for a ``with`` block.

        Args:
            segment: One of the record.
        """
        with self.open(segment) as file:
            yield file.read

    @contextmanager
    def mean_of(self, older: Segment, newer: Segment) -> Iterator[Read]:
        """Give a function that reads the mean of two segments, for a ``with`` block.

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


def kept_as(files: Files, before: Segment | None, tensors: Mapping[str, Tensor], ranks: Communicator) -> Infos:
    """Return how a new segment keeps its tensors.

    Args:
        files: Of the record.
        before: The newest segment of the record; None if it has none.
        tensors: Those of the new segment.
        ranks: Those that write together.
    """
    names = narrow(files.infos)

    def own(name: str) -> Tensor:
        return local(tensors[name]) if name in tensors else _NOTHING

    if not names or before is None:
        return widened(files.infos, names, own, lambda name: None if name in tensors else _NOTHING, ranks)
    # Damage in the segment before would change at most how this one is kept: no hash is needed.
    with files.open(before, verify=False) as file:
        return widened(files.infos, names, own, _shards(file.read, tensors), ranks)


def merged_as(files: Files, pair: tuple[Segment, Segment], like: Mapping[str, Tensor], ranks: Communicator) -> Infos:
    """Return how the mean of two segments keeps its tensors: in float16 where both do, or where it is enough now.

    Args:
        files: Of the record.
        pair: The older and the newer segment.
        like: Tensors that are sharded as those of the mean are.
        ranks: Those that write together.
    """
    if not (names := narrow(files.infos)):
        return files.infos
    with files.open(pair[0]) as old, files.open(pair[1]) as new, files.mean_of(*pair) as read:
        wide = [name for name in names if torch.float32 in (old.dtype(name), new.dtype(name))]
        mean = _shards(read, like)
        return widened(files.infos, wide, lambda name: _or_empty(mean(name)), _shards(old.read, like), ranks)


def differing_as(
    files: Files, source: Source, before: Segment | None, like: Mapping[str, Tensor], ranks: Communicator
) -> Infos:
    """Return how a segment of a record of differences keeps its tensors.

    Args:
        files: Of the record.
        source: Gives the means.
        before: The segment that they may be differences from; None if there is none.
        like: Tensors that are sharded as those of the segment are.
        ranks: Those that write together.
    """
    if before is None:
        return in_full(files.infos)
    with source as read, files.source(before) as reference:
        return as_differences(files.infos, _shards(read, like), _shards(reference, like), ranks)


def separate_as(files: Files, segment: Segment) -> Infos:
    """Return how a segment keeps its tensors once it must have no differences: as it does, and those in float32.

    Args:
        files: Of the record.
        segment: A segment with differences.
    """
    with files.open(segment) as file:
        return in_full({name: replace(info, dtype=file.dtype(name)) for name, info in files.infos.items()})


@contextmanager
def given(tensors: Mapping[str, Tensor]) -> Iterator[Read]:
    """Give a function that reads tensors in memory, for a ``with`` block.

    Args:
        tensors: By name. The box that a rank is asked for is its local shard.
    """
    yield lambda name, _: local(tensors[name])


@contextmanager
def differences(source: Source, before: Source, infos: Infos) -> Iterator[Read]:
    """Give a function that reads what a file with differences holds, for a ``with`` block.

    Args:
        source: Gives the means.
        before: Gives those of the segment before.
        infos: How the file keeps its tensors. Those that are no differences are read from ``source``.
    """
    scales: dict[str, Tensor] = {}
    with source as mean, before as reference:

        def read(name: str, box: Box | None) -> Tensor:
            tensor = name if name in infos else name.removesuffix(SCALE)
            if not is_difference(infos[tensor]):
                return mean(name, box)
            difference = mean(tensor, box).detach().cpu() - reference(tensor, box)
            if tensor == name:  # its scales have been read: they are wider, and come first in a file
                return steps_of(difference, scales.pop(name))
            scales[tensor] = scales_of(difference)
            return scales[tensor]

        yield read


def own_dtype(tensor: Tensor, names: Mapping[torch.dtype, str]) -> torch.dtype:
    """Return the dtype of a tensor, or float32 if files have no name for it.

    Args:
        tensor: Any.
        names: The dtypes that files have, with their names.
    """
    return tensor.dtype if tensor.dtype in names else torch.float32


def _shards(read: Read, like: Mapping[str, Tensor]) -> Callable[[str], Tensor | None]:
    return lambda name: shard_of(read, name, like[name]) if name in like else _NOTHING


def _or_empty(shard: Tensor | None) -> Tensor:
    return _NOTHING if shard is None else shard

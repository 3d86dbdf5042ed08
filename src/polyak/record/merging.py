"""What a new segment and the mean of two segments hold, and in which dtypes."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from polyak.record.files import Box, Read, check_size, open_segment
from polyak.record.manifest import Segment
from polyak.record.precision import narrow, shard_of, widened
from polyak.sharding import Communicator, local
from polyak.storage.safetensors import TensorInfo

# What this rank has of tensors that only other stages of a pipeline have.
_NOTHING = torch.empty(0)

Infos = Mapping[str, TensorInfo]


def kept_as(
    folder: Path, infos: Infos, before: Segment | None, tensors: Mapping[str, Tensor], ranks: Communicator
) -> Infos:
    """Return how a new segment keeps its tensors.

    Args:
        folder: The folder of the record.
        infos: How the record keeps them.
        before: The newest segment of the record; None if it has none.
        tensors: Those of the new segment.
        ranks: Those that write together.
    """
    names = narrow(infos)

    def own(name: str) -> Tensor:
        return local(tensors[name]) if name in tensors else _NOTHING

    if not names or before is None:
        return widened(infos, names, own, lambda name: None if name in tensors else _NOTHING, ranks)
    # Damage in the segment before would change at most how this one is kept: no hash is needed.
    with open_segment(folder, before, infos, set(check_size(folder, before))) as file:
        return widened(
            infos,
            names,
            own,
            lambda name: shard_of(file.read, name, tensors[name]) if name in tensors else _NOTHING,
            ranks,
        )


def merged_as(
    folder: Path, infos: Infos, pair: tuple[Segment, Segment], like: Mapping[str, Tensor], ranks: Communicator
) -> Infos:
    """Return how the mean of two segments keeps its tensors: in float16 where both do, or where it is enough now.

    Args:
        folder: The folder of the record.
        infos: How the record keeps them.
        pair: The older and the newer segment.
        like: Tensors that are sharded as those of the mean are.
        ranks: Those that write together.
    """
    if not (names := narrow(infos)):
        return infos
    with open_segment(folder, pair[0], infos) as old, open_segment(folder, pair[1], infos) as new:
        wide = [name for name in names if torch.float32 in (old.dtype(name), new.dtype(name))]
        with mean_of(folder, infos, *pair) as read:
            return widened(
                infos,
                wide,
                lambda name: _or_empty(shard_of(read, name, like[name])) if name in like else _NOTHING,
                lambda name: shard_of(old.read, name, like[name]) if name in like else _NOTHING,
                ranks,
            )


@contextmanager
def mean_of(folder: Path, infos: Infos, older: Segment, newer: Segment) -> Iterator[Read]:
    """Give a function that reads the mean of two segments, for a ``with`` block.

    Args:
        folder: The folder of the record.
        infos: How the record keeps its tensors.
        older: A segment.
        newer: The next.
    """
    with open_segment(folder, older, infos) as old, open_segment(folder, newer, infos) as new:

        def read(name: str, box: Box | None) -> Tensor:
            if not infos[name].averaged:
                return new.read(name, box)
            exact = torch.complex128 if infos[name].dtype.is_complex else torch.float64
            total = old.read(name, box).to(exact).mul_(older.num_updates)
            total.add_(new.read(name, box), alpha=newer.num_updates)
            return total.div_(older.num_updates + newer.num_updates)

        yield read


@contextmanager
def given(tensors: Mapping[str, Tensor]) -> Iterator[Read]:
    """Give a function that reads tensors in memory, for a ``with`` block.

    Args:
        tensors: By name. The box that a rank is asked for is its local shard.
    """
    yield lambda name, _: local(tensors[name])


def own_dtype(tensor: Tensor, names: Mapping[torch.dtype, str]) -> torch.dtype:
    """Return the dtype of a tensor, or float32 if files have no name for it.

    Args:
        tensor: Any.
        names: The dtypes that files have, with their names.
    """
    return tensor.dtype if tensor.dtype in names else torch.float32


def _or_empty(shard: Tensor | None) -> Tensor:
    return _NOTHING if shard is None else shard

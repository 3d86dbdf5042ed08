"""Decides which tensors of a segment few bits cannot hold well enough. These are kept in float32."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from polyak.errors import ShardingError
from polyak.record.differences import is_difference, lost, scales_of
from polyak.record.files import Box, Read, full_box
from polyak.sharding import Communicator, is_sharded, local, offset
from polyak.storage.safetensors import TensorInfo

# What rounding may lose: of the distance to the mean before, so that the error of an average, which is relative to a
# larger distance and a mean over segments, stays well below it; and of the norm of the mean. The second is what
# float16 loses at most of numbers in its normal range.
MOST_OF_DISTANCE = 1 / 8
MOST_OF_NORM = 2**-11
_CHUNK = 1 << 20  # numbers that are compared together


def narrow(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Return the names of the tensors that are kept in float16 where that is accurate enough.

    Args:
        tensors: Those of a record, by name.
    """
    return [name for name, info in tensors.items() if info.averaged and info.dtype == torch.float16]


def widened(
    tensors: Mapping[str, TensorInfo],
    names: Sequence[str],
    mean: Callable[[str], Tensor],
    before: Callable[[str], Tensor | None],
    ranks: Communicator,
) -> dict[str, TensorInfo]:
    """Return how a segment keeps its tensors: in float32 if float16 cannot hold them well enough.

    Args:
        tensors: How the record keeps them.
        names: Those that are in question.
        mean: Returns the mean of a tensor, or the local shard of it.
        before: Returns the mean of the segment before, or the same shard of it; None if there is none.
        ranks: Those that write together. Each sees its shards, and all get the same result.
    """
    if not names:
        return dict(tensors)
    found = [number for name in names for number in _losses(mean(name), before(name))]
    totals = iter(ranks.totals(*found))
    lost = {name: (next(totals), next(totals), next(totals)) for name in names}
    wide = {name for name, (loss, *limits) in lost.items() if loss > min(limits)}
    return {name: replace(info, dtype=torch.float32) if name in wide else info for name, info in tensors.items()}


def in_full(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Return how a segment keeps its tensors if none of them may be a difference.

    Args:
        tensors: How it would keep them.
    """
    wide = {name: replace(info, dtype=torch.float32) for name, info in tensors.items() if is_difference(info)}
    return {**tensors, **wide}


def as_differences(
    tensors: Mapping[str, TensorInfo],
    mean: Callable[[str], Tensor | None],
    before: Callable[[str], Tensor | None],
    ranks: Communicator,
) -> tuple[dict[str, TensorInfo], dict[str, Tensor]]:
    """Return how a segment keeps its tensors, with those in float32 that lose too much as differences; and the scales.

    Args:
        tensors: How the record keeps them.
        mean: As for ``widened``; None if the shard is not a box of the tensor.
        before: As for ``widened``.
        ranks: As for ``widened``.
    """
    names = [name for name, info in tensors.items() if is_difference(info)]
    numbers, scales = list[float](), dict[str, Tensor]()
    for name in names:
        own, other = mean(name), before(name)
        if own is None or other is None:
            numbers += [torch.inf, 0.0]
            continue
        difference = own.detach().cpu() - other
        scales[name] = scales_of(difference)
        numbers += lost(difference, scales[name])
    totals = iter(ranks.totals(*numbers))
    wide = {name for name in names if not next(totals) <= next(totals) * MOST_OF_DISTANCE**2}
    return {**tensors, **in_full({name: tensors[name] for name in wide})}, scales


@torch.no_grad()
def _losses(mean: Tensor, before: Tensor | None) -> tuple[float, float, float]:
    """Return the square of what rounding to float16 loses, and the squares of what it may lose by norm and distance."""
    lost = norm = distance = 0.0
    flat = mean.detach().cpu().reshape(-1)
    reference = [None] * len(flat.split(_CHUNK)) if before is None else before.reshape(-1).split(_CHUNK)
    for chunk, other in zip(flat.split(_CHUNK), reference, strict=True):
        exact = chunk.double()  # in which no square of a float32 overflows
        loss = (chunk.half() - exact).square()
        lost += float(loss.nan_to_num(nan=0.0, posinf=torch.inf).sum())  # a number beyond float16 loses infinity
        norm += _square(exact)
        distance += torch.inf if other is None else _square(exact - other)
    return lost, norm * MOST_OF_NORM**2, distance * MOST_OF_DISTANCE**2


def _square(tensor: Tensor) -> float:
    return float(tensor.square().nan_to_num(nan=0.0, posinf=0.0).sum())


def shard_of(read: Read, name: str, like: Tensor) -> Tensor | None:
    """Read the part of a tensor that is this rank's local shard; None if it is not a box.

    Args:
        read: Reads a box of a tensor.
        name: The tensor's name.
        like: A tensor that is sharded as it is.
    """
    shard = local(like)
    if not is_sharded(like):
        return read(name, None)
    if not shard.numel():
        return shard.cpu()
    with suppress(ShardingError):
        at = offset(like) or (0,) * shard.ndim
        box: Box = tuple(slice(a + b.start, a + b.stop) for a, b in zip(at, full_box(shard.shape), strict=True))
        return read(name, box)
    return None

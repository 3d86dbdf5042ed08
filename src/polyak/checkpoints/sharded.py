"""Tensors whose shards are in several places on disk. Any range of elements is read from the shards that have it."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Self

import torch
from torch import Tensor

from polyak.compat.folders import Box
from polyak.compat.tensors import copy_if_unaligned


def sizes_of(box: Box) -> tuple[int, ...]:
    """Return the shape of a part of a tensor.

    Args:
        box: Where the part is.
    """
    return tuple(end - begin for begin, end in box)


def boxes_between(first: int, last: int, shape: Sequence[int]) -> Iterator[Box]:
    """Yield the boxes that elements are in, in order: at most two for each dimension, and one more.

    Args:
        first: The number of the first element.
        last: The number after that of the last.
        shape: The shape of the tensor.

    Example:
        >>> list(boxes_between(2, 12, (4, 4)))
        [((0, 1), (2, 4)), ((1, 3), (0, 4))]
    """
    if first == last:
        return
    if len(shape) < 2:
        yield ((first, last),) if shape else ()
        return
    row = prod(shape[1:])
    top, end = -(-first // row), last // row
    if top > end:  # in the middle of one row
        for inner in boxes_between(first - end * row, last - end * row, shape[1:]):
            yield (end, top), *inner
        return
    for inner in boxes_between(first - (top - 1) * row, row, shape[1:]) if first < top * row else ():
        yield (top - 1, top), *inner
    if top < end:
        yield (top, end), *((0, n) for n in shape[1:])
    for inner in boxes_between(0, last - end * row, shape[1:]):
        yield (end, end + 1), *inner


@dataclass(frozen=True, slots=True)
class Sharded:
    """A tensor of which shards are on disk.

    Args:
        shards: Each with where it begins and ends in each dimension, in order. Together they make up the tensor.
        starts: Where each begins in the first dimension.
        longest: The size of the longest in the first dimension.
        check: Is called with a shard before it is read.
    """

    shards: Sequence[tuple[Box, Tensor]]
    starts: Sequence[int]
    longest: int
    check: Callable[[Tensor], None]

    @classmethod
    def of(cls, shards: Sequence[tuple[Box, Tensor]], check: Callable[[Tensor], None]) -> Self:
        """Return the tensor that shards make up.

        Args:
            shards: At least one, each with where it begins and ends in each dimension.
            check: Is called with a shard before it is read.
        """
        ordered = sorted(shards, key=lambda one: one[0])
        rows = [box[0] if box else (0, 1) for box, _ in ordered]
        return cls(ordered, [begin for begin, _ in rows], max(end - begin for begin, end in rows), check)

    def read(self, inside: Box, first: int, last: int) -> Tensor:
        """Return elements of a part of the tensor, as a tensor of one dimension.

        Args:
            inside: The part.
            first: The number of the first element in it.
            last: The number after that of the last.
        """
        for box, shard in self._around(inside):
            if box == inside and shard.is_contiguous():
                self.check(shard)
                return copy_if_unaligned(shard.reshape(-1)[first:last])
        found, at = torch.empty(last - first, dtype=self.shards[0][1].dtype), 0
        for box in boxes_between(first, last, sizes_of(inside)):
            end = at + prod(sizes_of(box))
            here = tuple((begin + a, begin + b) for (begin, _), (a, b) in zip(inside, box, strict=True))
            self._copy(here, found[at:end].view(sizes_of(box)))
            at = end
        return found

    def _around(self, box: Box) -> Sequence[tuple[Box, Tensor]]:
        """Return the shards that may have elements of a part: those that meet it in the first dimension."""
        begin, end = box[0] if box else (0, 1)
        return self.shards[bisect_right(self.starts, begin - self.longest) : bisect_left(self.starts, end)]

    def _copy(self, here: Box, to: Tensor) -> None:
        for box, shard in self._around(here):
            both = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(here, box, strict=True)]
            if all(a < b for a, b in both):
                self.check(shard)
                to[_slices(both, here)] = shard[_slices(both, box)]


def _slices(part: Sequence[tuple[int, int]], of: Box) -> tuple[slice, ...]:
    return tuple(slice(a - begin, b - begin) for (a, b), (begin, _) in zip(part, of, strict=True))

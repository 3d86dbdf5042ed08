"""Weighted sums of the segments of a record, for several averages in one pass, a part of a tensor at a time."""

from collections.abc import Iterator, Sequence
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from polyak.record.files import Box, SegmentFile, full_box
from polyak.storage.safetensors import TensorInfo, cast

# How many numbers of all segments together are in memory.
_CHUNK = 1 << 22


class Reader(Protocol):
    """What is read of a segment: each tensor, or the local shard of a rank."""

    def read(self, name: str, box: Box | None = None, before: Tensor | None = None) -> Tensor:
        """Return a tensor, or a box of it.

        Args:
            name: The tensor's name.
            box: Which of its elements; None for all.
            before: These elements in the segment before, if they are known.
        """
        ...


class Products:
    """The inner products of the differences between neighboring means, over all averaged tensors.

    Args:
        pairs: How many pairs of neighbors there are.

    Attributes:
        sums: For each two pairs, the sum so far.
    """

    def __init__(self, pairs: int) -> None:
        self.sums = torch.zeros(pairs, pairs, dtype=torch.float64)

    def add(self, files: Sequence[SegmentFile], name: str, info: TensorInfo) -> None:
        """Read a tensor and add its products.

        Args:
            files: The segments, oldest first.
            name: The tensor's name.
            info: The tensor.
        """
        for box in _boxes(info.shape, _CHUNK // len(files)) if info.averaged and len(files) > 1 else ():
            self.add_means([mean for mean in _read(files, name, box, [True] * len(files)) if mean is not None])

    @torch.no_grad()
    def add_means(self, means: Sequence[Tensor]) -> None:
        """Add the products of some elements of a tensor.

        Args:
            means: These elements in each segment.
        """
        if not len(self.sums):
            return
        flat = [_flat(mean) for mean in means]
        for parts in zip(*(mean.split(max(1, _CHUNK // len(flat))) for mean in flat), strict=True):
            rows = torch.stack([part.float() for part in parts]).diff(dim=0).neg_()
            self.sums += (rows @ rows.T).double()


@torch.no_grad()
def combine(  # noqa: PLR0917  one pass, with all that it needs
    files: Sequence[Reader],
    name: str,
    info: TensorInfo,
    coefficients: Sequence[Sequence[float]],
    results: Sequence[Tensor],
    products: Products | None = None,
) -> None:
    """Compute a tensor of several averages; add to ``products`` from the same reads.

    Sums are in float64. In addition to the results, memory is bounded by one row of the tensor, or 4 million numbers,
    for all segments together. The parts that are read do not depend on the number of averages, and so neither do the
    bits of an average and of ``products``.

    Args:
        files: The segments, oldest first, and after them the raw weights if they count.
        name: The tensor's name.
        info: The tensor.
        coefficients: For each average, the weight of each file.
        results: For each average, the tensor that is overwritten.
        products: The products of the segments, to be added to; None for none.

    Raises:
        RecordError: If a file is damaged, or a value is infinite in the dtype of a result.
    """
    segments = len(files) if products is None else len(products.sums) + 1
    for box in _boxes(info.shape, _CHUNK // (segments + 2)):
        in_products = [products is not None and i < segments for i in range(len(files))]
        needed = [one or any(weights) for one, *weights in zip(in_products, *coefficients, strict=True)]
        means = _read(files, name, box, needed)
        if len(results) > 1:  # each number is converted once, and not for each average
            means = [mean if mean is None else mean.to(_exact(mean)) for mean in means]
        for weights, result in zip(coefficients, results, strict=True):
            target = result if box is None else result[box]
            target.copy_(cast(name, _sum(means, weights, target), result.dtype))
        if products is not None:
            products.add_means([mean for mean in means[:segments] if mean is not None])


def _read(files: Sequence[Reader], name: str, box: Box | None, needed: Sequence[bool]) -> list[Tensor | None]:
    """Return some elements of a tensor in each file in turn: a difference is added to what was read before it."""
    means: list[Tensor | None] = []
    for file, one in zip(files, needed, strict=True):
        means.append(file.read(name, box, means[-1] if means else None) if one else None)
    return means


def _exact(tensor: Tensor) -> torch.dtype:
    return torch.complex128 if tensor.is_complex() else torch.float64


def _sum(means: Sequence[Tensor | None], weights: Sequence[float], like: Tensor) -> Tensor:
    total = torch.zeros(like.shape, dtype=_exact(like))
    for mean, weight in zip(means, weights, strict=True):
        if weight and mean is not None:
            total.add_(mean, alpha=weight)
    return total


def _boxes(shape: tuple[int, ...], most: int) -> Iterator[Box | None]:
    """Yield the boxes of a tensor to read in turn: all of it, or rows with about ``most`` elements."""
    if prod(shape) <= most:
        yield None
        return
    rows = max(1, most // prod(shape[1:]))
    for at in range(0, shape[0], rows):
        yield slice(at, min(at + rows, shape[0])), *full_box(shape[1:])


def _flat(tensor: Tensor) -> Tensor:
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)

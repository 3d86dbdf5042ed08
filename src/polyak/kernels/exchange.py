"""Swaps tensors in plain torch, and computes checksums, which show whether tensors have changed."""

from collections.abc import Iterator, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from polyak.kernels.pairs import Pair
from polyak.kernels.pieces import SCRATCH_ELEMENTS, num_pieces, piece_of, views_of


class Exchange:
    """Swap the values of pairs of tensors in place, through a scratch buffer of bounded size.

    An interrupt or an error of a device may stop a swap anywhere. ``forward`` then completes it, and ``back`` undoes
    it: each step gives the same result when it is repeated.

    Args:
        pairs: Pairs of one shape, dtype and device each.
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._changed = [False] * len(pairs)
        self._left = [pair.left.detach() for pair in pairs]
        self._sums: list[int] | None = None
        self._buckets = list(_buckets(pairs))
        self._done = self._undone = 0
        # The bucket that is being swapped, for its three steps.
        self._current: tuple[int, list[Tensor], list[Tensor], list[Tensor]] = (-1, [], [], [])
        largest = dict[tuple[torch.dtype, torch.device], int]()
        for views, _ in self._buckets:
            first = views[0][0]
            size = min(SCRATCH_ELEMENTS, sum(a.numel() for a, _ in views))
            largest[first.dtype, first.device] = max(size, largest.get((first.dtype, first.device), 0))
        self._scratches = {
            (dtype, device): torch.empty(size, dtype=dtype, device=device) for (dtype, device), size in largest.items()
        }

    @property
    def changed(self) -> list[bool]:
        """For each pair whether the left tensor changed between ``forward`` and ``back``, once ``back`` is done."""
        return self._changed

    def forward(self) -> None:
        """Swap what has not been swapped yet."""
        while self._done < 3 * len(self._buckets):
            self._step(self._done)
            self._done += 1
        self._sums = checksums(self._left)

    def back(self) -> None:
        """Swap back what has been swapped, the last first."""
        if self._sums is not None:
            with suppress(Exception):  # to swap back matters more than to know what changed
                sums = checksums(self._left)
                self._changed = [now != before for now, before in zip(sums, self._sums, strict=True)]
            self._sums = None
        while self._done % 3:
            self._step(self._done)
            self._done += 1
        while self._undone < self._done:
            bucket, phase = divmod(self._undone, 3)
            self._step(self._done - 3 * (bucket + 1) + phase)
            self._undone += 1
        self._done = self._undone = 0

    def _step(self, step: int) -> None:
        bucket, phase = divmod(step, 3)
        if self._current[0] != bucket:
            self._current = bucket, *self._pieces_of(bucket)
        _, backup, left, right = self._current
        into, source = ((backup, left), (left, right), (right, backup))[phase]
        torch._foreach_copy_(into, source)

    def _pieces_of(self, bucket: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return the pieces in a bucket: parts of the scratch for them, the left ones and the right ones."""
        views, number = self._buckets[bucket]
        left, right = ([piece_of(view, number) for view in side] for side in zip(*views, strict=True))
        sizes = [a.numel() for a in left]
        parts = self._scratches[left[0].dtype, left[0].device][: sum(sizes)].split(sizes)
        return [part.view(a.shape) for part, a in zip(parts, left, strict=True)], left, right


_Views = list[tuple[Tensor, Tensor]]


def _buckets(pairs: Sequence[Pair]) -> Iterator[tuple[_Views, int]]:
    """Group pairs of one dtype and device in buckets of at most ``SCRATCH_ELEMENTS``.

    A bucket is views of pairs and the number of the piece of each that is in it: a view of each piece would take a KiB.
    """
    kinds = dict[tuple[torch.dtype, torch.device], _Views]()
    for a, b, _ in pairs:
        # The alias keeps the memory, whatever becomes of the model's tensor. The right one only has to be kept.
        small = a.numel() <= SCRATCH_ELEMENTS and a.is_contiguous() and b.is_contiguous()
        view, other = (a.detach(), b) if small else views_of((a.detach(), b))
        kinds.setdefault((a.dtype, a.device), []).append((view, other))
    for views in kinds.values():
        bucket, size = _Views(), 0
        for a, b in views:
            if bucket and size + a.numel() > SCRATCH_ELEMENTS:
                yield bucket, 0
                bucket, size = _Views(), 0
            if a.numel() > SCRATCH_ELEMENTS:
                large = [(a, b)]
                yield from ((large, number) for number in range(num_pieces(a.shape)))
            else:
                bucket.append((a, b))
                size += a.numel()
        if bucket:
            yield bucket, 0


def checksums(tensors: Sequence[Tensor]) -> list[int]:
    """Return for each tensor the sum of its memory, read as integers of 64 bits, modulo 2 ** 64.

    Args:
        tensors: Strided, with memory, on any devices. Waits for the devices.

    Example:
        >>> weights = torch.zeros(3)
        >>> before = checksums([weights])
        >>> weights.data[1] = 1e-30
        >>> checksums([weights]) == before
        False
    """
    found = [0] * len(tensors)
    for device in dict.fromkeys(tensor.device for tensor in tensors):
        numbers = [i for i, tensor in enumerate(tensors) if tensor.device == device]
        sums = torch.stack([_checksum(tensors[i].detach()) for i in numbers]).tolist()
        for i, value in zip(numbers, sums, strict=True):
            found[i] = value
    return found


def _checksum(tensor: Tensor) -> Tensor:
    tensor = tensor.resolve_conj().resolve_neg()
    (flat,) = views_of([tensor])
    size = tensor.element_size()
    # All but a few bytes at the end, as words, where the address allows that.
    words = flat.numel() * size // 8 * 8 // size if flat.storage_offset() * size % 8 == 0 else 0
    if not flat.is_contiguous() or words * size % 8:
        flat, words = flat.contiguous(), 0
    rest = flat[words:].view(-1).view(torch.uint8).sum(dtype=torch.int64)
    return flat[:words].view(torch.int64).sum() + rest if words else rest

"""The kernels in plain torch: ``_foreach`` operations where they serve, a small scratch buffer where they do not."""

import math
from collections.abc import Iterator, Sequence
from itertools import compress

import torch
from torch import Tensor

# Small enough to stay in a core's cache, large enough that the calls do not count.
SCRATCH_ELEMENTS = 131_072

_SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def _flat_pieces(tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Cut tensors of one shape in flat views of at most ``SCRATCH_ELEMENTS``, all at the same places.

    Tensors that are not dense, or not laid out alike, come whole.
    """
    first = tensors[0]
    order = sorted(range(first.dim()), key=first.stride, reverse=True)
    views = [tensor.permute(order) for tensor in tensors]
    if all(view.is_contiguous() for view in views):
        yield from zip(*(view.view(-1).split(SCRATCH_ELEMENTS) for view in views), strict=True)
    else:
        yield tuple(tensors)


def _finite(tensor: Tensor) -> Tensor:
    """Return a 0-dim bool: whether all of ``tensor`` is finite. A sum is one, and the fastest test that torch has."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return tensor.sum(dtype=wide).isfinite()


def lerp_(averages: Sequence[Tensor], online: Sequence[Tensor], weight: float, seeds: Sequence[int]) -> Tensor:
    """Do ``average += weight * (weights - average)`` in place for many tensors.

    The arithmetic is in the average's dtype, or in float32 for a 16-bit average, which is then rounded stochastically.
    A tensor of ``online`` with a non-finite value leaves its average as it was; nothing here waits for a device.

    Args:
        averages: Tensors to move.
        online: Tensors to move them towards, of the same shapes and on the same devices.
        weight: Share of ``online`` taken, from 0 to 1.
        seeds: For each tensor the seed of its rounding, below 2 ** 32; used for 16-bit averages only.

    Returns:
        The number of tensors that were left out because they are not finite, as a 0-dim tensor on the first device.
    """
    if not averages:
        return torch.zeros((), dtype=torch.int64)
    finite = [_finite(tensor) for tensor in online]
    flags = torch.stack([flag.to(averages[0].device) for flag in finite])
    # Reading a flag costs nothing on the CPU and stalls the queue of any other device.
    if all(tensor.device.type == "cpu" for tensor in averages) and bool(flags.all()):
        _lerp_all(averages, online, weight, seeds)
    else:
        for average, tensor, flag, seed in zip(averages, online, finite, seeds, strict=True):
            # Where the flag does not hold, the average moves towards itself.
            _lerp(average, tensor, weight, seed, flag)
    return (~flags).sum()


def _lerp_all(averages: Sequence[Tensor], online: Sequence[Tensor], weight: float, seeds: Sequence[int]) -> None:
    alike = [a.dtype == x.dtype and a.dtype not in _SIXTEEN_BITS for a, x in zip(averages, online, strict=True)]
    if any(alike):
        # The form with one product: `decay * a + (1 - decay) * x` loses a share at every update, because the two
        # rounded factors do not sum to 1 (2e-3 against 1e-5 after 100,000 updates).
        torch._foreach_lerp_(list(compress(averages, alike)), list(compress(online, alike)), weight)
    for average, tensor, seed, done in zip(averages, online, seeds, alike, strict=True):
        if not done:
            _lerp(average, tensor, weight, seed)


def _lerp(average: Tensor, tensor: Tensor, weight: float, seed: int, flag: Tensor | None = None) -> None:
    """Move one average piece by piece, if ``flag`` holds, without looking at it."""
    wide = torch.float32 if average.dtype in _SIXTEEN_BITS else average.dtype
    start = 0
    for a, x in _flat_pieces((average, tensor)):
        target = x.to(wide) if flag is None else torch.where(flag, x, a).to(wide)
        if average.dtype == wide:
            a.lerp_(target, weight)
        else:
            a.copy_(_round(a.to(wide).lerp_(target, weight), average.dtype, seed, start))
        start += a.numel()


def _round(tensor: Tensor, dtype: torch.dtype, seed: int, start: int) -> Tensor:
    """Round float32 to 16 bits up or down by chance, so that the expectation is the value itself.

    The chance comes from a counter: the element's index from ``start``, hashed with ``seed``. So it is the same on
    each device and in each split of the work, and needs no state.
    """
    index = torch.arange(start, start + tensor.numel(), device=tensor.device).view(tensor.shape)
    noise = _hash(_hash(index & 0xFFFFFFFF) ^ _hash(index >> 32) ^ seed)
    # In units of the last place of `dtype`, which below its smallest normal number no longer shrinks.
    _, exponent = torch.frexp(tensor)
    limits = torch.finfo(dtype)
    unit = torch.ldexp(torch.full_like(tensor, limits.eps), exponent - 1).clamp_(min=limits.tiny * limits.eps)
    bits = 24 + round(math.log2(limits.eps)) - 1  # that float32 has and `dtype` has not
    chance = (noise >> (32 - bits)).to(torch.float32) / 2**bits
    rounded = (tensor / unit + chance).floor_() * unit
    return rounded.clamp_(limits.min, limits.max).to(dtype)


def _hash(x: Tensor) -> Tensor:
    """Mix the lower 32 bits of an int64 tensor: ``lowbias32`` of Wellons, https://nullprogram.com/blog/2018/07/31/ ."""
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x735A2D97) & 0xFFFFFFFF
    return x ^ (x >> 15)


class Exchange:
    """Swap the values of two lists of tensors in place, all or nothing, through a scratch buffer of bounded size.

    An exchange may be stopped anywhere, by an interrupt or an error of a device. It then goes on, or back, from where
    it was: each of its steps gives the same when it is done again.

    Args:
        left: Tensors.
        right: As many, of the same shapes, dtypes and devices.
    """

    def __init__(self, left: Sequence[Tensor], right: Sequence[Tensor]) -> None:
        self._buckets = list(_buckets(left, right))
        self._done = self._undone = 0
        largest = dict[tuple[torch.dtype, torch.device], int]()
        for bucket in self._buckets:
            size = sum(a.numel() for a, _ in bucket)
            key = (bucket[0][0].dtype, bucket[0][0].device)
            largest[key] = max(size, largest.get(key, 0))
        self._scratches = {
            (dtype, device): torch.empty(size, dtype=dtype, device=device) for (dtype, device), size in largest.items()
        }

    def forward(self) -> None:
        """Swap what has not been swapped yet."""
        while self._done < 3 * len(self._buckets):
            self._step(self._done)
            self._done += 1

    def back(self) -> None:
        """Swap back what has been swapped, the last first."""
        while self._done % 3:
            self._step(self._done)
            self._done += 1
        while self._undone < self._done:
            bucket, phase = divmod(self._undone, 3)
            self._step(self._done - 3 * (bucket + 1) + phase)
            self._undone += 1
        self._done = self._undone = 0

    def _step(self, step: int) -> None:
        bucket = self._buckets[step // 3]
        left, right = [a for a, _ in bucket], [b for _, b in bucket]
        scratch = self._scratches[left[0].dtype, left[0].device]
        parts = scratch[: sum(a.numel() for a in left)].split([a.numel() for a in left])
        aside = [part.view(a.shape) for part, a in zip(parts, left, strict=True)]
        into, source = ((aside, left), (left, right), (right, aside))[step % 3]
        torch._foreach_copy_(into, source)


def _buckets(left: Sequence[Tensor], right: Sequence[Tensor]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Group pieces of one dtype and device into buckets of at most ``SCRATCH_ELEMENTS``."""
    kinds = dict[tuple[torch.dtype, torch.device], list[tuple[Tensor, Tensor]]]()
    for a, b in zip(left, right, strict=True):
        pieces = kinds.setdefault((a.dtype, a.device), [])
        pieces += [(piece[0], piece[1]) for piece in _flat_pieces((a, b))]
    for pieces in kinds.values():
        bucket, size = list[tuple[Tensor, Tensor]](), 0
        for piece in pieces:
            if bucket and size + piece[0].numel() > SCRATCH_ELEMENTS:
                yield bucket
                bucket, size = list[tuple[Tensor, Tensor]](), 0
            bucket.append(piece)
            size += piece[0].numel()
        yield bucket

"""The kernels in plain torch: ``_foreach`` operations where they serve, a small scratch buffer where they do not."""

import math
from collections.abc import Iterator, Sequence
from ctypes import c_float
from itertools import compress
from typing import TypeVar

import torch
from torch import Tensor

from polyak.kernels.place import Box, Place

# Small enough to stay in a core's cache, large enough that the calls do not count.
SCRATCH_ELEMENTS = 131_072

# Tensors up to here are taken together, so many that they fit in the scratch.
_SMALL = 1024

# Weights from here on may be 1 in float32.
_NEARLY_ALL = 1 - 2**-25

SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def _pieces(tensors: Sequence[Tensor], *, in_order: bool = False) -> Iterator[tuple[Tensor, ...]]:
    """Cut tensors of one shape in views of at most ``SCRATCH_ELEMENTS``, all at the same places.

    Args:
        tensors: Of any layouts.
        in_order: Whether the pieces must follow each other as the indices count, and not as they lie in memory.
    """
    views = _views(tensors, in_order=in_order)
    for number in range(_num_pieces(views[0].shape)):
        yield tuple(_piece(view, number) for view in views)


def _views(tensors: Sequence[Tensor], *, in_order: bool = False) -> list[Tensor]:
    """Return flat views of tensors that are dense and laid out alike, and others as they are."""
    first = tensors[0]
    order = list(range(first.dim()))
    if not in_order:
        order.sort(key=first.stride, reverse=True)
    views = [tensor.permute(order) for tensor in tensors]
    return [view.view(-1) for view in views] if all(view.is_contiguous() for view in views) else list(tensors)


def _cut(shape: torch.Size) -> tuple[int, int, int]:
    """Return along which dimension a shape is cut, how many of its indices are a piece, and how many pieces they are.

    A piece takes in all of the dimensions behind it, and one index of each before.
    """
    dim = next(d for d in range(len(shape)) if math.prod(shape[d + 1 :]) <= SCRATCH_ELEMENTS)
    count = SCRATCH_ELEMENTS // math.prod(shape[dim + 1 :])
    return dim, count, -(-shape[dim] // count)


def _num_pieces(shape: torch.Size) -> int:
    if shape.numel() <= SCRATCH_ELEMENTS:
        return 1
    dim, _, pieces = _cut(shape)
    return math.prod(shape[:dim]) * pieces


def _piece(tensor: Tensor, number: int) -> Tensor:
    """Return the piece of this number: a view of at most ``SCRATCH_ELEMENTS``."""
    if tensor.numel() <= SCRATCH_ELEMENTS:
        return tensor
    if tensor.dim() == 1:  # most are, and this is quicker
        return tensor[number * SCRATCH_ELEMENTS : (number + 1) * SCRATCH_ELEMENTS]
    dim, count, pieces = _cut(tensor.shape)
    before, last = divmod(number, pieces)
    index = [slice(last * count, (last + 1) * count)]
    for size in reversed(tensor.shape[:dim]):
        before, at = divmod(before, size)
        index.insert(0, slice(at, at + 1))
    return tensor[tuple(index)]


def _together(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Group small tensors of one dtype, up to ``SCRATCH_ELEMENTS`` in all. Others come alone."""
    kinds = dict[tuple[torch.dtype, torch.device], list[Tensor]]()
    for tensor in tensors:
        if tensor.numel() > _SMALL:
            yield [tensor]
        else:
            kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for kind in kinds.values():
        for i in range(0, len(kind), SCRATCH_ELEMENTS // _SMALL):
            yield kind[i : i + SCRATCH_ELEMENTS // _SMALL]


def _sum_is_finite(tensors: list[Tensor], scratch: "_Scratch") -> Tensor:
    """Return a 0-dim bool: if it holds all of ``tensors`` is finite, and if not there is reason to look."""
    # What is small is copied first: a call for each would cost more than the copies.
    all_of_it = tensors[0]
    if len(tensors) > 1:
        flat = [tensor.reshape(-1) for tensor in tensors]
        room = scratch.all(all_of_it.dtype, all_of_it.device, "seen")
        all_of_it = torch.cat(flat, out=room[: sum(tensor.numel() for tensor in flat)])
    if all_of_it.is_complex():
        all_of_it = torch.view_as_real(all_of_it)
    wide = torch.float64 if all_of_it.dtype == torch.float64 else torch.float32
    return all_of_it.sum(dtype=wide).isfinite()


def _is_grouped(average: Tensor) -> bool:
    """Return whether it is moved together with others."""
    return average.dtype not in SIXTEEN_BITS and average.numel() <= _SMALL


def _groups(pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Group averages of one dtype, with their weights, up to ``SCRATCH_ELEMENTS`` in all."""
    kinds = dict[tuple[torch.dtype, torch.dtype, torch.device], list[tuple[Tensor, Tensor]]]()
    for average, tensor in pairs:
        kinds.setdefault((average.dtype, tensor.dtype, average.device), []).append((average, tensor))
    for kind in kinds.values():
        for i in range(0, len(kind), SCRATCH_ELEMENTS // _SMALL):
            group = kind[i : i + SCRATCH_ELEMENTS // _SMALL]
            yield [average for average, _ in group], [tensor for _, tensor in group]


class Lerp:
    """Do ``average += weight * (online - average)`` in place for many tensors, again and again.

    The arithmetic is in the average's dtype, or in float32 for a 16-bit average, which is then rounded stochastically.
    A value of ``online`` that is not finite leaves that element of the average as it was, whatever its neighbours are:
    so the outcome depends on no split of the work, over threads, devices or shards, and takes one pass over memory.
    Nothing here waits for a device.

    Args:
        averages: Tensors to move.
        online: Tensors to move them towards, of the same shapes and on the same devices.
        places: For each tensor what its rounding depends on; used for 16-bit averages only.
        left_out: A 0-dim int64 tensor on the first average's device, which counts the tensors that were not all finite.
    """

    def __init__(
        self, averages: Sequence[Tensor], online: Sequence[Tensor], places: Sequence[Place], left_out: Tensor
    ) -> None:
        self._triples = list(zip(averages, online, places, strict=True))
        self._left_out = left_out
        alike = [a.dtype == x.dtype and a.dtype not in SIXTEEN_BITS for a, x in zip(averages, online, strict=True)]
        self._alike = list(compress(averages, alike)), list(compress(online, alike))
        self._scratch = _Scratch()
        self._on_cpu = all(tensor.device.type == "cpu" for tensor in averages)
        others = [triple for triple, same in zip(self._triples, alike, strict=True) if not same and self._on_cpu]
        self._others = [triple for triple in others if not _is_grouped(triple[0])]
        grouped = [(a, x) for a, x, _ in others if _is_grouped(a)]
        self._groups = [(*group, self._scratch.parts(*group)) for group in _groups(grouped)]
        self._online = list(_together(online))

    def __call__(self, weight: float, num_updates: int) -> None:
        """Move every average once.

        Args:
            weight: Share of ``online`` taken, from 0 to 1.
            num_updates: How often this was done. It is part of the seed.
        """
        if not self._triples:
            return
        # Reading a flag costs nothing on the CPU and stalls the queue of any other device.
        if self._on_cpu and bool(torch.stack([_sum_is_finite(xs, self._scratch) for xs in self._online]).all()):
            if self._alike[0] and weight < _NEARLY_ALL:
                # The form with one product: `decay * a + (1 - decay) * x` loses a share at every update, because the
                # two rounded factors do not sum to 1 (2e-3 against 1e-5 after 100,000 updates).
                torch._foreach_lerp_(*self._alike, weight)
            if weight < _NEARLY_ALL:
                for averages, tensors, parts in self._groups:
                    torch._foreach_copy_(parts, tensors)
                    torch._foreach_lerp_(averages, parts, weight)
            for average, tensor, place in self._others if weight < _NEARLY_ALL else self._triples:
                _lerp(average, tensor, weight, _Chances(place, average, num_updates), self._scratch)
            return
        for average, tensor, place in self._triples:
            chances = _Chances(place, average, num_updates)
            finite = _lerp_finite(average, tensor, weight, chances, self._scratch)
            self._left_out.add_(finite.logical_not().to(self._left_out.device))


def lerp_(
    averages: Sequence[Tensor],
    online: Sequence[Tensor],
    weight: float,
    places: Sequence[Place],
    num_updates: int = 0,
    *,
    by: type[Lerp] = Lerp,
) -> Tensor:
    """Do once what ``Lerp`` does, and return how many tensors were not all finite, as a 0-dim tensor.

    Args:
        averages: Tensors to move.
        online: Tensors to move them towards, of the same shapes and on the same devices.
        weight: Share of ``online`` taken, from 0 to 1.
        places: For each tensor what its rounding depends on; used for 16-bit averages only.
        num_updates: How often this was done. It is part of the seed.
        by: Which kernel does it.
    """
    left_out = torch.zeros((), dtype=torch.int64, device=averages[0].device if averages else None)
    by(averages, online, places, left_out)(weight, num_updates)
    return left_out


class _Scratch:
    """Memory for one piece at a time in another dtype than its own, kept from update to update."""

    def __init__(self) -> None:
        self._held = dict[tuple[str, torch.dtype, torch.device], Tensor]()

    def like(self, piece: Tensor, dtype: torch.dtype, purpose: str) -> Tensor:
        """Return a tensor of the shape of ``piece``, with whatever is in it.

        Args:
            piece: A piece.
            dtype: Of the result.
            purpose: Two results at a time have two purposes.
        """
        return self.all(dtype, piece.device, purpose)[: piece.numel()].view(piece.shape)

    def parts(self, averages: list[Tensor], online: list[Tensor]) -> list[Tensor]:
        """Return a part of one scratch for each of ``online``, in the dtype of ``averages``."""
        scratch = self.all(averages[0].dtype, averages[0].device, "target")
        sizes = [tensor.numel() for tensor in online]
        parts = scratch[: sum(sizes)].split(sizes)
        return [part.view(tensor.shape) for part, tensor in zip(parts, online, strict=True)]

    def all(self, dtype: torch.dtype, device: torch.device, purpose: str) -> Tensor:
        """Return all ``SCRATCH_ELEMENTS`` of one scratch."""
        key = purpose, dtype, device
        if key not in self._held:
            self._held[key] = torch.empty(SCRATCH_ELEMENTS, dtype=dtype, device=device)
        return self._held[key]


def _lerp(average: Tensor, tensor: Tensor, weight: float, chances: "_Chances", scratch: _Scratch) -> None:
    """Move one average piece by piece."""
    for a, x in _pieces((average, tensor), in_order=chances.in_order):
        _lerp_piece(a, _as_wide(x, a, scratch), weight, chances, scratch)


def _lerp_finite(average: Tensor, tensor: Tensor, weight: float, chances: "_Chances", scratch: _Scratch) -> Tensor:
    """Move one average piece by piece where ``tensor`` is finite, and return whether all of it is."""
    flags = list[Tensor]()
    for a, x in _pieces((average, tensor), in_order=chances.in_order):
        finite = x.isfinite()
        flags.append(finite.all())
        # Where it is not, the average moves towards itself.
        target = scratch.like(a, _wide(a.dtype), "target").copy_(x)
        _lerp_piece(a, torch.where(finite, target, a, out=target), weight, chances, scratch)
    return torch.stack(flags).all()


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return in which dtype an average of ``dtype`` is moved."""
    return torch.float32 if dtype in SIXTEEN_BITS else dtype


def _as_wide(tensor: Tensor, average: Tensor, scratch: _Scratch) -> Tensor:
    wide = _wide(average.dtype)
    return tensor if tensor.dtype == wide else scratch.like(average, wide, "target").copy_(tensor)


def _lerp_piece(average: Tensor, target: Tensor, weight: float, chances: "_Chances", scratch: _Scratch) -> None:
    if average.dtype in SIXTEEN_BITS:
        moved = scratch.like(average, torch.float32, "moved").copy_(average)
        _lerp_wide(moved, target, weight)
        average.copy_(_round(moved, average.dtype, chances.of(average)))
    else:
        _lerp_wide(average, target, weight)


def _lerp_wide(average: Tensor, tensor: Tensor, weight: float) -> None:
    # Torch's own gives -0.0 or 0.0 here, depending on the place in the tensor.
    if weight == 1 or (average.dtype == torch.float32 and c_float(weight).value == 1):
        average.copy_(tensor)
    else:
        average.lerp_(tensor, weight)


class _Chances:
    """The chances of rounding up in one update of one average, piece after piece.

    A chance comes from a counter: the element's index in the whole, hashed with a key. So it is the same on each device
    and in each split of the work, and needs no state.
    """

    def __init__(self, place: Place, average: Tensor, num_updates: int) -> None:
        rounded = average.dtype in SIXTEEN_BITS
        self._box = place.box(tuple(average.shape)) if rounded else None
        self._key = key(place.seed, num_updates)
        self._start = 0
        self.in_order = rounded and place.shape is not None

    def of(self, piece: Tensor) -> Tensor:
        """Return a chance below 2 ** 16 for each element of the next piece."""
        assert self._box is not None
        flat = torch.arange(self._start, self._start + piece.numel(), device=piece.device)
        self._start += piece.numel()
        return _chance(_indices(self._box, flat), self._key).view(piece.shape)


def _indices(box: Box, flat: Tensor) -> Tensor:
    """Return where in the whole the elements are that are ``flat`` in the box."""
    index, rest = torch.full_like(flat, box.first), flat
    for size, step in zip(reversed(box.sizes[1:]), reversed(box.steps[1:]), strict=True):
        index += rest % size * step
        rest = rest // size
    return index.add_(rest, alpha=box.steps[0])


def _chance(index: Tensor, key: int) -> Tensor:
    # 32 bits for two neighbours.
    counter = index >> 1
    drawn = _hash((counter & 0xFFFFFFFF) ^ key ^ _hash(counter >> 32))
    return (drawn >> ((index & 1) << 4)) & 0xFFFF


def _round(tensor: Tensor, dtype: torch.dtype, chance: Tensor) -> Tensor:
    """Round float32 to 16 bits up or down by chance, so that the expectation is the value itself.

    What is too large for ``dtype`` becomes its largest. A ``chance`` is below 2 ** 16.
    """
    limits = torch.finfo(dtype)
    if dtype == torch.bfloat16:  # float32 without its last 16 bits: what they say is the chance of rounding up
        bits = tensor.view(torch.int32)
        magnitude = bits & 0x7FFFFFFF
        rounded = (magnitude + chance.to(torch.int32)).clamp_(max=0x7F7FFFFF)
        rounded = torch.where(tensor.isnan(), 0x7FC00000, torch.where(tensor.isinf(), 0x7F7FFFFF, rounded))
        return ((rounded | (bits & -0x80000000)) >> 16).to(torch.int16).view(dtype)
    # In units of the last place of `dtype`, which below its smallest normal number no longer shrinks.
    _, exponent = torch.frexp(tensor)
    unit = torch.ldexp(torch.full_like(tensor, limits.eps), exponent - 1).clamp_(min=limits.tiny * limits.eps)
    bits = 24 + round(math.log2(limits.eps)) - 1  # that float32 has and `dtype` has not
    rounded = (tensor / unit + (chance >> (16 - bits)).to(torch.float32) / 2**bits).floor_() * unit
    return rounded.clamp_(limits.min, limits.max).to(dtype)


def key(seed: int, num_updates: int) -> int:
    """Return what the chances of one tensor in one update are hashed with.

    Args:
        seed: The tensor's.
        num_updates: The update's.
    """
    return _hash((seed ^ _hash(num_updates & 0xFFFFFFFF)) & 0xFFFFFFFF)


_Bits = TypeVar("_Bits", int, Tensor)


def _hash(x: _Bits) -> _Bits:
    """Mix the lower 32 bits of an int: ``lowbias32`` of Wellons, https://nullprogram.com/blog/2018/07/31/ ."""
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
        # Of the bucket that is being swapped, for its three steps.
        self._here: tuple[int, list[Tensor], list[Tensor], list[Tensor]] = (-1, [], [], [])
        largest = dict[tuple[torch.dtype, torch.device], int]()
        for pairs, _ in self._buckets:
            first = pairs[0][0]
            size = min(SCRATCH_ELEMENTS, sum(a.numel() for a, _ in pairs))
            largest[first.dtype, first.device] = max(size, largest.get((first.dtype, first.device), 0))
        self._scratches = {
            (dtype, device): torch.empty(size, dtype=dtype, device=device) for (dtype, device), size in largest.items()
        }

    @property
    def has_views(self) -> bool:
        """Whether this keeps the memory of its tensors, which so outlasts them."""
        return bool(self._buckets)

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
        bucket, phase = divmod(step, 3)
        if self._here[0] != bucket:
            self._here = bucket, *self._pieces_of(bucket)
        _, aside, left, right = self._here
        into, source = ((aside, left), (left, right), (right, aside))[phase]
        torch._foreach_copy_(into, source)

    def _pieces_of(self, bucket: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return room for the pieces in a bucket, and these, left and right."""
        pairs, number = self._buckets[bucket]
        left, right = ([_piece(view, number) for view in side] for side in zip(*pairs, strict=True))
        sizes = [a.numel() for a in left]
        room = self._scratches[left[0].dtype, left[0].device][: sum(sizes)].split(sizes)
        return [part.view(a.shape) for part, a in zip(room, left, strict=True)], left, right


_Bucket = tuple[list[tuple[Tensor, Tensor]], int]


def _buckets(left: Sequence[Tensor], right: Sequence[Tensor]) -> Iterator[_Bucket]:
    """Group pairs of one dtype and device in buckets of at most ``SCRATCH_ELEMENTS``.

    A bucket is pairs and the number of the piece of each that belongs there: a view of each piece would take a KiB.
    """
    kinds = dict[tuple[torch.dtype, torch.device], list[tuple[Tensor, Tensor]]]()
    for a, b in zip(left, right, strict=True):
        # An alias swaps what was here, whatever becomes of the tensor. The right ones only have to be kept.
        small = a.numel() <= SCRATCH_ELEMENTS and a.is_contiguous() and b.is_contiguous()
        view, other = (a.detach(), b) if small else _views((a.detach(), b))
        kinds.setdefault((a.dtype, a.device), []).append((view, other))
    for pairs in kinds.values():
        bucket, size = list[tuple[Tensor, Tensor]](), 0
        for a, b in pairs:
            if bucket and size + a.numel() > SCRATCH_ELEMENTS:
                yield bucket, 0
                bucket, size = list[tuple[Tensor, Tensor]](), 0
            if a.numel() > SCRATCH_ELEMENTS:
                large = [(a, b)]
                yield from ((large, number) for number in range(_num_pieces(a.shape)))
            else:
                bucket.append((a, b))
                size += a.numel()
        if bucket:
            yield bucket, 0

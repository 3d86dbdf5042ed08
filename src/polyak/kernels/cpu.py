"""The kernels in C for averages on the CPU, where they were compiled: all tensors in one call.

The arithmetic is that of the torch kernels, bit for bit. Pairs of tensors that C does not know go to those.
"""

import ctypes
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, compress, pairwise, product
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from polyak.errors import MemoryLayoutError
from polyak.kernels import foreach
from polyak.kernels.build import LIBRARY, sources_id
from polyak.kernels.place import Box, Place
from polyak.kernels.versions import one_of_each

# The order is that of the functions in lerp.h.
_PAIRS = {
    pair: number
    for number, pair in enumerate(
        [
            (torch.float32, torch.float32),
            (torch.float32, torch.bfloat16),
            (torch.float32, torch.float16),
            (torch.bfloat16, torch.bfloat16),
            (torch.bfloat16, torch.float32),
            (torch.float16, torch.float16),
            (torch.float16, torch.float32),
            (torch.float64, torch.float64),
        ]
    )
}
# Elements that a thread does before it looks for more: 0.1 ms or so. To wake one takes half of that, and it is waited
# for however busy the machine is: so what is less is done without.
_JOB = 1 << 18
_SWAP = 1 << 18  # bytes in a piece that is swapped
_MOST = 1 << 14  # pieces of a whole model, and one more a tensor: the list of them is to stay small


def _load() -> tuple[ctypes.CDLL | None, str]:
    """Return the library, or why there is none."""
    hint = "compile it with: python -m polyak.kernels"
    if not LIBRARY.exists():
        return None, f"{LIBRARY} is not there: no C compiler was found when polyak was installed; {hint}"
    try:
        library = ctypes.CDLL(str(LIBRARY))
        sources = library.polyak_sources
    except (OSError, AttributeError) as error:
        return None, f"{LIBRARY} cannot be loaded ({error}); {hint}"
    sources.restype = ctypes.c_int64
    found = sources()
    if found == 0:
        return None, "this processor lacks the instructions that it needs (AVX2 and FMA)"
    if found != sources_id():
        return None, f"{LIBRARY} was compiled from other sources; {hint}"
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    run = [pointer, number, pointer, pointer, number]  # team, num_threads, items, starts, num_jobs
    library.polyak_lerp.argtypes = [*run, ctypes.c_double, ctypes.c_uint32]
    library.polyak_lerp.restype = number
    library.polyak_swap.argtypes = [*run, number]
    library.polyak_swap.restype = None
    return library, ""


_library, WHY_NOT = _load()


def torch_library() -> ctypes.CDLL:
    """Return torch's own library: its C functions, and those of what it has loaded.

    Raises:
        OSError: If it cannot be found.
    """
    return ctypes.CDLL(torch._C.__file__)  # noqa: SLF001


class _Team:
    """The threads of the OpenMP that torch has loaded, or 0: then C makes threads for each call."""

    def __init__(self) -> None:
        try:
            self.address = ctypes.cast(torch_library().GOMP_parallel, ctypes.c_void_p).value or 0
        except (OSError, AttributeError):
            self.address = 0
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self.address = 0  # a forked process has none of its threads, and would wait for them for ever


_team = _Team()


class _Jobs:
    """Jobs for C, done again and again by as many threads as torch has. An interrupt comes before or after a run.

    Args:
        call: What does them.
        items: Rows of integers, as ``call`` expects them.
        sizes: How much work each row is, in units of which a job has about ``_JOB``.
        held: What the addresses in ``items`` point into.
    """

    def __init__(
        self, call: Callable[..., Any], items: Sequence[tuple[int, ...]], sizes: Sequence[int], held: object
    ) -> None:
        starts, size = [0] if items else [], 0
        for i, more in enumerate(sizes):
            if size and size + more > _JOB:
                starts.append(i)
                size = 0
            size += more
        self.num_jobs = len(starts)
        self.items = torch.tensor(items, dtype=torch.int64, device="cpu")  # torch lays it out by lines of the cache
        self._starts = array("q", [*starts, len(items)])
        self._fixed = self.items.data_ptr(), self._starts.buffer_info()[0], self.num_jobs
        self._call, self._held = call, held

    def run(self, *arguments: float) -> bool:
        """Do them once, and return what ``call`` does.

        Args:
            *arguments: For ``call``.
        """
        num_threads = torch.get_num_threads() if self.num_jobs > 1 else 1
        return bool(self._call(_team.address, num_threads, *self._fixed, *arguments))


_PLAIN = (Tensor, nn.Parameter)


def _lie_alike(one: Tensor, other: Tensor, *, in_order: bool = False) -> bool:
    """Return whether the two are plain, on the CPU, laid out alike and without holes.

    They have one shape. With ``in_order`` they are also laid out as their indices count.
    """
    plain = type(one) in _PLAIN and type(other) in _PLAIN and one.is_cpu and other.is_cpu
    if not (plain and one.layout == other.layout == torch.strided):
        return False
    # The bits of a negative or conjugate view do not say what it holds.
    if one.is_neg() or other.is_neg() or one.is_conj() or other.is_conj():
        return False
    if one.is_contiguous() and other.is_contiguous():
        return one.numel() == other.numel()
    order = sorted(range(one.dim()), key=one.stride, reverse=True)
    return not in_order and all(tensor.permute(order).is_contiguous() for tensor in (one, other))


def _known(average: Tensor, online: Tensor, place: Place) -> bool:
    """Return whether the two are plain, known to C, and laid out as it takes for granted."""
    in_order = place.shape is not None and average.dtype in foreach.SIXTEEN_BITS
    return (average.dtype, online.dtype) in _PAIRS and _lie_alike(average, online, in_order=in_order)


def _box(average: Tensor, place: Place) -> Box:
    """Return where its elements are in the whole, in one run if that does not matter."""
    return (place if average.dtype in foreach.SIXTEEN_BITS else Place(0)).box(tuple(average.shape))


def _cut(box: Box) -> Iterator[tuple[int, int, int, int, int]]:
    """Cut a box in pieces of ``_JOB`` elements or so: where in its memory, rows, the run of each, first index, step."""
    *sizes, run = box.sizes
    rows, step = (sizes.pop(), box.steps[-2]) if sizes else (1, 0)
    at = 0
    for outer in product(*map(range, sizes)):
        start = box.first + sum(i * s for i, s in zip(outer, box.steps, strict=False))
        if run <= _JOB:
            together = _JOB // max(run, 1)
            for row in range(0, rows, together):
                count = min(together, rows - row)
                yield at, count, run, start + row * step, step
                at += count * run
        else:
            for first in range(start, start + rows * step, step) if step else (start,):
                # At multiples of it, so that all pieces but the first begin with a block.
                edges = [first, *range(first - first % _JOB + _JOB, first + run, _JOB), first + run]
                for begin, end in pairwise(edges):
                    yield at, 1, end - begin, begin, 0
                    at += end - begin


class Lerp(foreach.Lerp):
    """Do what ``foreach.Lerp`` does, in C on as many threads as torch has.

    The addresses of the tensors are noted: where they may have moved, make a new one.

    Args:
        averages: Tensors to move.
        online: Tensors to move them towards, of the same shapes and on the same devices.
        places: For each tensor what its rounding depends on; used for 16-bit averages only.
        left_out: A 0-dim int64 tensor on the first average's device, which counts the tensors that were not all finite.
    """

    def __init__(
        self, averages: Sequence[Tensor], online: Sequence[Tensor], places: Sequence[Place], left_out: Tensor
    ) -> None:
        assert _library is not None, WHY_NOT
        triples = list(zip(averages, online, places, strict=True))
        known = [_known(*triple) for triple in triples]
        rest = [triple for triple, c in zip(triples, known, strict=True) if not c]
        super().__init__([a for a, _, _ in rest], [x for _, x, _ in rest], [place for _, _, place in rest], left_out)
        ours = list(compress(triples, known))
        self._moved = one_of_each([a for a, _, _ in ours])
        pieces = [
            (
                a.data_ptr() + at * a.element_size(),
                x.data_ptr() + at * x.element_size(),
                *(rows, run, first, step),
                place.seed | _PAIRS[a.dtype, x.dtype] << 32,
                number,
            )
            for number, (a, x, place) in enumerate(ours)
            for at, rows, run, first, step in _cut(_box(a, place))
        ]
        self._jobs = _Jobs(_library.polyak_lerp, pieces, [piece[2] * piece[3] for piece in pieces], held=ours)

    def __call__(self, weight: float, num_updates: int) -> None:
        """Move every average once.

        Args:
            weight: Share of ``online`` taken, from 0 to 1.
            num_updates: How often this was done. It is part of the seed.
        """
        if self._triples:
            super().__call__(weight, num_updates)
        if not self._jobs.num_jobs:
            return
        # Who has kept an average for a backward pass is told that it is no longer what it was, as by torch's own.
        increment_version(self._moved)
        if self._jobs.run(weight, num_updates & 0xFFFFFFFF):
            seen = self._jobs.items[:, 7]  # the number of each piece's tensor, and above it whether it was left out
            self._left_out.add_((seen[seen >> 32 != 0] & 0xFFFFFFFF).unique().numel())


class Exchange(foreach.Exchange):
    """Do what ``foreach.Exchange`` does, in C: one pass over memory, and no scratch.

    Args:
        left: Tensors.
        right: As many, of the same shapes, dtypes and devices.
    """

    def __init__(self, left: Sequence[Tensor], right: Sequence[Tensor]) -> None:
        assert _library is not None, WHY_NOT
        pairs = list(zip(left, right, strict=True))
        # Complex tensors may be conjugated without having been touched: their bits do not say what they are.
        known = [a.dtype == b.dtype and not a.is_complex() and _lie_alike(a, b) for a, b in pairs]
        rest = [pair for pair, c in zip(pairs, known, strict=True) if not c]
        super().__init__([a for a, _ in rest], [b for _, b in rest])
        # Aliases, so that this memory stays where it is, whatever becomes of the tensors.
        self._ours = [(a.detach(), b.detach()) for a, b in compress(pairs, known)]
        self._known = known
        self._versions = one_of_each([a for a, _ in self._ours]) + one_of_each([b for _, b in self._ours])
        most = _SWAP * max(1, -(-sum(a.nbytes for a, _ in self._ours) // (_SWAP * _MOST)))
        pieces = [
            (number, at, min(most, a.nbytes - at))
            for number, (a, _) in enumerate(self._ours)
            for at in range(0, a.nbytes, most)
        ]
        self._numbers = [number for number, _, _ in pieces]
        self._offsets = torch.tensor([at for _, at, _ in pieces], dtype=torch.int64, device="cpu")
        # Addresses are written in before each call; the sum of each piece and whether it has changed, by C.
        rows = [(0, 0, size, 0, 0, 0) for _, _, size in pieces]
        self._jobs = _Jobs(_library.polyak_swap, rows, [size for _, _, size in pieces], held=self._ours)

    @property
    def changed(self) -> list[bool]:
        """For each pair whether the left tensor changed between ``forward`` and ``back``, once that is done."""
        flags = self._jobs.items[:, 5].tolist() if self._jobs.num_jobs else []
        changed = set(compress(self._numbers, flags))
        ours, rest = iter([number in changed for number in range(len(self._ours))]), iter(self._changed)
        return [next(ours) if known else next(rest) for known in self._known]

    def forward(self) -> None:
        """Swap what has not been swapped yet."""
        super().forward()
        self._swap(1)

    def back(self) -> None:
        """Swap back what has been swapped, and note what has changed in between."""
        self._swap(0)
        super().back()

    def _swap(self, swapped: int) -> None:
        # Each piece says of itself whether it is swapped, so this may be done again after an interrupt.
        if self._jobs.num_jobs:
            self._locate()
            increment_version(self._versions)
            self._jobs.run(swapped)

    def _locate(self) -> None:
        """Write the addresses of this moment: storage may have moved, to shared memory for example.

        Raises:
            MemoryLayoutError: If a tensor's storage has become smaller than the tensor.
        """
        for tensor in chain.from_iterable(self._ours):
            end = (tensor.storage_offset() + tensor.numel()) * tensor.element_size()
            if tensor.untyped_storage().nbytes() < end:
                raise MemoryLayoutError(
                    f"the memory of a swapped tensor must stay, and a storage has shrunk to "
                    f"{tensor.untyped_storage().nbytes()} bytes under a tensor of shape {tuple(tensor.shape)}: do not "
                    "resize storages while the average is in the model"
                )
        numbers = torch.tensor(self._numbers, dtype=torch.int64, device="cpu")
        for side in (0, 1):
            addresses = torch.tensor([pair[side].data_ptr() for pair in self._ours], dtype=torch.int64, device="cpu")
            self._jobs.items[:, side] = addresses[numbers] + self._offsets

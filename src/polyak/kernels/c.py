"""The kernel in C (``cpu.c``) for averages on the CPU, if it was compiled: all tensors in one call."""

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
from polyak.kernels.build import LIBRARY, sources_id
from polyak.kernels.pairs import Box, Pair, Place, counted
from polyak.kernels.rounding import SIXTEEN_BITS

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
# Elements in a job; a thread takes one job after the other. A job takes about 0.1 ms, to wake a thread half of that, so
# smaller work gets no further thread.
_JOB = 1 << 18
_SWAP = 1 << 18  # bytes in a piece that is swapped
_MOST = 1 << 14  # pieces of a model, plus one for each tensor: the list must stay small


def _load() -> tuple[ctypes.CDLL | None, str]:
    """Return the library, or why there is none."""
    hint = "compile it with: python -m polyak.kernels"
    if not LIBRARY.exists():
        return None, f"{LIBRARY} must exist: this installation of polyak has no compiled kernel; {hint}"
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
    """Return torch's own library, with its C functions and those of the libraries that it has loaded.

    Raises:
        OSError: If there is no such library.
    """
    return ctypes.CDLL(torch._C.__file__)  # noqa: SLF001


class _Team:
    """The address of ``GOMP_parallel`` in the OpenMP that torch has loaded. With 0, C makes threads for each call."""

    def __init__(self) -> None:
        try:
            self.address = ctypes.cast(torch_library().GOMP_parallel, ctypes.c_void_p).value or 0
        except (OSError, AttributeError):
            self.address = 0
        if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
            os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self.address = 0  # a forked process has none of its threads, and would wait for them forever


_team = _Team()


class _Jobs:
    """Jobs for C that as many threads as torch has can do again and again. An interrupt comes before or after.

    Args:
        call: A function in C.
        items: Rows of integers, as ``call`` expects them.
        sizes: How much work each row is, in units of which a job has about ``_JOB``.
        held: Objects to keep: the addresses in ``items`` point into their memory.
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
        self.items = torch.tensor(items, dtype=torch.int64, device="cpu")  # torch aligns it to cache lines
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


def why_not(device: torch.device) -> str | None:
    """Return why the library cannot be used; None if it can.

    Args:
        device: The CPU.
    """
    del device
    return WHY_NOT or None


def accepts(pair: Pair) -> bool:
    """Return whether C knows the dtypes and the layout of a pair.

    Args:
        pair: A pair on the CPU. Without a place, two tensors to swap.
    """
    a, b, place = pair
    if place is None:
        # Complex tensors may be lazily conjugated: their bits do not say what they hold.
        return a.dtype == b.dtype and not a.is_complex() and _have_same_layout(a, b)
    in_order = place.shape is not None and a.dtype in SIXTEEN_BITS
    return (a.dtype, b.dtype) in _PAIRS and _have_same_layout(a, b, in_order=in_order)


def lerp(pairs: Sequence[Pair], left_out: Tensor) -> "Lerp":
    """Return a function that moves the left tensors of pairs towards the right ones.

    Args:
        pairs: Accepted pairs that have places.
        left_out: A 0-dim int64 tensor on the CPU, which counts the tensors that had NaN or inf.
    """
    return Lerp(pairs, left_out)


def swap(pairs: Sequence[Pair]) -> "Exchange":
    """Return a function that swaps pairs, in one pass over memory and without scratch.

    Args:
        pairs: Without places, and accepted.
    """
    return Exchange(pairs)


_PLAIN = (Tensor, nn.Parameter)


def _have_same_layout(one: Tensor, other: Tensor, *, in_order: bool = False) -> bool:
    """Return whether two tensors of one shape are plain, dense and laid out in the same way.

    With ``in_order`` they must also be contiguous.
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


def _box(average: Tensor, place: Place) -> Box:
    """Return where the elements are in the full tensor; one run where the rounding does not need it."""
    return (place if average.dtype in SIXTEEN_BITS else Place(0)).box(tuple(average.shape))


def _cut(box: Box) -> Iterator[tuple[int, int, int, int, int]]:
    """Cut a box in pieces of about ``_JOB`` elements: offset in memory, rows, elements of a row, first index, step."""
    *sizes, run = box.sizes
    rows, step = (sizes.pop(), box.steps[-2]) if sizes else (1, 0)
    at = 0
    for outer in product(*map(range, sizes)):
        start = box.first + sum(i * s for i, s in zip(outer, box.steps, strict=False))
        if run <= _JOB:
            most = _JOB // max(run, 1)
            for row in range(0, rows, most):
                count = min(most, rows - row)
                yield at, count, run, start + row * step, step
                at += count * run
        else:
            for first in range(start, start + rows * step, step) if step else (start,):
                # At multiples of it, so that all pieces but the first begin with a block.
                edges = [first, *range(first - first % _JOB + _JOB, first + run, _JOB), first + run]
                for begin, end in pairwise(edges):
                    yield at, 1, end - begin, begin, 0
                    at += end - begin


class Lerp:
    """Move averages towards weights on as many threads as torch has.

    Args:
        pairs: Accepted pairs that have places.
        left_out: A 0-dim int64 tensor on the CPU, which counts the tensors that had NaN or inf.
    """

    def __init__(self, pairs: Sequence[Pair], left_out: Tensor) -> None:
        assert _library is not None, WHY_NOT
        self._left_out = left_out
        pieces = [
            (
                a.data_ptr() + at * a.element_size(),
                x.data_ptr() + at * x.element_size(),
                *(rows, run, first, step),
                place.seed | _PAIRS[a.dtype, x.dtype] << 32,
                number,
            )
            for number, (a, x, place) in enumerate(pairs)
            if place is not None
            for at, rows, run, first, step in _cut(_box(a, place))
        ]
        self._jobs = _Jobs(_library.polyak_lerp, pieces, [piece[2] * piece[3] for piece in pieces], held=pairs)

    def __call__(self, weight: float, num_updates: int) -> None:
        """Move every average once.

        Args:
            weight: Share of the weights taken, from 0 to 1.
            num_updates: The number of the update, a part of the seed.
        """
        if self._jobs.run(weight, num_updates & 0xFFFFFFFF):
            seen = self._jobs.items[:, 7]  # each piece's tensor, and above it whether values were left out
            self._left_out.add_((seen[seen >> 32 != 0] & 0xFFFFFFFF).unique().numel())


class Exchange:
    """Swap pairs in one pass over memory, without scratch.

    Args:
        pairs: Without places, and accepted.
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        assert _library is not None, WHY_NOT
        # Aliases, so that this memory stays where it is, whatever becomes of the tensors.
        self._pairs = [(a.detach(), b.detach()) for a, b, _ in pairs]
        self._counting = counted(chain.from_iterable(self._pairs))
        most = _SWAP * max(1, -(-sum(a.nbytes for a, _ in self._pairs) // (_SWAP * _MOST)))
        pieces = [
            (number, at, min(most, a.nbytes - at))
            for number, (a, _) in enumerate(self._pairs)
            for at in range(0, a.nbytes, most)
        ]
        self._numbers = [number for number, _, _ in pieces]
        self._offsets = torch.tensor([at for _, at, _ in pieces], dtype=torch.int64, device="cpu")
        # Addresses are written in before each call; the sum of each piece and whether it has changed, by C.
        rows = [(0, 0, size, 0, 0, 0) for _, _, size in pieces]
        self._jobs = _Jobs(_library.polyak_swap, rows, [size for _, _, size in pieces], held=self._pairs)

    @property
    def changed(self) -> list[bool]:
        """For each pair whether the left tensor changed between ``forward`` and ``back``, once ``back`` is done."""
        flags = self._jobs.items[:, 5].tolist() if self._jobs.num_jobs else []
        changed = set(compress(self._numbers, flags))
        return [number in changed for number in range(len(self._pairs))]

    def forward(self) -> None:
        """Swap what has not been swapped yet."""
        self._swap(1)

    def back(self) -> None:
        """Swap back what has been swapped, and note what has changed in between."""
        self._swap(0)

    def _swap(self, swapped: int) -> None:
        # C notes for each piece whether it is swapped, so this may be repeated after an interrupt.
        if self._jobs.num_jobs:
            self._locate()
            increment_version(self._counting)
            self._jobs.run(swapped)

    def _locate(self) -> None:
        """Write the current addresses: storage may have moved, for example to shared memory.

        Raises:
            MemoryLayoutError: If a tensor's storage has become smaller than the tensor.
        """
        for tensor in chain.from_iterable(self._pairs):
            end = (tensor.storage_offset() + tensor.numel()) * tensor.element_size()
            if tensor.untyped_storage().nbytes() < end:
                raise MemoryLayoutError(
                    f"the memory of a swapped tensor must stay, and a storage has shrunk to "
                    f"{tensor.untyped_storage().nbytes()} bytes under a tensor of shape {tuple(tensor.shape)}: do not "
                    "resize storages while the average is in the model"
                )
        numbers = torch.tensor(self._numbers, dtype=torch.int64, device="cpu")
        for side in (0, 1):
            addresses = torch.tensor([pair[side].data_ptr() for pair in self._pairs], dtype=torch.int64, device="cpu")
            self._jobs.items[:, side] = addresses[numbers] + self._offsets

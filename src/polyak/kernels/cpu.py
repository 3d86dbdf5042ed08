"""The kernel in C for averages on the CPU, where it was compiled: all tensors in one call a thread.

The arithmetic is that of the torch kernel, bit for bit. Pairs of tensors that it does not know go to that kernel.
"""

import ctypes
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import compress, pairwise, product

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from polyak.kernels import foreach
from polyak.kernels.build import LIBRARY, sources_id
from polyak.kernels.place import Box, Place

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
            (torch.float64, torch.float64),
        ]
    )
}
# Elements that one call of a thread takes in: 0.1 ms or so, against the 0.05 ms that waking a thread takes.
_JOB = 1 << 18


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
    library.polyak_lerp.argtypes = [
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p),
        *(ctypes.c_double, ctypes.c_uint32),
    ]
    library.polyak_lerp.restype = ctypes.c_int64
    return library, ""


_library, WHY_NOT = _load()


class _Threads:
    """Threads that are kept for the life of the process. A forked process begins without."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._pool = None

    def pool(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="polyak-lerp")
        return self._pool


_threads = _Threads()


def _known(average: Tensor, online: Tensor, place: Place) -> bool:
    """Return whether the two are plain, known to C, and laid out alike without holes, as ``place`` says."""
    plain = all(
        type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided for tensor in (average, online)
    )
    if not plain or (average.dtype, online.dtype) not in _PAIRS:
        return False
    if average.device.type != "cpu" or online.device.type != "cpu" or average.shape != online.shape:
        return False
    if average.is_contiguous() and online.is_contiguous():
        return True
    if place.shape is not None and average.dtype in foreach.SIXTEEN_BITS:
        return False
    order = sorted(range(average.dim()), key=average.stride, reverse=True)
    return all(tensor.permute(order).is_contiguous() for tensor in (average, online))


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
        self._moved = [a for a, _, _ in ours]
        self._held = [x for _, x, _ in ours]  # as long as their addresses are
        pieces = [
            (
                a.data_ptr() + at * a.element_size(),
                x.data_ptr() + at * x.element_size(),
                *(rows, run, first, step),
                *(_PAIRS[a.dtype, x.dtype], place.seed),
                *(number, 0),
            )
            for number, (a, x, place) in enumerate(ours)
            for at, rows, run, first, step in _cut(_box(a, place))
        ]
        jobs, size = [0], 0
        for i, (_, _, rows, run, *_) in enumerate(pieces):
            if size and size + rows * run > _JOB:
                jobs.append(i)
                size = 0
            size += rows * run
        self._num_jobs = len(jobs) if pieces else 0
        self._pieces = torch.tensor(pieces, dtype=torch.int64)
        self._jobs = torch.tensor([*jobs, len(pieces)], dtype=torch.int64)
        self._next = torch.zeros((), dtype=torch.int64)
        self._addresses = self._pieces.data_ptr(), self._jobs.data_ptr(), self._num_jobs, self._next.data_ptr()

    def __call__(self, weight: float, num_updates: int) -> None:
        """Move every average once.

        Args:
            weight: Share of ``online`` taken, from 0 to 1.
            num_updates: How often this was done. It is part of the seed.
        """
        super().__call__(weight, num_updates)
        if not self._num_jobs:
            return
        # Who has kept an average for a backward pass is told that it is no longer what it was, as by torch's own.
        increment_version(self._moved)
        if self._run(weight, num_updates & 0xFFFFFFFF):
            tensors, flags = self._pieces[:, 8], self._pieces[:, 9]
            self._left_out.add_(tensors[flags != 0].unique().numel())

    def _run(self, weight: float, num_updates: int) -> int:
        assert _library is not None
        call, arguments = _library.polyak_lerp, (*self._addresses, weight, num_updates)
        self._next.zero_()
        helpers = min(torch.get_num_threads(), self._num_jobs) - 1
        if not helpers:
            return call(*arguments)
        others = [_threads.pool().submit(call, *arguments) for _ in range(helpers)]
        try:
            found = call(*arguments)
        finally:
            wait(others)  # an interrupt must not leave them at work
        return found | any(other.result() for other in others)

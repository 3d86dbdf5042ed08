"""The kernel in Triton for averages on a GPU: one launch for all tensors of a pair of dtypes, without waiting.

Only imported for averages on a GPU, since Triton takes a while.
"""

from collections.abc import Iterator, Sequence
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from polyak.kernels.exchange import Exchange
from polyak.kernels.pairs import Pair, Place
from polyak.kernels.rounding import SIXTEEN_BITS

BLOCK = 4096  # elements of a program, a power of two from 32 on
PART = 512  # elements in a step where a block is not full, or not aligned
WARPS = 8
_NAMES = {torch.float64: tl.float64, torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def why_not(device: torch.device) -> str | None:
    """Return why Triton cannot serve a device; None if it can. It needs a GPU, and most versions a C compiler.

    Args:
        device: A device of the type ``cuda``.
    """
    del device
    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def accepts(pair: Pair) -> bool:
    """Return whether a pair is of plain tensors, dense and laid out in the same way. Swaps are left to torch.

    Args:
        pair: A pair on one device.
    """
    average, online, place = pair
    if place is None:
        return False
    for tensor in (average, online):
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
            return False
        if tensor.dtype not in _NAMES or tensor.device != average.device or tensor.shape != average.shape:
            return False
    if average.is_contiguous() and online.is_contiguous():
        return True
    if place.shape is not None and average.dtype in SIXTEEN_BITS:
        return False
    order = sorted(range(average.dim()), key=average.stride, reverse=True)
    return all(tensor.permute(order).is_contiguous() for tensor in (average, online))


def lerp(pairs: Sequence[Pair], left_out: Tensor) -> "Lerp":
    """Return a function that moves the left tensors of pairs towards the right ones.

    Args:
        pairs: Pairs on one device, with places, and accepted.
        left_out: A 0-dim int64 tensor on their device, which counts the tensors that had NaN or inf.
    """
    return Lerp(pairs, left_out)


def swap(pairs: Sequence[Pair]) -> Exchange:
    """Return what swaps pairs, in torch.

    Args:
        pairs: Pairs on one device.
    """
    return Exchange(pairs)


@triton.jit
def _hash(x):
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0x735A2D97
    return x ^ (x >> 15)


@triton.jit
def _round(x, random, TO: tl.constexpr):
    """Round float32 to 16 bits up or down by 16 random bits. A value out of range becomes the largest in it."""
    if TO == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        rounded = tl.minimum(magnitude + random, 0x7F7FFFFF)
        rounded = tl.where(magnitude > 0x7F800000, 0x7FC00000, rounded)
        return ((rounded | (bits ^ magnitude)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        # In units of the last place, a power of two, constant below the smallest normal number.
        exponent = tl.maximum((x.to(tl.uint32, bitcast=True) >> 23) & 0xFF, 113)
        unit = ((exponent - 10) << 23).to(tl.float32, bitcast=True)
        units = ((264 - exponent) << 23).to(tl.float32, bitcast=True)  # in 1
        rounded = tl.floor(x * units + (random >> 3).to(tl.float32) * 0.0001220703125) * unit
        rounded = tl.where(rounded > 65504, 65504, tl.where(rounded < -65504, -65504, rounded))
        return rounded.to(tl.float16)


@triton.jit
def _random_bits(index, key):
    """Return 16 random bits for each index in the full tensor."""
    counter = index >> 1
    drawn = _hash(counter.to(tl.uint32) ^ key ^ _hash((counter >> 32).to(tl.uint32)))
    return (drawn >> ((index & 1) << 4).to(tl.uint32)) & 0xFFFF


@triton.jit
def _move(average, a, x, mask, weight, random):
    """Move the values ``a`` at ``average`` towards ``x``. Return which of ``x`` are NaN or inf."""
    TO: tl.constexpr = average.dtype.element_ty
    WIDE: tl.constexpr = weight.dtype
    exact = x.to(tl.float64 if x.dtype == tl.float64 else tl.float32)
    fine = tl.abs(exact) < float("inf")
    wide = a.to(WIDE)
    # NaN and inf count as the average itself.
    target = tl.where(fine, exact.to(WIDE), wide)
    if weight < 0.5:
        moved = tl.fma(weight, target - wide, wide)
    elif weight < 1:
        moved = tl.fma(weight - 1, target - wide, target)
    else:
        moved = target
    tl.store(average, moved if TO == WIDE else _round(moved, random, TO), mask)
    return fine == 0 if mask is None else (fine == 0) & mask


@triton.jit
def _move_block(average, online, start, index, key, weight, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Move a block from ``start``: at a multiple of 16 bytes, and of 2 elements. Return whether any is NaN or inf."""
    # As many elements of both in an instruction: otherwise they would move between threads.
    average = tl.multiple_of(average + start, WIDTH * average.dtype.element_ty.primitive_bitwidth // 8)
    online = tl.multiple_of(online + start, WIDTH * online.dtype.element_ty.primitive_bitwidth // 8)
    i, pair = tl.arange(0, BLOCK), tl.arange(0, BLOCK // 2)
    # The 32 bits of a draw serve two neighbours, which one thread has.
    counter = (index >> 1).to(tl.uint32) + pair.to(tl.uint32)
    drawn = _hash(counter ^ key ^ _hash((index >> 33).to(tl.uint32)))
    random = tl.reshape(tl.join(drawn & 0xFFFF, drawn >> 16), [BLOCK])
    # All reads come before the first write, so that they can overlap.
    bad = _move(average + i, tl.load(average + i), tl.load(online + i), None, weight, random)
    return tl.max(bad.to(tl.int32))


@triton.jit
def _move_part(average, online, start, end, first, run, jump, key, weight, PART: tl.constexpr):
    """Move elements ``start`` to ``end`` of a piece at any address. Return whether any is NaN or inf."""
    bad = tl.arange(0, PART) < 0
    for part in range(start, end, PART):
        i = part + tl.arange(0, PART)
        index = first + i
        if jump != 0:
            index += i // run * jump
        values, weights = tl.load(average + i, i < end), tl.load(online + i, i < end)
        bad |= _move(average + i, values, weights, i < end, weight, _random_bits(index, key))
    return tl.max(bad.to(tl.int32))


@triton.jit
def _lerp(
    table,
    rows,
    numbers,
    flags,
    left_out,
    A: tl.constexpr,
    X: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Move up to ``BLOCK`` elements of a piece, which is a row of the table."""
    program = tl.program_id(0)
    row = table + tl.load(rows + program).to(tl.int64) * 9
    start = (program - tl.load(row + 8)) * BLOCK
    average, online = tl.load(row).to(tl.pointer_type(A)), tl.load(row + 1).to(tl.pointer_type(X))
    count, first, run, jump = tl.load(row + 2), tl.load(row + 3), tl.load(row + 4), tl.load(row + 5)
    weight = tl.load(numbers).to(tl.float64 if A == tl.float64 else tl.float32)
    key = _hash(tl.load(row + 6).to(tl.uint32) ^ _hash(tl.load(numbers + 1).to(tl.int64).to(tl.uint32)))
    index = first + start
    fast = (start + BLOCK <= count) & ((tl.load(row) | tl.load(row + 1)) & 15 == 0)
    if A == tl.bfloat16 or A == tl.float16:  # rounded stochastically
        fast &= (run == count) & (index & 1 == 0) & (index >> 33 == (index + BLOCK - 1) >> 33)
    if fast:
        bad = _move_block(average, online, start, index, key, weight, BLOCK, WIDTH)
    else:
        end = tl.minimum(start + BLOCK, count)
        bad = _move_part(average, online, start, end, first, run, jump, key, weight, PART)
    if bad != 0:
        newly = tl.atomic_xchg(flags + tl.load(row + 7), 1, sem="relaxed") == 0
        tl.atomic_add(left_out, newly.to(tl.int64), sem="relaxed")


def _pieces(average: Tensor, place: Place) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield of each piece the offset in memory, elements, first index, length of a run, and gap between runs."""
    box = (place if average.dtype in SIXTEEN_BITS else Place(0)).box(tuple(average.shape))
    *sizes, run = box.sizes
    count, step = (sizes.pop() * run, box.steps[-2]) if sizes else (run, run)
    for number, outer in enumerate(product(*map(range, sizes))):
        first = box.first + sum(i * step for i, step in zip(outer, box.steps, strict=False))
        yield number * count, count, first, run, step - run


def _launch_over(table: list[tuple[int, ...]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the table as the kernel reads it, and for each program the row that it works on."""
    columns = torch.tensor(table, dtype=torch.int64, device="cpu")
    programs = (columns[:, 2] + BLOCK - 1) // BLOCK
    rows = torch.repeat_interleave(torch.arange(len(table), dtype=torch.int32, device="cpu"), programs)
    first_program = programs.cumsum(0) - programs
    on_host = torch.cat([columns, first_program[:, None]], dim=1), rows
    if device.type == "cpu":
        return on_host
    # Pinned memory is copied without a wait, and torch keeps it until the copy is done.
    table_there, rows_there = (tensor.pin_memory().to(device, non_blocking=True) for tensor in on_host)
    return table_there, rows_there


class Lerp:
    """Move averages towards weights. It waits for nothing, and allocates nothing once it is made.

    The weight and the number of the update are read from the device, so that a captured ``launch`` may be replayed with
    others: ``stage`` them before each replay, on the stream of the replay. Call it once before capture, which compiles,
    and keep it as long as the graph.

    Args:
        pairs: Pairs on one device, with places, and accepted.
        left_out: A 0-dim int64 tensor on their device, which counts the tensors that had NaN or inf.
    """

    def __init__(self, pairs: Sequence[Pair], left_out: Tensor) -> None:
        device = left_out.device
        self._left_out = left_out
        self._held = pairs  # as long as their addresses are used
        tables = dict[tuple[torch.dtype, torch.dtype], list[tuple[int, ...]]]()
        for number, (a, x, place) in enumerate(pairs):
            assert place is not None
            for at, *piece in _pieces(a, place) if a.numel() else ():
                addresses = a.data_ptr() + at * a.element_size(), x.data_ptr() + at * x.element_size()
                tables.setdefault((a.dtype, x.dtype), []).append((*addresses, *piece, place.seed, number))
        self._launches = [
            (*_launch_over(table, device), _NAMES[a], _NAMES[x], 16 // max(a.itemsize, x.itemsize))
            for (a, x), table in tables.items()
        ]
        self._flags = torch.zeros(len(pairs), dtype=torch.int32, device=device)
        # One complex number, so that one call writes both: the weight, and the number of the update.
        self._staged = torch.zeros((), dtype=torch.complex128, device=device)
        self._numbers = torch.view_as_real(self._staged)

    def __call__(self, weight: float, num_updates: int) -> None:
        """Move every average once.

        Args:
            weight: Share of the weights taken, from 0 to 1.
            num_updates: The number of the update, a part of the seed.
        """
        if self._launches:
            self.stage(weight, num_updates)
            self.launch()

    def stage(self, weight: float, num_updates: int) -> None:
        """Write the numbers for the launches to come, in the order of the current stream.

        Args:
            weight: Share of the weights taken, from 0 to 1.
            num_updates: The number of the update, a part of the seed.

        Raises:
            RuntimeError: If the stream is being captured: each replay would write what was written now.
        """
        if self._staged.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a weight must be staged outside of a CUDA graph, which would keep it forever (the stream is being "
                "captured); capture launch(), and call stage() before each replay"
            )
        # The numbers are arguments of a kernel launch: no host memory that a later call could overwrite.
        self._staged.fill_(complex(weight, num_updates & 0xFFFFFFFF))

    def launch(self) -> None:
        """Move every average once, by the numbers staged last. It may be captured in a CUDA graph."""
        self._flags.zero_()
        with torch.cuda.device_of(self._flags):
            for table, rows, average, online, width in self._launches:
                tensors = table, rows, self._numbers, self._flags, self._left_out
                # Only the explicit fma is fused.
                _lerp[rows.numel(),](
                    *tensors, average, online, BLOCK, PART, width, num_warps=WARPS, enable_fp_fusion=False
                )

"""Stochastic rounding to 16 bits in plain torch. It uses scratch memory, so that an update allocates nothing.

The 16 random bits of an element are a hash of a counter, its index in the full tensor, and a key. So they are the same
on each device and in each split of the work, and need no state. Two neighbours share the 32 bits of one draw, a word:
the first has the lower half.
"""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from polyak.kernels.pairs import Place
from polyak.kernels.pieces import Scratch

SIXTEEN_BITS = (torch.bfloat16, torch.float16)

# Elements after which the random bits come from another series.
_CYCLE = 1 << 33

# The halves of a word then lie in memory in the order of the two neighbours.
_LITTLE_ENDIAN = sys.byteorder == "little"

_FACTORS = (0x21F0AAAD, 0x735A2D97)


def key(seed: int, num_updates: int) -> int:
    """Return the key of one tensor in one update.

    Args:
        seed: The tensor's.
        num_updates: The update's number.
    """
    return _hash((seed ^ _hash(num_updates & 0xFFFFFFFF)) & 0xFFFFFFFF)


def _hash(x: int) -> int:
    """Mix 32 bits: ``lowbias32`` of Wellons, https://nullprogram.com/blog/2018/07/31/ ."""
    x = ((x ^ (x >> 16)) * _FACTORS[0]) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * _FACTORS[1]) & 0xFFFFFFFF
    return x ^ (x >> 15)


def _hash_(x: Tensor, spare: Tensor) -> Tensor:
    """Do what ``_hash`` does in place, to the lower 32 bits of integers. The upper bits are then undefined."""
    for shift, factor in ((16, _FACTORS[0]), (15, _FACTORS[1]), (15, 1)):
        # An arithmetic shift brings in the sign or upper bits: the mask drops them.
        torch.bitwise_right_shift(x, shift, out=spare).bitwise_and_((1 << (32 - shift)) - 1)
        x.bitwise_xor_(spare)
        if factor != 1:
            x.mul_(factor)
    return x


def _int32(bits: int) -> int:
    """Return the number that has these 32 bits in int32."""
    return ((bits & 0xFFFFFFFF) ^ (1 << 31)) - (1 << 31)


class RandomBits:
    """The random bits of one update of one average, piece after piece.

    Args:
        place: Where the average lies in the full tensor.
        shape: The average's.
        num_updates: The update's number.
        scratch: Holds the random bits, until the next are drawn.
    """

    def __init__(self, place: Place, shape: tuple[int, ...], num_updates: int, scratch: Scratch) -> None:
        self._box = place.box(shape)
        self._key = key(place.seed, num_updates)
        self._start = 0
        self._scratch = scratch

    def of(self, piece: Tensor) -> Tensor:
        """Return 16 random bits for each element of the next piece, in int32.

        Args:
            piece: A piece.
        """
        random = self._scratch.like(piece, torch.int32, "random")
        first, count = self._box.first + self._start, piece.numel()
        in_one_run = len(self._box.sizes) == 1 and first // _CYCLE == (first + count - 1) // _CYCLE
        if in_one_run and _LITTLE_ENDIAN:
            self._draw_for_neighbours(random.view(-1), first)
        else:
            self._draw_for_each(random.view(-1))
        self._start += count
        return random

    def _draw_for_neighbours(self, random: Tensor, first: int) -> None:
        count = words_of(range(first, first + len(random)))
        words = self._scratch.all(torch.int32, random.device, "words")[:count]
        spare = self._scratch.all(torch.int32, random.device, "spare")[:count]
        torch.add(self._scratch.numbers(count, random.device), _int32(first // 2), out=words)
        _hash_(words.bitwise_xor_(_int32(self._key ^ _hash(first // _CYCLE))), spare)
        random.copy_(words.view(torch.uint16)[first % 2 :][: len(random)])

    def _draw_for_each(self, random: Tensor) -> None:
        index, drawn, spare = (self._scratch.like(random, torch.int64, name) for name in ("index", "drawn", "spare"))
        index.fill_(self._box.first)
        rest = torch.arange(self._start, self._start + len(random), out=drawn)
        for size, step in zip(reversed(self._box.sizes[1:]), reversed(self._box.steps[1:]), strict=True):
            index.add_(torch.remainder(rest, size, out=spare), alpha=step)
            rest.floor_divide_(size)
        index.add_(rest, alpha=self._box.steps[0])
        torch.bitwise_right_shift(index, 33, out=drawn)
        _hash_(drawn, spare).bitwise_xor_(self._key).bitwise_xor_(torch.bitwise_right_shift(index, 1, out=spare))
        torch.bitwise_right_shift(_hash_(drawn, spare), index.bitwise_and_(1).mul_(16), out=drawn)
        random.copy_(drawn.bitwise_and_(0xFFFF))


def run_of(place: Place, shape: tuple[int, ...]) -> range | None:
    """Return which elements of the full tensor an average has; None if their random bits are not a row of words.

    Args:
        place: Where it lies in the full tensor.
        shape: The average's.
    """
    box = place.box(shape)
    run = range(box.first, box.first + box.sizes[-1])
    return run if len(box.sizes) == 1 and run.stop <= _CYCLE and _LITTLE_ENDIAN else None


def words_of(run: range) -> int:
    """Return how many words of 32 bits are drawn for these elements.

    Args:
        run: Elements of the full tensor.
    """
    return (run.stop + 1) // 2 - run.start // 2


class RowBits:
    """The random bits of many small averages, each of which has a row of words.

    Args:
        seeds: The averages'.
        runs: Which elements of their full tensors they have. The first is the first of its row, or, if odd, the second.
        width: Words of a row.
        scratch: Holds the random bits, until the next are drawn.
    """

    def __init__(self, seeds: Sequence[int], runs: Sequence[range], width: int, scratch: Scratch) -> None:
        def column(numbers: list[int]) -> Tensor:
            return torch.tensor([_int32(number) for number in numbers], dtype=torch.int32, device="cpu")[:, None]

        self._seeds = column(list(seeds))
        self._keys = torch.empty_like(self._seeds)
        self._counters = column([run.start // 2 for run in runs])
        self._width = width
        self._scratch = scratch

    def draw(self, num_updates: int) -> Tensor:
        """Return 16 random bits for each element of all rows, in int32.

        Args:
            num_updates: The update's number.
        """
        count, device = len(self._seeds), self._seeds.device
        words = self._scratch.all(torch.int32, device, "words")[: count * self._width].view(count, self._width)
        spare = self._scratch.all(torch.int32, device, "spare")[: words.numel()].view(words.shape)
        keys = torch.bitwise_xor(self._seeds, _int32(_hash(num_updates & 0xFFFFFFFF)), out=self._keys)
        torch.add(self._counters, self._scratch.numbers(self._width, device), out=words)
        _hash_(words.bitwise_xor_(_hash_(keys, spare[:, :1])), spare)
        random = self._scratch.all(torch.int32, device, "random")[: 2 * words.numel()]
        return random.copy_(words.view(-1).view(torch.uint16))


def is_within(tensor: Tensor, dtype: torch.dtype, scratch: Scratch) -> bool:
    """Return whether all elements are finite and within the range of ``dtype``. This waits for the device.

    Args:
        tensor: A tensor of float32.
        dtype: The dtype to which it will be rounded.
        scratch: Memory to work in.
    """
    flags = (scratch.flag(tensor.dtype, tensor.device, name) for name in ("least", "most"))
    least, most = torch.aminmax(tensor, out=tuple(flags))
    largest = torch.finfo(dtype).max
    return float(least) >= -largest and float(most) <= largest


def round_(tensor: Tensor, dtype: torch.dtype, random: Tensor, scratch: Scratch, *, within: bool = False) -> None:
    """Round float32 in place to values of ``dtype``, up or down at random, so that the expectation is the value itself.

    A value beyond the range of ``dtype`` becomes the largest in it.

    Args:
        tensor: A tensor of float32.
        dtype: The dtype to which it is rounded.
        random: 16 random bits for each element, in int32. They are overwritten.
        scratch: Memory to work in.
        within: Whether it ``is_within`` the range of ``dtype``, which saves work.
    """
    bits, spare = tensor.view(torch.int32), scratch.like(tensor, torch.int32, "spare")
    if not within:
        nan = torch.ne(tensor, tensor, out=scratch.like(tensor, torch.bool, "nan"))
        tensor.clamp_(torch.finfo(dtype).min, torch.finfo(dtype).max)
        # A NaN keeps only its sign.
        torch.where(nan, torch.bitwise_or(bits, 0x7FFFFFFF, out=spare).bitwise_and_(-0x400000), bits, out=bits)
    if dtype == torch.bfloat16:
        # It is float32 without the last 16 bits, which are the probability of rounding away from 0: adding random bits
        # to them carries with that probability.
        bits.add_(random).bitwise_and_(-0x10000)
        return
    # In units of the last place of float16. They are powers of two, constant below its smallest normal number.
    unit = torch.bitwise_and(bits, 0x7F800000, out=spare).clamp_(min=113 << 23).sub_(10 << 23).view(torch.float32)
    # Float32 has 13 bits below such a unit.
    share = scratch.like(tensor, torch.float32, "share").copy_(random.bitwise_right_shift_(3)).mul_(2**-13)
    tensor.div_(unit).add_(share).floor_().mul_(unit)


def store(tensor: Tensor, into: Tensor) -> None:
    """Copy rounded values to a 16-bit tensor. This overwrites ``tensor``.

    Args:
        tensor: A tensor of float32.
        into: A tensor of 16-bit numbers.
    """
    if into.dtype == torch.bfloat16:  # torch's own conversion gives other bits for a nan
        into.view(torch.int16).copy_(tensor.view(torch.int32).bitwise_right_shift_(16))
    else:
        into.copy_(tensor)

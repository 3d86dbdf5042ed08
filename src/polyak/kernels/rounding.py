"""Rounding to 16 bits by chance, in plain torch: all in scratch, so that an update allocates nothing.

The chance of an element comes from a counter, its index in the whole, hashed with a key. So it is the same on each
device and in each split of the work, and needs no state. Two neighbours share the 32 bits of one draw, a word: the
first has the lower half of it.
"""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from polyak.kernels.pairs import Place
from polyak.kernels.pieces import Scratch

SIXTEEN_BITS = (torch.bfloat16, torch.float16)

# Elements after which the chances come from another series.
_CYCLE = 1 << 33

# So the bits that are drawn lie in memory as the chances of two neighbours do.
_LITTLE_ENDIAN = sys.byteorder == "little"

_FACTORS = (0x21F0AAAD, 0x735A2D97)


def key(seed: int, num_updates: int) -> int:
    """Return what the chances of one tensor in one update are hashed with.

    Args:
        seed: The tensor's.
        num_updates: The update's.
    """
    return _hash((seed ^ _hash(num_updates & 0xFFFFFFFF)) & 0xFFFFFFFF)


def _hash(x: int) -> int:
    """Mix 32 bits: ``lowbias32`` of Wellons, https://nullprogram.com/blog/2018/07/31/ ."""
    x = ((x ^ (x >> 16)) * _FACTORS[0]) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * _FACTORS[1]) & 0xFFFFFFFF
    return x ^ (x >> 15)


def _hash_(x: Tensor, spare: Tensor) -> Tensor:
    """Do what ``_hash`` does in place, to the lower 32 bits of integers. Above them is then anything."""
    for shift, factor in ((16, _FACTORS[0]), (15, _FACTORS[1]), (15, 1)):
        # An arithmetic shift brings in signs, or what is above: neither counts.
        torch.bitwise_right_shift(x, shift, out=spare).bitwise_and_((1 << (32 - shift)) - 1)
        x.bitwise_xor_(spare)
        if factor != 1:
            x.mul_(factor)
    return x


def _int32(bits: int) -> int:
    """Return the number that has these 32 bits in int32."""
    return ((bits & 0xFFFFFFFF) ^ (1 << 31)) - (1 << 31)


class Chances:
    """The chances of rounding up in one update of one average, piece after piece.

    Args:
        place: Where the average lies in the whole.
        shape: The average's.
        num_updates: The update's.
        scratch: Which the chances are in, until the next are drawn.
    """

    def __init__(self, place: Place, shape: tuple[int, ...], num_updates: int, scratch: Scratch) -> None:
        self._box = place.box(shape)
        self._key = key(place.seed, num_updates)
        self._start = 0
        self._scratch = scratch

    def of(self, piece: Tensor) -> Tensor:
        """Return a chance below 2 ** 16 for each element of the next piece, in int32.

        Args:
            piece: A piece.
        """
        chance = self._scratch.like(piece, torch.int32, "chance")
        first, count = self._box.first + self._start, piece.numel()
        in_one_run = len(self._box.sizes) == 1 and first // _CYCLE == (first + count - 1) // _CYCLE
        if in_one_run and _LITTLE_ENDIAN:
            self._draw_for_neighbours(chance.view(-1), first)
        else:
            self._draw_for_each(chance.view(-1))
        self._start += count
        return chance

    def _draw_for_neighbours(self, chance: Tensor, first: int) -> None:
        count = words_of(range(first, first + len(chance)))
        words = self._scratch.all(torch.int32, chance.device, "words")[:count]
        spare = self._scratch.all(torch.int32, chance.device, "spare")[:count]
        torch.add(self._scratch.numbers(count, chance.device), _int32(first // 2), out=words)
        _hash_(words.bitwise_xor_(_int32(self._key ^ _hash(first // _CYCLE))), spare)
        chance.copy_(words.view(torch.uint16)[first % 2 :][: len(chance)])

    def _draw_for_each(self, chance: Tensor) -> None:
        index, drawn, spare = (self._scratch.like(chance, torch.int64, name) for name in ("index", "drawn", "spare"))
        index.fill_(self._box.first)
        rest = torch.arange(self._start, self._start + len(chance), out=drawn)
        for size, step in zip(reversed(self._box.sizes[1:]), reversed(self._box.steps[1:]), strict=True):
            index.add_(torch.remainder(rest, size, out=spare), alpha=step)
            rest.floor_divide_(size)
        index.add_(rest, alpha=self._box.steps[0])
        torch.bitwise_right_shift(index, 33, out=drawn)
        _hash_(drawn, spare).bitwise_xor_(self._key).bitwise_xor_(torch.bitwise_right_shift(index, 1, out=spare))
        torch.bitwise_right_shift(_hash_(drawn, spare), index.bitwise_and_(1).mul_(16), out=drawn)
        chance.copy_(drawn.bitwise_and_(0xFFFF))


def run_of(place: Place, shape: tuple[int, ...]) -> range | None:
    """Return which elements of the whole an average is, or None if its chances cannot be drawn in a row.

    Args:
        place: Where it lies in the whole.
        shape: The average's.
    """
    box = place.box(shape)
    run = range(box.first, box.first + box.sizes[-1])
    return run if len(box.sizes) == 1 and run.stop <= _CYCLE and _LITTLE_ENDIAN else None


def words_of(run: range) -> int:
    """Return how many words of 32 bits are drawn for these elements.

    Args:
        run: Elements of the whole.
    """
    return (run.stop + 1) // 2 - run.start // 2


class RowChances:
    """The chances of rounding up in many small averages at once, each of which has a row of words.

    Args:
        seeds: The averages'.
        runs: Which elements of their wholes they are. The first is the first of its row, or, if odd, the second.
        width: Words of a row.
        scratch: Which the chances are in, until the next are drawn.
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
        """Return a chance below 2 ** 16 for each element of all rows, in int32.

        Args:
            num_updates: The update's.
        """
        count, device = len(self._seeds), self._seeds.device
        words = self._scratch.all(torch.int32, device, "words")[: count * self._width].view(count, self._width)
        spare = self._scratch.all(torch.int32, device, "spare")[: words.numel()].view(words.shape)
        keys = torch.bitwise_xor(self._seeds, _int32(_hash(num_updates & 0xFFFFFFFF)), out=self._keys)
        torch.add(self._counters, self._scratch.numbers(self._width, device), out=words)
        _hash_(words.bitwise_xor_(_hash_(keys, spare[:, :1])), spare)
        chance = self._scratch.all(torch.int32, device, "chance")[: 2 * words.numel()]
        return chance.copy_(words.view(-1).view(torch.uint16))


def is_within(tensor: Tensor, dtype: torch.dtype, scratch: Scratch) -> bool:
    """Return whether all is finite and not above the largest of ``dtype``. This waits for the device.

    Args:
        tensor: Of float32.
        dtype: To which it is to be rounded.
        scratch: To work in.
    """
    flags = (scratch.flag(tensor.dtype, tensor.device, name) for name in ("least", "most"))
    least, most = torch.aminmax(tensor, out=tuple(flags))
    largest = torch.finfo(dtype).max
    return float(least) >= -largest and float(most) <= largest


def round_(tensor: Tensor, dtype: torch.dtype, chance: Tensor, scratch: Scratch, *, within: bool = False) -> None:
    """Round float32 in place to what ``dtype`` has, up or down by chance, so that the expectation is the value itself.

    What is too large for ``dtype`` becomes its largest.

    Args:
        tensor: Of float32.
        dtype: To which it is rounded.
        chance: Below 2 ** 16, of int32, which is overwritten.
        scratch: To work in.
        within: Whether it ``is_within`` what ``dtype`` has: less is to be done then.
    """
    bits, spare = tensor.view(torch.int32), scratch.like(tensor, torch.int32, "spare")
    if not within:
        nan = torch.ne(tensor, tensor, out=scratch.like(tensor, torch.bool, "nan"))
        tensor.clamp_(torch.finfo(dtype).min, torch.finfo(dtype).max)
        # Of a nan only the sign remains.
        torch.where(nan, torch.bitwise_or(bits, 0x7FFFFFFF, out=spare).bitwise_and_(-0x400000), bits, out=bits)
    if dtype == torch.bfloat16:
        # It is float32 without its last 16 bits: what they say is the chance of rounding up. The sign is a bit of its
        # own, so that to add is to go away from 0.
        bits.add_(chance).bitwise_and_(-0x10000)
        return
    # In units of the last place of float16, powers of two, which below its smallest normal number no longer shrink.
    unit = torch.bitwise_and(bits, 0x7F800000, out=spare).clamp_(min=113 << 23).sub_(10 << 23).view(torch.float32)
    # Of what is less than a unit float32 has 13 bits.
    share = scratch.like(tensor, torch.float32, "share").copy_(chance.bitwise_right_shift_(3)).mul_(2**-13)
    tensor.div_(unit).add_(share).floor_().mul_(unit)


def store(tensor: Tensor, into: Tensor) -> None:
    """Copy to 16 bits what has been rounded to them. Of ``tensor`` nothing remains.

    Args:
        tensor: Of float32.
        into: Of 16 bits.
    """
    if into.dtype == torch.bfloat16:  # torch's own conversion gives other bits for a nan
        into.view(torch.int16).copy_(tensor.view(torch.int32).bitwise_right_shift_(16))
    else:
        into.copy_(tensor)

"""How far two checkpoints are from each other, tensor by tensor."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import inf, isnan, lcm, nan, sqrt

import torch
from torch import Tensor

from polyak.checkpoints.opening import Checkpoint
from polyak.checkpoints.stored import StoredTensor

_PIECE = 1 << 18


@dataclass(frozen=True, slots=True)
class Distance:
    """How far a tensor of one checkpoint is from the same tensor of another.

    Args:
        name: The name of the tensor.
        shapes: The shapes in the first and in the second.
        dtypes: The dtypes in the first and in the second.
        square: The sum of the squares of the differences; NaN where the shapes differ.
        square_of_first: The sum of the squares of the first, without infinities.
        largest: The largest absolute difference; NaN where the shapes differ.
    """

    name: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    dtypes: tuple[torch.dtype, torch.dtype]
    square: float
    square_of_first: float
    largest: float

    @property
    def relative(self) -> float:
        """The L2 norm of the difference, divided by the norm of the first."""
        return _relative(self.square, self.square_of_first)


def _relative(square: float, of: float) -> float:
    if isnan(square) or isnan(of):
        return nan
    return sqrt(square / of) if of else (inf if square else 0.0)


def distances(first: Checkpoint, second: Checkpoint) -> Iterator[Distance]:
    """Yield the distance of each tensor that both checkpoints have. One piece of one tensor is in memory at a time.

    Args:
        first: A checkpoint.
        second: Another.

    Raises:
        CheckpointError: If a file is damaged or has changed.
    """
    for name, one in first.tensors.items():
        if (other := second.tensors.get(name)) is None:
            continue
        same = one.shape == other.shape
        numbers = _compared(one, other) if same else (nan, nan, nan)
        yield Distance(name, (one.shape, other.shape), (one.dtype, other.dtype), *numbers)
        first.files.release()
        second.files.release()
    first.files.require_unchanged()
    second.files.require_unchanged()


def overall(found: Iterable[Distance]) -> float:
    """Return the distance between all tensors of one shape taken together, relative to the norm of the first.

    It is NaN if there are none.

    Args:
        found: The distances.
    """
    known = [one for one in found if one.shapes[0] == one.shapes[1]]
    if not known:
        return nan
    return _relative(sum(one.square for one in known), sum(one.square_of_first for one in known))


@torch.no_grad()
def _compared(one: StoredTensor, other: StoredTensor) -> tuple[float, float, float]:
    grain = lcm(one.grain, other.grain)
    step = max(grain, _PIECE // grain * grain)
    square = of_first = largest = 0.0
    for begin in range(0, one.numel, step):
        end = min(begin + step, one.numel)
        a, b = _wide(one.read(begin, end)), _wide(other.read(begin, end))
        difference = (b - a).abs()
        difference[a == b] = 0  # of infinities, which masks have
        square += float(difference.square().sum())
        of_first += float(a.masked_fill(a.isinf(), 0).abs().square().sum())  # an infinite norm would hide all else
        piece = float(difference.max())
        largest = piece if isnan(piece) or piece > largest else largest
    return square, of_first, largest


def _wide(piece: Tensor) -> Tensor:
    return piece.to(torch.complex128 if piece.dtype.is_complex else torch.float64)

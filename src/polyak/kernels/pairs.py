"""The inputs of kernels: pairs of tensors, and where the elements of a shard are in the full tensor."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor's elements are in the full tensor, of which it may be a shard.

    A 16-bit average is rounded by a hash of each element's index in the full tensor, so that shards get the bits that
    the full tensor would get. Other averages do not use it.

    Args:
        seed: The seed of its rounding, from 0 to 2 ** 32 - 1.
        shape: The shape of the full tensor, which is contiguous. None: the tensor is not a shard; its elements are
            counted in the order in which they lie in memory.
        offset: Where in the full tensor the shard begins, an index for each dimension. None without ``shape``.

    Example:
        >>> Place(7, shape=(4, 6), offset=(2, 0)).box((2, 6))  # two rows: one run
        Box(first=12, sizes=(12,), steps=(1,))
        >>> Place(7, shape=(4, 6), offset=(0, 3)).box((4, 3))  # half of the columns: a run in each row
        Box(first=3, sizes=(4, 3), steps=(6, 1))
    """

    seed: int
    shape: tuple[int, ...] | None = None
    offset: tuple[int, ...] | None = None

    def box(self, shape: tuple[int, ...]) -> "Box":
        """Return the indices in the full tensor of a shard of ``shape``.

        Args:
            shape: The shard's.
        """
        if self.shape is None:
            return Box(0, (prod(shape),), (1,))
        assert self.offset is not None
        ends = [at + size for at, size in zip(self.offset, shape, strict=True)]
        inside = all(0 <= end <= most for end, most in zip(ends, self.shape, strict=True))
        assert inside or 0 in shape, f"{shape} at {self.offset} is not inside of {self.shape}"
        first, step, sizes, steps = 0, 1, list[int](), list[int]()
        for at, size, most in zip(reversed(self.offset), reversed(shape), reversed(self.shape), strict=True):
            first += at * step
            if sizes and step == sizes[-1] * steps[-1]:  # begins where the dimension inside of it ends
                sizes[-1] *= size
            elif size != 1 or not sizes:
                sizes.append(size)
                steps.append(step)
            step *= most
        return Box(first, tuple(reversed(sizes)) or (1,), tuple(reversed(steps)) or (1,))


@dataclass(frozen=True, slots=True)
class Box:
    """Indices in a full tensor: ``first + sum(steps[d] * i[d])`` for ``i`` below ``sizes``, the last changing first.

    Args:
        first: The first of them.
        sizes: How many there are in each dimension. Dimensions that follow each other without a gap are merged.
        steps: The distance from one to the next in each dimension.
    """

    first: int
    sizes: tuple[int, ...]
    steps: tuple[int, ...]


class Pair(NamedTuple):
    """Two tensors of one shape on one device: an average and the weights that it moves towards, or two to be swapped.

    Args:
        left: The average, or the first of the two.
        right: The weights, or the second of the two.
        place: What the rounding of the average depends on. None for two that are swapped.
    """

    left: Tensor
    right: Tensor
    place: Place | None = None


def counted(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the tensors whose changes autograd counts: all but inference tensors.

    Args:
        tensors: Any tensors.
    """
    return [tensor for tensor in tensors if not tensor.is_inference()]

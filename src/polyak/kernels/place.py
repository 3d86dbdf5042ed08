"""Where a tensor's elements lie in a whole of which it may be a shard: what their rounding depends on."""

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor's elements lie in the whole of which it may be a shard.

    A 16-bit average is rounded by a hash of each element's index in the whole, so that shards get the bits that the
    whole would get. Other averages do not look at it.

    Args:
        seed: The seed of its rounding, from 0 to 2 ** 32 - 1.
        shape: Of the whole, which is contiguous. None: the tensor is the whole, counted as it lies in memory.
        offset: Where in the whole the tensor begins, an index for each dimension. None with ``shape``.

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
        """Return the indices in the whole of a tensor of ``shape`` that is here.

        Args:
            shape: The tensor's.
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
            if sizes and step == sizes[-1] * steps[-1]:  # goes on where the dimension inside of it ends
                sizes[-1] *= size
            elif size != 1 or not sizes:
                sizes.append(size)
                steps.append(step)
            step *= most
        return Box(first, tuple(reversed(sizes)) or (1,), tuple(reversed(steps)) or (1,))


@dataclass(frozen=True, slots=True)
class Box:
    """Indices in a whole: ``first + sum(steps[d] * i[d])`` for all ``i`` below ``sizes``, the last changing first.

    Args:
        first: The first of them.
        sizes: How many there are in each dimension. Dimensions that go on where the one inside ends are one.
        steps: How far it is from one to the next in each dimension.
    """

    first: int
    sizes: tuple[int, ...]
    steps: tuple[int, ...]

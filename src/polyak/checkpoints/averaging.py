"""The weighted average of checkpoints, one tensor at a time: its memory does not grow with their number or size."""

from collections.abc import Callable, Sequence
from functools import partial
from math import fsum, lcm

import torch
from torch import Tensor

from polyak.checkpoints.opening import Checkpoint
from polyak.checkpoints.plan import Plan, is_averaged, plan
from polyak.checkpoints.stored import StoredTensor
from polyak.checkpoints.weights import is_extra_state
from polyak.compat.folders import Box
from polyak.compat.words import shown
from polyak.errors import CheckpointError

__all__ = ["Plan", "add_", "average", "piece_of", "plan", "require_numbers", "require_range", "wide"]

# Elements that are averaged in one step: they fit in the caches of a processor, and torch does less than 2 ** 15 on one
# thread. With several it would wait for all of them at every step, and very long on a busy machine.
_PIECE = (1 << 15) - 64
# After reading so much, the memory of the files is let go.
_HELD_BYTES = 64 << 20


@torch.no_grad()
def average(plan: Plan, name: str, box: Box | None = None) -> Tensor:
    """Return the average of a tensor, in the dtype of the newest checkpoint.

    Integers and extra states are those of the newest.

    The sum is in float64, and rounded once.

    Args:
        plan: What is averaged.
        name: The name of the tensor.
        box: Which part of it: where that begins and ends in each dimension; None for all.

    Raises:
        CheckpointError: If a file is damaged, has changed, or holds NaN.
    """
    like = plan.newest.tensors[name]
    try:
        if is_extra_state(name) or not is_averaged(like.dtype):
            one = like if box is None else like.part(box)
            return one.whole().clone()
        stored = [one.tensors[name] for one in plan.checkpoints]
        stored = stored if box is None else [one.part(box) for one in stored]
        return _average(plan, name, stored).reshape(stored[-1].shape)
    finally:
        _release(plan)


def _average(plan: Plan, name: str, stored: Sequence[StoredTensor]) -> Tensor:
    end, dtype = stored[-1].numel, stored[-1].dtype
    for one in stored:
        one.read(0, min(one.grain, end))  # before there is memory for what a damaged file may claim
    found = torch.empty(end, dtype=dtype)
    grain = lcm(*(one.grain for one in stored))
    step = _pieces_of(grain)
    most = max(1, _HELD_BYTES // (step * sum(one.dtype.itemsize for one in stored)))
    reads = [one.read if one.shards == 1 else _Ahead(one, step * min(one.shards, most)).read for one in stored]
    may_overflow = any(_largest(one.dtype) > _largest(dtype) for one in stored)
    held = 0
    for first in range(0, end, step):
        last = min(first + step, end)
        mean = _mean(plan, name, [partial(read, first, last) for read in reads], dtype)
        found[first:last] = mean
        if may_overflow:
            require_range(plan, name, found[first:last], mean)
        held += sum((last - first) * one.dtype.itemsize for one in stored)
        if held > _HELD_BYTES:
            _release(plan)
            held = 0
    return found


def _pieces_of(grain: int) -> int:
    return max(grain, _PIECE // grain * grain)


def piece_of(stored: StoredTensor) -> int:
    """Return how many elements of a tensor are read in one call.

    Args:
        stored: The tensor.
    """
    return _pieces_of(stored.grain) * stored.shards


def _largest(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).max


def require_range(plan: Plan, name: str, rounded: Tensor, mean: Tensor) -> None:
    """See that an average was not rounded to infinity.

    Args:
        plan: What is averaged.
        name: The name of the tensor.
        rounded: In the dtype of the newest checkpoint.
        mean: Before it was rounded.

    Raises:
        CheckpointError: If it was.
    """
    if bool((rounded.to(mean.dtype).isfinite() != mean.isfinite()).any()):
        raise CheckpointError(
            f"an average must fit the dtype of the newest checkpoint ({shown(name)} has {float(mean.abs().max()):.3g}, "
            f"more than {rounded.dtype} of {shown(plan.newest.path)} holds); give one in a wider dtype"
        )


class _Ahead:
    """Reads a tensor in larger pieces than are asked for: each has rows of several shards, which are copied together.

    Args:
        stored: The tensor.
        numel: How many elements are read in one call.
    """

    def __init__(self, stored: StoredTensor, numel: int) -> None:
        self._stored, self._numel = stored, numel
        self._begin, self._held = 0, torch.empty(0)

    def read(self, first: int, last: int) -> Tensor:
        """Return the elements from one number to another."""
        if not self._begin <= first or last > self._begin + len(self._held):
            self._begin = first
            self._held = self._stored.read(first, min(max(last, first + self._numel), self._stored.numel))
        return self._held[first - self._begin : last - self._begin]


def _release(plan: Plan) -> None:
    for one in plan.checkpoints:
        one.files.release()


def _mean(plan: Plan, name: str, reads: Sequence[Callable[[], Tensor]], dtype: torch.dtype) -> Tensor:
    total = torch.zeros((), dtype=wide(dtype))
    begun = False
    # The newest first, as a sum that grows by older checkpoints.
    for read, amount in zip(reversed(reads), reversed(plan.amounts), strict=True):
        if amount and begun:
            add_(total, read(), amount)
        elif amount:
            total, begun = read().to(total.dtype, copy=True), True
            if amount != 1:
                total.mul_(amount)
    total.div_(fsum(plan.amounts))  # at the end: a third of a number is not exact, the sum of three is
    if not bool(total.sum().isfinite()):
        pieces = [
            (one, read()) for one, read, amount in zip(plan.checkpoints, reads, plan.amounts, strict=True) if amount
        ]
        for one, piece in pieces:
            require_numbers(name, one, piece, pieces[-1])
    return total


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a sum.

    Args:
        dtype: The dtype of what is added.
    """
    return torch.complex128 if dtype.is_complex else torch.float64


def add_(total: Tensor, piece: Tensor, amount: float = 1) -> None:
    """Add to a sum.

    Args:
        total: The sum.
        piece: What is added.
        amount: How many times.
    """
    total.add_(piece if piece.dtype.itemsize > 1 else piece.to(total.dtype), alpha=amount)  # float8 cannot be added


def require_numbers(name: str, one: Checkpoint, piece: Tensor, newest: tuple[Checkpoint, Tensor]) -> None:
    """See that a checkpoint has no NaN, and infinities only where the newest has the same, as masks do.

    Args:
        name: The name of the tensor.
        one: The checkpoint.
        piece: The piece of the tensor.
        newest: The newest checkpoint, and what it has there.

    Raises:
        CheckpointError: If it is not so.
    """
    here, there = piece.to(wide(piece.dtype)), newest[1].to(wide(piece.dtype))
    if bool(here.isnan().any()):
        raise CheckpointError(f"weights must be numbers ({shown(name)} in {shown(one.path)} has NaN); leave it out")
    infinite = here.isinf()
    if bool((infinite != there.isinf()).any()) or bool((here[infinite] != there[infinite]).any()):
        more, less = (one, newest[0]) if int(infinite.sum()) >= int(there.isinf().sum()) else (newest[0], one)
        raise CheckpointError(
            f"weights must be finite, or have inf and -inf in the same places ({shown(name)} in {shown(more.path)} has "
            f"others than in {shown(less.path)}); leave it out"
        )

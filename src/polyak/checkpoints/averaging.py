"""The weighted average of checkpoints, one tensor at a time: its memory does not grow with their number or size."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum, isfinite, lcm

import torch
from torch import Tensor

from polyak.checkpoints.opening import Checkpoint
from polyak.checkpoints.stored import StoredTensor
from polyak.checkpoints.weights import is_extra_state
from polyak.compat.words import listed, shown
from polyak.errors import ArgumentError, CheckpointError

# Elements that are averaged in one step: they fit in the caches of a processor, and torch does less than 2 ** 15 on one
# thread. With several it would wait for all of them at every step, and very long on a busy machine.
_PIECE = (1 << 15) - 64
# After reading so much, the memory of the files is let go.
_HELD_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Plan:
    """What is averaged, and how.

    Args:
        checkpoints: The newest last.
        amounts: How much each checkpoint counts, relative to the others.
        names: Of the tensors that are averaged, in the order of the newest.
        left_out: Names that not all checkpoints have.
    """

    checkpoints: Sequence[Checkpoint]
    amounts: Sequence[float]
    names: Sequence[str]
    left_out: Sequence[str] = ()

    @property
    def weights(self) -> list[float]:
        """The weight of each checkpoint; they sum to 1."""
        return [amount / fsum(self.amounts) for amount in self.amounts]

    @property
    def newest(self) -> Checkpoint:
        """The checkpoint whose dtypes, layout and integers the average has."""
        return self.checkpoints[-1]

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """What the average is like: those tensors of the newest checkpoint that are averaged."""
        return {name: self.newest.tensors[name] for name in self.names}


def plan(checkpoints: Sequence[Checkpoint], weights: Sequence[float], *, common: bool = False) -> Plan:
    """See that checkpoints can be averaged.

    Args:
        checkpoints: The newest last.
        weights: One for each, at least 0. They are divided by their sum.
        common: Whether to average the tensors that all have, where the names differ.

    Raises:
        ArgumentError: If there is nothing to average, or the weights are no weights.
        CheckpointError: If the checkpoints are not of one model.
    """
    if not checkpoints or len(weights) != len(checkpoints):
        raise ArgumentError(f"each checkpoint must have a weight (got {len(weights)} for {len(checkpoints)})")
    total = fsum(weights)
    if not all(isfinite(weight) and weight >= 0 for weight in weights) or not 0 < total < float("inf"):
        raise ArgumentError(f"weights must be finite, at least 0, and one above 0 (got {[*weights]})")
    newest = checkpoints[-1]
    left_out = dict[str, None]()
    for one in checkpoints:
        missing = [name for name in newest.tensors if name not in one.tensors]
        more = [name for name in one.tensors if name not in newest.tensors]
        if (missing or more) and not common:
            lacks = f"it lacks {listed(missing)}" if missing else ""
            has = f"only it has {listed(more)}" if more else ""
            raise CheckpointError(
                f"checkpoints must have the same tensors ({shown(one.path)} differs from {shown(newest.path)}: "
                f"{'; '.join(filter(None, (lacks, has)))}); leave it out, or average what all have with --common"
            )
        left_out |= dict.fromkeys([*missing, *more])
    names = [name for name in newest.tensors if name not in left_out]
    if not names:
        raise CheckpointError("checkpoints must have tensors in common (they have none); average those of one model")
    for one in checkpoints:
        _require_same_shapes(one, newest, names)
    return Plan(checkpoints, weights, names, tuple(left_out))


def _require_same_shapes(one: Checkpoint, newest: Checkpoint, names: Sequence[str]) -> None:
    for name in names:
        if is_extra_state(name):  # its length may change from save to save
            continue
        here, there = one.tensors[name], newest.tensors[name]
        if here.shape != there.shape:
            raise CheckpointError(
                f"tensors of one name must have one shape ({shown(name)} has {here.shape} in {shown(one.path)}, and "
                f"{there.shape} in {shown(newest.path)}); average checkpoints of one model"
            )
        if _is_averaged(here.dtype) != _is_averaged(there.dtype):
            raise CheckpointError(
                f"a tensor must hold numbers of one kind ({shown(name)} has {here.dtype} in {shown(one.path)}, and "
                f"{there.dtype} in {shown(newest.path)}); average checkpoints of one model"
            )


def _is_averaged(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


@torch.no_grad()
def average(plan: Plan, name: str, first: int = 0, last: int | None = None) -> Tensor:
    """Return the average of a tensor, in the dtype of the newest checkpoint.

    Integers and extra states are those of the newest.

    The sum is in float64, and rounded once.

    Args:
        plan: What is averaged.
        name: Of the tensor.
        first: The first element that is averaged, a multiple of the grain of all.
        last: The one after the last, and the result has one dimension; None for all, in their shape.

    Raises:
        CheckpointError: If a file is damaged, has changed, or holds NaN.
    """
    like = plan.newest.tensors[name]
    try:
        end = like.numel if last is None else last
        copied = is_extra_state(name) or not _is_averaged(like.dtype)
        found = like.read(first, end).clone() if copied else _average(plan, name, first, end)
        return found.reshape(like.shape) if last is None else found
    finally:
        _release(plan)


def _average(plan: Plan, name: str, begin: int, end: int) -> Tensor:
    like = plan.newest.tensors[name]
    stored = [one.tensors[name] for one in plan.checkpoints]
    for one in stored:
        one.read(begin, min(begin + one.grain, end))  # before there is memory for what a damaged file may claim
    found = torch.empty(end - begin, dtype=like.dtype)
    grain = lcm(*(one.grain for one in stored))
    step = max(grain, _PIECE // grain * grain)
    held = 0
    for first in range(begin, end, step):
        last = min(first + step, end)
        found[first - begin : last - begin] = _mean(plan, name, first, last)
        held += sum((last - first) * one.dtype.itemsize for one in stored)
        if held > _HELD_BYTES:
            _release(plan)
            held = 0
    return found


def _release(plan: Plan) -> None:
    for one in plan.checkpoints:
        one.files.release()


def _mean(plan: Plan, name: str, first: int, last: int) -> Tensor:
    wide = torch.complex128 if plan.newest.tensors[name].dtype.is_complex else torch.float64
    counted = [(one, amount) for one, amount in zip(plan.checkpoints, plan.amounts, strict=True) if amount]
    (begin, amount), *others = counted
    total = begin.tensors[name].read(first, last).to(wide, copy=True)
    if amount != 1:
        total.mul_(amount)
    for one, amount in others:
        total.add_(one.tensors[name].read(first, last), alpha=amount)
    total.div_(fsum(plan.amounts))  # at the end: a third of a number is not exact, the sum of three is
    if bool(total.sum().isnan()):
        _require_no_nan(plan, name, first, last)
    return total


def _require_no_nan(plan: Plan, name: str, first: int, last: int) -> None:
    used = [one for one, weight in zip(plan.checkpoints, plan.weights, strict=True) if weight]
    pieces = [one.tensors[name].read(first, last).to(torch.complex128) for one in used]
    for one, piece in zip(used, pieces, strict=True):
        if bool(piece.isnan().any()):
            raise CheckpointError(f"weights must be numbers ({shown(name)} in {shown(one.path)} has NaN); leave it out")
    if bool(sum(pieces, torch.zeros_like(pieces[0])).isnan().any()):
        raise CheckpointError(
            f"weights must be finite ({shown(name)} has inf and -inf in the same place); leave out a checkpoint"
        )

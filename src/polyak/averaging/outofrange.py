"""Warns if an average has reached the limit of its dtype because weights exceed it."""

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from polyak.errors import PlanWarning
from polyak.sharding import local
from polyak.tensors.slots import Slot


@torch.no_grad()
def warn_of_range(averaged: Iterable[tuple[Slot, Tensor]]) -> bool:
    """Warn of averages that have reached the largest value of their dtype, or NaN beyond it; return whether any have.

    An average lies between weights that it has seen. So only averages whose dtype has a smaller range than the model's
    are read, such as float16 averages of float32 weights. Others cost nothing.

    Args:
        averaged: The averages, each with the place of its tensor in the model.
    """
    reached = [
        (slot.name, average.dtype)
        for slot, average in averaged
        if slot.is_in_place and _is_narrow(average, slot.tensor) and _is_full(average)
    ]
    if not reached:
        return False
    name, dtype = reached[0]
    more = f" and {len(reached) - 1} more" if len(reached) > 1 else ""
    warnings.warn(
        f"weights must be at most {torch.finfo(dtype).max:g} to be averaged in {dtype} (those of {name!r}{more} were "
        "larger, and their average is wrong); average in a dtype with a wider range, or leave out dtype= of the EMA",
        PlanWarning,
        stacklevel=7,
    )
    return True


def _is_narrow(average: Tensor, tensor: Tensor) -> bool:
    one, other = average.dtype, tensor.dtype
    known = (one.is_floating_point or one.is_complex) and (other.is_floating_point or other.is_complex)
    # bfloat16 and float32 have almost the same range.
    return known and one != other and torch.finfo(one).max < torch.finfo(other).max / 2


def _is_full(average: Tensor) -> bool:
    values = local(average)
    if not values.numel() or values.is_meta:
        return False
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj())
    low, high = values.aminmax()
    most = torch.finfo(values.dtype).max
    return not bool((low > -most) & (high < most))  # True also for NaN, which an update past inf leaves

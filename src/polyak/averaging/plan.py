"""Lists what averaging does with each tensor of a model, and why, before any training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from polyak.averaging.creation import check_layout
from polyak.errors import PolyakError
from polyak.tensors.slots import (
    Decision,
    Policy,
    PolicyRule,
    Slot,
    all_slots,
    decide,
    decided,
    default_policy,
    trained_through,
    views_of,
)


@dataclass(frozen=True, slots=True)
class Row:
    """What is done with one tensor.

    Args:
        name: Its canonical name.
        shape: Its shape.
        dtype: Its dtype.
        decision: ``"average"``, ``"copy"``, ``"leave"``, ``"shared"`` or ``"refused"``.
        reason: Why.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    decision: str
    reason: str


class Plan(Sequence[Row]):
    """A row for each tensor of a model; printed, it is a table.

    Args:
        rows: The rows in the order of the table.

    Example:
        >>> print(plan(nn.Sequential(nn.Linear(2, 1, bias=False), nn.BatchNorm1d(1))))
        0.weight               1x2  float32  average  a parameter that is trained
        1.weight               1    float32  average  a parameter that is trained
        1.bias                 1    float32  average  a parameter that is trained
        1.running_mean         1    float32  average  a running statistic
        1.running_var          1    float32  average  a running statistic
        1.num_batches_tracked  -    int64    copy     a buffer that is no running statistic: its last value counts
        6 tensors: 5 average, 1 copy
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = tuple(rows)

    def __getitem__(self, index: int) -> Row:  # type: ignore[override]
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        cells = [
            (row.name, "x".join(map(str, row.shape)) or "-", str(row.dtype).removeprefix("torch."), row.decision)
            for row in self.rows
        ]
        widths = [max(map(len, column), default=0) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=True)), row.reason])
            for line, row in zip(cells, self.rows, strict=True)
        ]
        kinds = dict.fromkeys(row.decision for row in self.rows)
        counts = [f"{sum(row.decision == kind for row in self.rows)} {kind}" for kind in kinds]
        return "\n".join([*lines, f"{len(self.rows)} tensors: {', '.join(counts)}" if counts else "no tensors"])

    __repr__ = __str__


def plan(model: nn.Module, policy: PolicyRule = default_policy) -> Plan:
    """Return what averaging does with each tensor of a model, and why.

    Args:
        model: Wrapped or not.
        policy: As given to ``EMA``.

    Raises:
        MemoryLayoutError: If two tensors overlap in part.

    Example:
        >>> plan(nn.Linear(2, 1).requires_grad_(False))[0]
        Row(name='weight', shape=(1, 2), dtype=torch.float32, decision='leave', reason='a frozen parameter')
    """
    views = views_of(model)
    owners = {name: own.name for name, (own, _) in views.items()}
    through = trained_through(views, policy)
    return Plan([_row(slot, policy, owners, through) for slot in all_slots(model)])


def _row(slot: Slot, policy: PolicyRule, owners: Mapping[str, str], through: set[str]) -> Row:
    tensor = slot.tensor
    if slot.name in owners:
        decision, reason = "shared", f"its memory is that of {owners[slot.name]}"
    else:
        own = policy is default_policy
        made = decide(slot) if own else Decision(decided(policy, slot), "the policy that was given says so")
        if slot.name in through and made.policy is not Policy.AVERAGE:
            made = Decision(Policy.AVERAGE, "it shares its memory with a parameter that is trained")
        decision, reason = made.policy.value, made.reason
        if made.policy is not Policy.LEAVE:
            try:
                check_layout(slot, made.policy)
            except (PolyakError, ValueError) as error:
                decision, reason = "refused", str(error)
    shape = () if torch.nn.parameter.is_lazy(tensor) or tensor.is_nested else tuple(tensor.shape)
    return Row(slot.name, shape, tensor.dtype, decision, reason)

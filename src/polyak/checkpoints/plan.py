"""What to average: checkpoints, their weights, and the names of the tensors that they have in common."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import frexp, fsum, isfinite, ldexp

import torch

from polyak.checkpoints.opening import Checkpoint
from polyak.checkpoints.quantized import require_no_codes
from polyak.checkpoints.stored import StoredTensor
from polyak.checkpoints.weights import is_extra_state
from polyak.compat.found import plain_names
from polyak.compat.words import listed, shown
from polyak.errors import ArgumentError, CheckpointError

# Weights below and above these powers of 2 are scaled, so that no sum of weights times tensors overflows.
_EXPONENT = 64


@dataclass(frozen=True, slots=True)
class Plan:
    """What is averaged, and how.

    Args:
        checkpoints: The newest last.
        amounts: How much each checkpoint counts, relative to the others.
        names: The names of the tensors that are averaged, in the order of the newest.
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
    if not all(isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
        raise ArgumentError(f"weights must be finite, at least 0, and one above 0 (got {[*weights]})")
    for one in checkpoints:
        require_no_codes(one)
    newest = checkpoints[-1]
    checkpoints = [named_as(one, newest) for one in checkpoints]
    left_out = dict[str, None]()
    for one in checkpoints:
        missing = [name for name in newest.tensors if name not in one.tensors]
        more = [name for name in one.tensors if name not in newest.tensors]
        if (missing or more) and not common:
            lacks = f"it lacks {listed(missing)}" if missing else ""
            has = f"only it has {listed(more)}" if more else ""
            raise CheckpointError(
                f"checkpoints must have the same tensors ({shown(one.path)} differs from {shown(newest.path)}: "
                f"{'; '.join(filter(None, (lacks, has)))}); {_instead(one, newest)}"
            )
        left_out |= dict.fromkeys([*missing, *more])
    names = [name for name in newest.tensors if name not in left_out]
    if not names:
        raise CheckpointError("checkpoints must have tensors in common (they have none); average those of one model")
    for one in checkpoints:
        _require_same_shapes(one, newest, names)
    return Plan(checkpoints, _in_range(weights), names, tuple(left_out))


def _instead(one: Checkpoint, newest: Checkpoint) -> str:
    """Return what to do where names differ."""
    for longer, shorter in ((one, newest), (newest, one)):
        first = next(iter(shorter.tensors))
        for name in longer.tensors:
            prefix = name.removesuffix(first)
            if prefix.endswith(".") and {f"{prefix}{one}" for one in shorter.tensors} == longer.tensors.keys():
                return (
                    f"write it without {shown(prefix)} by polyak average {shown(longer.path)} --prefix {shown(prefix)} "
                    "-o, and average that"
                )
    return "leave it out, or average what all have with --common"


def named_as(one: Checkpoint, like: Checkpoint) -> Checkpoint:
    """Return a checkpoint with the names of another, where they differ by wrappers alone.

    ``torch.compile``, DDP and FSDP put words into names, and a run that is resumed may have others.

    Args:
        one: The checkpoint.
        like: Has the names.
    """
    here, there = plain_names(one.tensors), plain_names(like.tensors)
    if one.tensors.keys() == like.tensors.keys() or len(here) < len(one.tensors) or len(there) < len(like.tensors):
        return one
    return replace(one, tensors={there.get(name, own): one.tensors[own] for name, own in here.items()})


def _in_range(weights: Sequence[float]) -> Sequence[float]:
    """Return weights times the same power of 2, if they are very large or small."""
    _, exponent = frexp(max(weights))
    return weights if abs(exponent) <= _EXPONENT else [ldexp(weight, -exponent) for weight in weights]


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
        if is_averaged(here.dtype) != is_averaged(there.dtype):
            raise CheckpointError(
                f"a tensor must hold numbers of one kind ({shown(name)} has {here.dtype} in {shown(one.path)}, and "
                f"{there.dtype} in {shown(newest.path)}); average checkpoints of one model"
            )


def is_averaged(dtype: torch.dtype) -> bool:
    """Return whether numbers of a dtype are averaged, or else those of the newest checkpoint are taken.

    Args:
        dtype: The dtype of a tensor.
    """
    return dtype.is_floating_point or dtype.is_complex

"""The loops that train a model, and a warning if two of them average it, as after a notebook's cell has run again."""

import gc
import warnings
from typing import TYPE_CHECKING
from weakref import WeakSet

from torch import nn

from polyak.errors import PlanWarning
from polyak.tensors.slots import unwrap
from polyak.training.steps import StepHooks

if TYPE_CHECKING:
    from polyak.training.loop import Loop

_LOOPS: "WeakSet[Loop]" = WeakSet()  # those that have begun to train


def warn_of_second_average(loop: "Loop") -> None:
    """Warn if another loop averages the same model, counts the same steps, and was probably left by mistake.

    Two averages with different settings that begin together are intended.

    Args:
        loop: The loop that begins to train.
    """
    if _others(loop):
        gc.collect()  # loops that are only in a cycle of references are about to be freed
        if others := _others(loop):
            warnings.warn(
                f"a model should have one average, and {others[0]} follows this one already: each step updates it and "
                f"{_swapping(loop)[0]}; call detach() of what the first attach returned, or delete the first trainer, "
                "before the second begins (to compare half-lives, keep a record by Recorder and choose afterwards)",
                PlanWarning,
                stacklevel=6,
            )
    _LOOPS.add(loop)


def begun(model: nn.Module) -> "list[Loop]":
    """Return the loops that have begun to train a model.

    Args:
        model: Wrapped or not.
    """
    return [loop for loop in _LOOPS if unwrap(loop.state.model) is unwrap(model)]


def _others(loop: "Loop") -> list[object]:
    """Return averages of other loops that follow the same steps, and have begun before or have the same settings."""
    ours = [repr(algorithm) for algorithm in _swapping(loop)]
    found = list[object]()
    for other in begun(loop.state.model) if ours else []:
        if other is loop or not _follow_same(loop, other):
            continue
        began_before = other.state.timestamp.batch > loop.state.timestamp.batch
        found += [algorithm for algorithm in _swapping(other) if began_before or repr(algorithm) in ours]
    return found


def _swapping(loop: "Loop") -> list[object]:
    return [algorithm for algorithm in loop.algorithms if algorithm.swaps]


def _follow_same(loop: "Loop", other: "Loop") -> bool:
    own, theirs = _hooks(loop), _hooks(other)
    return own is not None and theirs is not None and own.overlaps(theirs)


def _hooks(loop: "Loop") -> StepHooks | None:
    """Return the hooks with which a loop counts steps now; None if it does not count, or a caller does."""
    hooks = None if loop.uncounted is None else loop.uncounted.hooks
    return hooks if hooks is not None and hooks.counting else None

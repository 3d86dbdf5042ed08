"""Notes which parameters optimizers move, with one permanent hook on the steps of all of torch's optimizers.

``requires_grad`` at one moment is not enough: adversarial training freezes one half of a model while the other half's
optimizer steps, and yet both halves are trained.
"""

from collections.abc import Callable
from functools import cache
from weakref import WeakKeyDictionary, finalize

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

# Called with each optimizer before it steps. A guard raises to refuse the step.
guards: list[Callable[[Optimizer], None]] = []

# The parameters that each optimizer moves, by ids of both, for the optimizer's lifetime. They are no weak references:
# torch refuses to swap a tensor that has one, as in `.to()` of some models.
_moved = dict[int, dict[int, Tensor]]()
_notes = list[int]()  # one for each time that parameters were added to these
_seen = WeakKeyDictionary[Optimizer, tuple[int, list[Tensor]]]()  # the number of parameters, and the frozen ones


@cache
def watch() -> RemovableHandle:
    """Note what every optimizer moves from now on. Only the first call registers a hook."""
    return register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: Optimizer, args: object, kwargs: object) -> None:
    del args, kwargs
    if not torch.compiler.is_compiling():  # a step in one graph must stay one
        before_step(optimizer)


def before_step(optimizer: Optimizer) -> None:
    """Call the guards, and note what the step will move. Hooks on one optimizer, which are never compiled, call it too.

    Args:
        optimizer: Before its step.
    """
    for guard in guards:
        guard(optimizer)
    count = 0
    for group in optimizer.param_groups:
        count += len(group["params"])
    known, frozen = _seen.get(optimizer, (-1, []))
    if count != known:
        frozen = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    elif not frozen:
        return
    if known == -1:
        _moved[id(optimizer)] = {}
        finalize(optimizer, _moved.pop, id(optimizer), None)
    trained = {id(parameter): parameter for parameter in frozen if _is_trained(parameter)}
    if trained:
        _moved[id(optimizer)] |= trained
        _notes.append(len(trained))
    _seen[optimizer] = count, [parameter for parameter in frozen if id(parameter) not in trained]


def _is_trained(parameter: Tensor) -> bool:
    return parameter.requires_grad or parameter.grad is not None


def is_moved(parameter: Tensor) -> bool:
    """Return whether an optimizer that still exists has moved a parameter since ``watch`` was called.

    Args:
        parameter: Any tensor.
    """
    # A copy, since other threads may add optimizers.
    return any(moved.get(id(parameter)) is parameter for moved in list(_moved.values()))


def moves() -> int:
    """Return how many times ``is_moved`` has become true of parameters."""
    return len(_notes)

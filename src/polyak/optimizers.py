"""Which parameters optimizers move, seen by one permanent hook on the steps of all of torch's optimizers.

``requires_grad`` at some moment does not tell: adversarial training freezes one half of a model while the other half's
optimizer steps, and each half is trained all the same.
"""

from collections.abc import Callable
from functools import cache
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

# Called with each optimizer that is about to step. Whoever must refuse a step is on this list.
guards: list[Callable[[Optimizer], None]] = []

_moved = dict[int, "ref[Tensor]"]()  # by id of the parameter
_seen = WeakKeyDictionary[Optimizer, tuple[int, list[Tensor]]]()  # how many parameters, and those frozen so far


@cache
def watch() -> RemovableHandle:
    """Look at every optimizer that steps from now on. Only the first call does something."""
    return register_optimizer_step_pre_hook(_before_step)


@torch.compiler.disable
def _before_step(optimizer: Optimizer, args: object, kwargs: object) -> None:
    del args, kwargs
    for guard in guards:
        guard(optimizer)
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    known, frozen = _seen.get(optimizer, (-1, []))
    if count != known:
        frozen = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    elif not frozen:
        return
    _seen[optimizer] = count, [parameter for parameter in frozen if not _note(parameter)]


def _note(parameter: Tensor) -> bool:
    """Note a parameter that this step may move, and return whether it does."""
    if not (parameter.requires_grad or parameter.grad is not None):
        return False
    if not is_moved(parameter):
        key = id(parameter)
        _moved[key] = ref(parameter, lambda gone: _moved.pop(key) if _moved.get(key) is gone else None)
    return True


def is_moved(parameter: Tensor) -> bool:
    """Return whether an optimizer has moved a parameter since ``watch`` was called.

    Args:
        parameter: Any tensor.
    """
    known = _moved.get(id(parameter))
    return known is not None and known() is parameter

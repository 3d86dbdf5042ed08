"""``Uncounted``: a warning about weights that move without a step that is counted."""

import warnings
from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from polyak.errors import PlanWarning
from polyak.sharding import local
from polyak.training.optimizer import BY_HAND, moves_parameters
from polyak.training.steps import StepHooks


class Uncounted:
    """Warns, once, if weights have moved without a step that was counted.

    Args:
        model: In training, wrapped or not. Its weights are noted.
        hooks: On the optimizer whose steps are counted; None if they are counted by hand.
        replaced: Called when another optimizer seems to have replaced it.

    Attributes:
        hooks: As given.
    """

    def __init__(self, model: nn.Module, hooks: StepHooks | None, replaced: Callable[[], object]) -> None:
        self._model, self.hooks, self._warned = model, hooks, False
        self._before = _norms(model)
        self._replaced = replaced
        if hooks is not None:
            hooks.replaced = self._check

    def reset(self) -> None:
        """Note the weights again: they were loaded."""
        self._before = _norms(self._model)

    def _check(self, other: Optimizer) -> None:
        if moves_parameters(other, self._model):
            self._replaced()

    def warn(self, counted: int) -> None:
        """Warn if weights have moved since the last step that was counted, as far as that can be seen.

        Args:
            counted: The number of steps that were counted since this was made.
        """
        if counted:
            self._before = {}
        if self._warned:
            return
        message = self._message(counted)
        if message is not None:
            self._warned = True
            warnings.warn(message, PlanWarning, stacklevel=5)

    def _message(self, counted: int) -> str | None:
        hooks = self.hooks
        if hooks is not None and hooks.others:
            optimizer = hooks.optimizer
            name = "the optimizer that was attached" if optimizer is None else type(optimizer).__name__
            gone = ", which is gone," if optimizer is None else ""
            return (
                f"steps must be counted to be averaged: {counted} of {name}{gone} were, and since then {hooks.others} "
                f"of {hooks.other}, which steps the same parameters, were not; attach the algorithm to that "
                f"{hooks.other}, or {BY_HAND}"
            )
        moved = [name for name, norm in _norms(self._model, self._before.keys()).items() if self._differs(name, norm)]
        if not moved:
            return None
        remedy = (
            f"let the loop call step() of {type(hooks.optimizer).__name__}, or {BY_HAND}"
            if hooks
            else "call step() of what attach returned once after each batch"
        )
        return (
            f"steps must be counted to be averaged: {len(moved)} parameters have moved, such as '{moved[0]}', and "
            f"{counted} steps were counted; {remedy} (if these weights were loaded and not trained, load them before "
            "attach)"
        )

    def _differs(self, name: str, norm: Tensor) -> bool:
        before = self._before[name]
        return before.device == norm.device and not torch.equal(before.nan_to_num(), norm.nan_to_num())


@torch.no_grad()
def _norms(model: nn.Module, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """Return the norm of each trainable or named parameter's local shard, without waiting for a device."""
    shards = {
        name: local(parameter).detach()
        for name, parameter in model.named_parameters()
        if (parameter.requires_grad if names is None else name in names) and _is_plain(parameter)
    }
    norms = dict[str, Tensor]()
    for wide in (False, True):
        # In float32 at least, since a sum of squares of 16-bit values may exceed their range; float64 in float64.
        names = [name for name, tensor in shards.items() if (tensor.dtype == torch.float64) is wide]
        dtype = torch.float64 if wide else torch.float32
        found = torch._foreach_norm([shards[name] for name in names], dtype=dtype) if names else []  # noqa: SLF001
        norms.update(zip(names, found, strict=True))
    return norms


def _is_plain(parameter: Tensor) -> bool:
    if is_lazy(parameter):
        return False
    tensor = local(parameter)
    plain = type(tensor) in {Tensor, nn.Parameter} and tensor.layout == torch.strided
    return plain and not tensor.is_meta and tensor.dtype in _NORMED


_NORMED = {torch.float16, torch.bfloat16, torch.float32, torch.float64}

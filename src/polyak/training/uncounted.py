"""``Uncounted``: warnings about weights that move without a step that is counted."""

import warnings
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from polyak.averaging.swap import swap_of
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
        self._before, self._counted = _norms(_parameters(model)), 0
        self._replaced = replaced
        self._stepped, self._after_step = dict[str, Tensor](), dict[str, Tensor]()
        if hooks is not None:
            hooks.replaced = self._check
            hooks.after_some, hooks.before_next = self._note, self._compare

    def reset(self, counted: int) -> None:
        """Note the weights again: they were loaded.

        Args:
            counted: The number of steps that were counted since this was made.
        """
        self._before, self._counted, self._stepped = _norms(_parameters(self._model)), counted, {}

    def _check(self, other: Optimizer) -> None:
        if moves_parameters(other, self._model):
            self._replaced()

    def warn(self, counted: int, *, ended: bool = False) -> None:
        """Warn if weights have moved since the last step that was counted, as far as that can be seen.

        Args:
            counted: The number of steps that were counted since this was made.
            ended: Whether the run has ended: its trainer may have loaded the best weights.
        """
        if self._warned or swap_of(self._model) is not None:
            return
        message = self._of_other_optimizers(counted) or self._of_weights(counted, ended=ended)
        if message is not None:
            self._warned = True
            warnings.warn(message, PlanWarning, stacklevel=5)

    def _of_other_optimizers(self, counted: int) -> str | None:
        hooks = self.hooks
        if hooks is None or not hooks.others:
            return None
        optimizer = hooks.optimizer
        name = "the optimizer that was attached" if optimizer is None else type(optimizer).__name__
        gone = ", which is gone," if optimizer is None else ""
        return (
            f"steps must be counted to be averaged: {counted} of {name}{gone} were, and since then {hooks.others} "
            f"of {hooks.other}, which steps the same parameters, were not; attach the algorithm to that "
            f"{hooks.other}, or {BY_HAND}"
        )

    def _of_weights(self, counted: int, *, ended: bool) -> str | None:
        """Compare the weights with those of the last check, if no step was counted since then."""
        if counted != self._counted or (ended and counted):
            self._before, self._counted = _norms(_parameters(self._model)), counted
            return None
        moved = _moved(self._before, _norms(_parameters(self._model, self._before.keys())))
        if not moved:
            return None
        remedy = (
            f"let the loop call step() of {type(self.hooks.optimizer).__name__}, or {BY_HAND}"
            if self.hooks
            else "call step() of what attach returned once after each batch"
        )
        since = f" since the last check, after {counted} steps" if counted else ""
        return (
            f"steps must be counted to be averaged: {len(moved)} parameters have moved{since}, such as '{moved[0]}', "
            f"and 0 steps were counted; {remedy} (if these weights were loaded and not trained, load them before "
            "attach)"
        )

    # Between two steps

    def _note(self) -> None:
        """Note the weights that the optimizer steps, where one of its steps has ended."""
        if self.hooks is not None and not self._warned and not _is_capturing():
            self._stepped = _parameters(self._model, of=self.hooks)
            self._after_step = _norms(self._stepped)

    def _compare(self) -> None:
        """Warn if these weights have changed before the next step, as where a loop clips them."""
        stepped, self._stepped, hooks = self._stepped, {}, self.hooks
        if hooks is None or hooks.others or self._warned or _is_capturing():
            return
        moved = _moved(self._after_step, _norms(stepped), tolerance=_ROUNDING)
        if moved:
            self._warned = True
            warnings.warn(
                "weights must not change between two steps of the optimizer that is counted, since the average takes "
                f"them where a step ends: {len(moved)} parameters have, such as '{moved[0]}'. If the loop clips, masks "
                f"or normalizes weights after each step of {type(hooks.optimizer).__name__}, {BY_HAND}, after that "
                "(if they were loaded, nothing is wrong)",
                PlanWarning,
                stacklevel=5,
            )


# A perturbation that is taken back, as by some implementations of SAM, leaves rounding errors.
_ROUNDING = 1e-5


def _moved(before: Mapping[str, Tensor], now: Mapping[str, Tensor], tolerance: float = 0.0) -> list[str]:
    """Return the names whose norms differ. Norms on another device or of another dtype say nothing."""
    found = list[str]()
    for name, norm in now.items():
        other = before[name]
        if (other.device, other.dtype) == (norm.device, norm.dtype):
            same = torch.allclose(other.nan_to_num(), norm.nan_to_num(), rtol=tolerance, atol=0.0)
            found += [] if same else [name]
    return found


def _parameters(
    model: nn.Module, names: Collection[str] | None = None, of: StepHooks | None = None
) -> dict[str, Tensor]:
    """Return the parameters that are trainable, or named; only those that an optimizer steps, if one is given."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if (parameter.requires_grad if names is None else name in names)
        and (of is None or of.steps(parameter))
        and _is_plain(parameter)
    }


@torch.no_grad()
def _norms(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the norm of each parameter's local shard, without waiting for a device."""
    shards = {name: local(parameter).detach() for name, parameter in parameters.items()}
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


def _is_capturing() -> bool:
    """Return whether a CUDA graph is being captured, in which nothing may be read."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


_NORMED = {torch.float16, torch.bfloat16, torch.float32, torch.float64}

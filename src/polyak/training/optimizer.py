"""Finds the optimizer whose steps are counted, and refuses optimizers whose steps cannot be."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from polyak.errors import OptimizerError
from polyak.sharding import is_initialized

# Wrappers whose `step` does nothing to the weights but call the step of the optimizer under this attribute: those of
# Accelerate, Lightning, Fabric and Opacus. Any other wrapper may move the weights after that step, as Lookahead does.
_DELEGATES = {
    "AcceleratedOptimizer": "optimizer",
    "LightningOptimizer": "optimizer",
    "_FabricOptimizer": "optimizer",
    "DPOptimizer": "original_optimizer",
}
BY_HAND = "give attach(..., None) instead, and call step() of what it returns once after each batch"


_INTEGRATION = "polyak.hosts.deepspeed with DeepSpeed, polyak.hosts.megatron with Megatron"


def counted_optimizer(optimizer: object) -> Optimizer:
    """Return the optimizer whose steps are counted: the outermost one that runs torch's step hooks.

    If a wrapper only calls another optimizer, as Accelerate's does, the inner one is counted. Other wrappers, such as
    Lookahead, are counted themselves, since they may move the weights after the step of the optimizer inside.

    Args:
        optimizer: Wrapped or not.

    Raises:
        OptimizerError: If it is not a torch optimizer, or does not run torch's step hooks.

    Example:
        >>> sgd = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
        >>> counted_optimizer(sgd) is sgd
        True
    """
    for cls in type(optimizer).__mro__:
        inner = getattr(optimizer, _DELEGATES[cls.__name__], None) if cls.__name__ in _DELEGATES else None
        if inner is not None:
            return counted_optimizer(inner)
    name = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise OptimizerError(
            f"optimizer must be one torch.optim.Optimizer, and {_shown(optimizer)} is none; {_instead(optimizer)}"
        )
    hooks = {"_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"}
    if not hooks <= vars(optimizer).keys() or not getattr(type(optimizer).step, "hooked", False):
        raise OptimizerError(
            f"optimizer must run torch's step hooks, and {name} does not, since its __init__ does not call that of "
            f"torch.optim.Optimizer; {BY_HAND}"
        )
    return optimizer


def _shown(given: object) -> str:
    return f"the class {given.__name__}" if isinstance(given, type) else type(given).__name__


def _instead(given: object) -> str:
    """Return what to give instead of an object that is not an optimizer."""
    if isinstance(given, type):
        return f"make one over the model's parameters: {given.__name__}(model.parameters(), ...)"
    if type(given).__module__.partition(".")[0] == "deepspeed":
        return "its engine steps float32 masters: use polyak.hosts.deepspeed, which averages these"
    if type(given).__module__.startswith("megatron.core."):
        return "it steps float32 masters: use polyak.hosts.megatron, which averages these"
    if isinstance(given, nn.Module):
        return "it is a model, the second argument: attach(EMA(...), model, optimizer)"
    if isinstance(getattr(given, "optimizer", None), Optimizer) and hasattr(given, "get_last_lr"):
        return "give the optimizer that this scheduler changes"
    return f"of several give the one that steps last in a batch; if there is no such optimizer, {BY_HAND}"


def refuse_masters(optimizer: Optimizer, model: nn.Module) -> None:
    """Refuse an optimizer that steps other tensors than the model's, which are copied to the model later.

    Engines with float32 masters do so: DeepSpeed's ZeRO, Megatron, apex O2. Right after a step of such an optimizer,
    the model still has its old weights.

    Args:
        optimizer: The optimizer whose steps are to be counted.
        model: The model in training, wrapped or not.

    Raises:
        OptimizerError: If none of its tensors is a parameter of the model, or it has float32 masters of the model's
            trainable 16-bit parameters.
    """
    stepped = {id(tensor): tensor for tensor in tensors_of(optimizer)}
    parameters = dict(model.named_parameters())
    ours = {id(parameter) for parameter in parameters.values()}
    foreign = [tensor for key, tensor in stepped.items() if key not in ours]
    what = f"{type(optimizer).__name__} (with {len(foreign)} of its {len(stepped)} tensors elsewhere)"
    if foreign and len(foreign) == len(stepped):
        raise OptimizerError(
            f"optimizer must step parameters of the model, and {what} has none of them; give it the optimizer of "
            f"list(model.parameters()) as they are now. If it steps float32 masters, as those of DeepSpeed, Megatron "
            f"and apex do, use {_INTEGRATION}; or, as for another model, {BY_HAND}, when the weights of the model have "
            "moved"
        )
    halves = [name for name, p in parameters.items() if id(p) not in stepped and _is_half(p)]
    masters = [tensor for tensor in foreign if tensor.dtype == torch.float32]
    sizes = [parameters[name].numel() for name in halves]
    if halves and (_covers([tensor.numel() for tensor in masters], sizes) or _covers_flat(masters, sum(sizes))):
        raise OptimizerError(
            f"optimizer must step the model's parameters themselves, and {what} steps float32 masters of "
            f"'{halves[0]}' and {len(halves) - 1} others, which are copied to the model after its step; use "
            f"{_INTEGRATION}; or {BY_HAND}, when that is done"
        )


def _is_half(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad and not is_lazy(parameter) and parameter.dtype in {torch.float16, torch.bfloat16}


def _covers(sizes: Iterable[int], wanted: Iterable[int]) -> bool:
    left = list(sizes)
    for size in wanted:
        if size not in left:
            return False
        left.remove(size)
    return True


def _covers_flat(masters: Iterable[Tensor], wanted: int) -> bool:
    """Return whether flat masters are this rank's part of ``wanted`` elements, with padding."""
    ranks = torch.distributed.get_world_size() if is_initialized() else 1
    found = ranks * sum(tensor.numel() for tensor in masters if tensor.dim() == 1)
    return wanted <= found <= min(2 * wanted, wanted + ranks * _PADDING)


_PADDING = 4096  # elements, at most, that an engine adds to a flat buffer


def moves_parameters(optimizer: Optimizer, model: nn.Module) -> bool:
    """Return whether an optimizer moves a parameter of a model.

    Args:
        optimizer: Any of torch's.
        model: Wrapped or not.
    """
    own = {id(parameter) for parameter in model.parameters()}
    return any(id(tensor) in own for tensor in tensors_of(optimizer))


def tensors_of(optimizer: Optimizer) -> list[Tensor]:
    """Return the tensors that an optimizer moves.

    Args:
        optimizer: Any of torch's.
    """
    return [tensor for group in optimizer.param_groups for tensor in group["params"]]

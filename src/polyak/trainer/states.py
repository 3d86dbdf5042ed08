"""The weights of a model and the states of optimizers in a checkpoint, whatever ranks they are sharded over."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from polyak import sharding
from polyak.averaging.swap import swap_of
from polyak.errors import CheckpointError
from polyak.sharding import is_sharded
from polyak.tensors.slots import all_slots, slots, unwrap
from polyak.trainer.wrapping import laid_out


def model_entries(model: nn.Module) -> dict[str, Any]:
    """Return the entries ``model``, ``training_model`` and ``model_holds`` of a checkpoint.

    While an average is swapped in, ``model`` has the averaged weights and ``training_model`` the training weights.
    Otherwise ``model`` has the training weights and ``training_model`` is None. ``model_holds`` says which.

    Args:
        model: Wrapped or not; names are saved without the wrapper's prefix.
    """
    inner = unwrap(model)
    sharding.reshard(inner)
    entries: dict[str, Any] = {"model": inner.state_dict(), "training_model": None, "model_holds": "training weights"}
    if swap := swap_of(model):
        saved = swap.training()
        kept: dict[int, Tensor] = {id(s.tensor): saved[s.name] for s in slots(inner) if s.name in saved}
        training = inner.state_dict(keep_vars=True)
        entries["training_model"] = {name: kept.get(id(t), entries["model"][name]) for name, t in training.items()}
        entries["model_holds"] = f"averaged weights of {swap.owner}"
    return entries


def load_model(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load a model's weights, whether they and it are sharded or full.

    Args:
        model: Wrapped or not.
        weights: The saved weights.
    """
    inner = unwrap(model)
    sharding.reshard(inner)
    inner.load_state_dict(_fitted(weights, inner.state_dict(keep_vars=True)))


def optimizer_state(optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """Return an optimizer's state.

    Args:
        optimizer: The optimizer of the trainer.
        model: Wrapped or not, to name its parameters.

    Raises:
        CheckpointError: If it has a state for a parameter that was removed from it, which torch cannot save.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    removed = [key for key in optimizer.state if isinstance(key, Tensor) and id(key) not in held]
    if removed:
        names = {id(parameter): name for name, parameter in unwrap(model).named_parameters()}
        raise CheckpointError(
            f"an optimizer must have the parameters that it has states for (removed from {type(optimizer).__name__}: "
            f"{', '.join(names.get(id(one), 'a parameter without a name') for one in removed)}); to freeze "
            "parameters, set requires_grad to False and grad to None, and leave them in their optimizer"
        )
    return {**optimizer.state_dict(), _KIND: type(optimizer).__name__, _NAMES: _names(optimizer, model)}


# In the state of an optimizer in a checkpoint: its class, and the names of its parameters in order.
_KIND, _NAMES = "polyak_kind", "polyak_names"


def _names(optimizer: Optimizer, model: nn.Module) -> list[list[str]]:
    names = {id(slot.tensor): slot.name for slot in reversed(list(all_slots(model))) if slot.is_parameter}
    return [[names.get(id(parameter), "") for parameter in group["params"]] for group in optimizer.param_groups]


def check_optimizer(optimizer: Optimizer, state: Mapping[str, Any], model: nn.Module) -> None:
    """Check that a saved state is that of an optimizer with the same settings over the same parameters, in order.

    Args:
        optimizer: The optimizer that gets the state.
        state: As saved; one of an earlier version says less.
        model: Wrapped or not, to name its parameters.

    Raises:
        CheckpointError: If it is not.
    """
    saved, ours = state["param_groups"], optimizer.param_groups
    name, kind = type(optimizer).__name__, state.get(_KIND, "an optimizer")
    sizes = [[len(group["params"]) for group in groups] for groups in (saved, ours)]
    lacks = sorted({key for one, own in zip(saved, ours, strict=False) for key in own.keys() - one.keys()})
    found = ""
    if sizes[0] != sizes[1]:
        found = f"groups of {sizes[1]} parameters, and the checkpoint has {sizes[0]}"
    elif kind not in {name, "an optimizer"} and set(lacks) - {"initial_lr"}:
        found = f"{', '.join(lacks)}, and the checkpoint has the state of {kind}"
    elif _NAMES in state and state[_NAMES] != (own := _names(optimizer, model)):
        pairs = ((a, b) for one, other in zip(state[_NAMES], own, strict=True) for a, b in zip(one, other, strict=True))
        first = next((a, b) for a, b in pairs if a != b)
        found = f"{first[1]!r} where the checkpoint has {first[0]!r}"
    if found:
        raise CheckpointError(
            f"an optimizer must be the one whose state was saved, over the same parameters in the same order ({name} "
            f"has {found}); make it so, or leave the state out by load_ignore_keys=['optimizers']"
        )


def load_optimizer(optimizer: Optimizer, state: Mapping[str, Any], saved_dtypes: Mapping[int, torch.dtype]) -> None:
    """Load an optimizer's state, whether it and the parameters are sharded or full.

    Args:
        optimizer: Over as many parameters as the saved one.
        state: The saved state.
        saved_dtypes: The dtypes in which its parameters were saved, by ``id``.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    fitted = {
        index: _fitted(values, dict.fromkeys(values, parameters[index])) if index < len(parameters) else values
        for index, values in state["state"].items()
    }
    own = {name: value for name, value in state.items() if name not in {_KIND, _NAMES}}
    optimizer.load_state_dict({**own, "state": fitted})
    for index, values in fitted.items():
        if index < len(parameters) and parameters[index].dtype == saved_dtypes.get(id(parameters[index])):
            own = optimizer.state.get(parameters[index])
            if isinstance(own, dict):
                own.update({name: _as_saved(values.get(name), loaded) for name, loaded in own.items()})


def saved_dtypes(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[int, torch.dtype]:
    """Return the dtype in which each of a model's parameters was saved, by the parameter's ``id``.

    Args:
        model: Wrapped or not.
        weights: The saved weights.
    """
    named = unwrap(model).named_parameters(remove_duplicate=False)
    return {id(parameter): weights[name].dtype for name, parameter in named if name in weights}


def _as_saved(saved: Any, loaded: Any) -> Any:
    """Return what an optimizer loaded, with tensors in the dtypes in which they were saved.

    torch casts them to the dtype of the parameter. If the parameter has kept its dtype, that changes them: NAdam has a
    float32 number for a bfloat16 parameter, and would lose digits of it.
    """
    if isinstance(loaded, Tensor) and isinstance(saved, Tensor) and loaded.dtype != saved.dtype:
        return saved.to(loaded.device)
    if isinstance(loaded, (list, tuple)) and isinstance(saved, (list, tuple)) and len(loaded) == len(saved):
        return type(loaded)(_as_saved(a, b) for a, b in zip(saved, loaded, strict=True))
    if isinstance(loaded, dict) and isinstance(saved, Mapping):
        return {key: _as_saved(saved.get(key), value) for key, value in loaded.items()}
    return loaded


def _fitted(saved: Mapping[str, Any], ours: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what was saved, with its tensors sharded as ours of the same names and shapes are."""
    if not any(isinstance(value, Tensor) and is_sharded(value) for value in (*saved.values(), *ours.values())):
        return saved

    def fits(name: str, value: Any) -> bool:
        own = ours.get(name)
        return isinstance(value, Tensor) and isinstance(own, Tensor) and own.shape == value.shape

    return {name: laid_out(value, ours[name]) if fits(name, value) else value for name, value in saved.items()}

"""Makes the average a module, and copies it into other modules."""

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn

from polyak import sharding
from polyak.averaging.derived import forget_derived
from polyak.averaging.listing import Listing
from polyak.averaging.movement import Movement
from polyak.averaging.view import module_over
from polyak.errors import CopyError, ShardingError
from polyak.tensors.slots import all_slots, check_match, check_ties


def module_of(movement: Movement, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of a model's structure over other tensors, and over its own parameters for the rest.

    Args:
        movement: The model in training and its averages.
        tensors: By name, the tensors to compute with.

    Raises:
        ShardingError: If the tensors are sharded.
        CopyError: If the copy would still compute with the model's own tensors, or cannot be made.
    """
    model, listing = movement.model, movement.listing
    if movement.settings.mesh is not None or sharding.is_fsdp(model):
        raise ShardingError(
            "a module over these tensors needs full ones, and they are sharded over ranks; use applied(), which swaps "
            "the average into the model"
        )
    found = ((slot, listing.view(tensors, slot)) for slot in all_slots(model))
    return module_over(model, {id(slot.tensor): tensor for slot, tensor in found if tensor is not None})


def averaged_module(movement: Movement) -> nn.Module:
    """Return a copy of a model's structure over its averages, with buffers in their dtype.

    Args:
        movement: The model in training and its averages.

    Raises:
        ShardingError: As ``module_of``.
        CopyError: As ``module_of``.
    """
    module = module_of(movement, movement.expose())
    match_dtypes(module, movement.listing)
    return module


def own_tensors(module: nn.Module, model: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors of a module that are not parameters of a model, from which it was made.

    Args:
        module: Over other tensors than the model.
        model: The model.
    """
    shared = {id(tensor) for tensor in model.parameters()}
    yield from (one for one in (*module.parameters(), *module.buffers()) if id(one) not in shared)


def match_dtypes(module: nn.Module, listing: Listing, cast: Collection[str] = ()) -> None:
    """Widen buffers that have the model's dtype where the averages have a wider one.

    Frozen layers, which may be large, are not widened: calling them is an error.

    Args:
        module: Made over the averages.
        listing: The averages.
        cast: The names of parameters that are cast to another dtype before they are computed with.
    """
    changed = {slot.tensor.dtype: average.dtype for slot, average in listing.averaged}
    averaged = {slot.name for slot, _ in listing.averaged}
    averaged |= {name for name, (owner, _) in listing.views.items() if owner in averaged}
    for slot in list(all_slots(module)):
        dtype = slot.tensor.dtype
        if slot.name in averaged or slot.name in cast or changed.get(dtype, dtype) == dtype:
            continue
        if slot.is_parameter:
            slot.owner.register_forward_pre_hook(_refuse_mixed_call)
        elif torch.promote_types(dtype, changed[dtype]) == changed[dtype]:  # no bit is lost
            slot.owner._buffers[slot.attribute] = slot.tensor.to(changed[dtype])  # noqa: SLF001


def _refuse_mixed_call(module: nn.Module, inputs: object) -> None:
    del inputs
    tensor = next(module.parameters(recurse=False))
    if not torch.is_autocast_enabled(tensor.device.type):
        raise CopyError(
            f"ema_model must have one dtype to be called, and a frozen {type(module).__name__} of it has "
            f"{tensor.dtype}, the average another; evaluate the model in `with attached.applied():`, use "
            f"torch.autocast, or average in EMA(dtype={tensor.dtype})"
        )


@torch.no_grad()
def copy_into(target: nn.Module, movement: Movement, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors of a model into another one with the same names.

    Args:
        target: The module to be overwritten.
        movement: The model in training and its averages.
        tensors: By name, the tensors that replace the model's own.

    Raises:
        MismatchError: If names or shapes differ.
        ArgumentError: If it has one tensor where the model in training has two.
    """
    model, listing = movement.model, movement.listing
    sharding.reshard(model)
    sharding.reshard(target)
    source = {slot.name: slot.tensor.detach() for slot in all_slots(model)} | dict(tensors)
    for slot in all_slots(model):
        if slot.name in listing.views:
            view = listing.view(source, slot)
            source[slot.name] = slot.tensor if view is None else view
    filled = {slot.name: slot.tensor for slot in all_slots(target)}
    check_match("the model to fill must have the names and shapes of the one in training", source, filled)
    check_ties("tied tensors of the model to fill", target, source)
    for name, tensor in filled.items():
        sharding.copy_(tensor.detach(), source[name])
    forget_derived()

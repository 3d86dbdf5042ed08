"""The average of a model under FSDP2 as a module: with ``fully_shard`` of its own, over the shards of the averages."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from polyak.averaging.modules import match_dtypes
from polyak.averaging.movement import Movement
from polyak.averaging.view import module_over
from polyak.errors import ShardingError
from polyak.sharding import local
from polyak.sharding.fsdp import Unit, reshard_abandoned, units_of
from polyak.tensors.slots import all_slots


def sharded_module(movement: Movement) -> nn.Module:
    """Return a copy of a model's structure that computes with its averages, which a forward pass gathers.

    Its shards are the averages, not copies of them, and its frozen parameters are the model's. Nothing is communicated
    here. A forward pass, on all ranks together, gathers what the averages are at that moment, and keeps nothing of it.

    Args:
        movement: The model in training, under ``fully_shard``, and its averages.

    Raises:
        ShardingError: If ``fully_shard`` cannot be called in the same way for a copy, or over these averages.
        CopyError: If the copy would still compute with the model's own tensors, or cannot be made.
    """
    model, listing = movement.model, movement.listing
    units = units_of(model)
    movement.follow_model()
    averages = movement.expose()
    _check_devices(units, averages)
    managed = {id(one.tensor): one for unit in units for one in unit.parameters}
    movement.make_room({s.name: managed[id(s.tensor)].size for s in listing.slots if id(s.tensor) in managed})
    held = {id(slot.tensor): averages[slot.name] for slot in listing.slots}
    rest = ((slot, listing.view(averages, slot)) for slot in all_slots(model) if id(slot.tensor) not in held)
    held |= {id(slot.tensor): average for slot, average in rest if average is not None}
    stand_ins = {key: one.stand_in(held.get(key, one.tensor).dtype) for key, one in managed.items()}
    view = module_over(model, held | stand_ins)
    cast = {id(one.tensor) for unit in units for one in unit.parameters if unit.precision.param_dtype is not None}
    match_dtypes(view, listing, cast={slot.name for slot in all_slots(model) if id(slot.tensor) in cast})
    _wrap(model, view, units, held)
    return view


def _wrap(model: nn.Module, view: nn.Module, units: Sequence[Unit], held: Mapping[int, Tensor]) -> None:
    """Call ``fully_shard`` for a copy of a model, and let it compute with averages where there are any."""
    twins = {id(module): view.get_submodule(name) for name, module in model.named_modules()}
    mesh = next(unit.mesh for unit in units if unit.mesh is not None)
    for unit in units:
        for own, copied in zip(unit.parameters, unit.wrap(lambda module: twins[id(module)], mesh), strict=True):
            average = held.get(id(own.tensor))
            if average is None:  # a frozen one
                copied.hold(own.tensor, own.memory)
            else:
                copied.hold(average, local(average).as_strided((own.size,), (1,), 0))
    inner = {id(part) for unit in units for module in unit.modules for part in module.modules() if part is not module}
    # The graph of a compiled view must not depend on what a failed call has left.
    hook = torch.compiler.disable(_reshard)
    for module in {id(module): module for unit in units for module in unit.modules}.values():
        if id(module) not in inner:
            twins[id(module)].register_forward_pre_hook(hook, prepend=True)


def _reshard(module: nn.Module, inputs: object) -> None:
    del inputs
    reshard_abandoned(module)


def _check_devices(units: Sequence[Unit], averages: Mapping[str, Tensor]) -> None:
    for unit in units:
        there = "cpu" if unit.offloads or unit.mesh is None else unit.mesh.device_type
        for name, average in averages.items():
            if unit.mesh is not None and local(average).device.type != there:
                raise ShardingError(
                    f"ema.model needs averages on the device of the model's shards, {there} (got {name!r} on "
                    f"{local(average).device}): average without offload=, or use applied()"
                )

"""A sharded average as a module: with ``fully_shard`` of its own, over the shards of the averages."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from polyak.averaging.modules import match_dtypes
from polyak.averaging.movement import Movement
from polyak.averaging.view import module_over
from polyak.errors import ShardingError
from polyak.sharding import is_fsdp, is_sharded, local
from polyak.sharding.fsdp import Managed, Unit, reshard_abandoned, units_of
from polyak.tensors.slots import all_slots


def sharded_module(movement: Movement) -> nn.Module:
    """Return a copy of a model's structure that computes with its averages, which a forward pass gathers.

    Its shards are the averages, not copies of them, and its frozen parameters are the model's. Nothing is communicated
    here. A forward pass, on all ranks together, gathers what the averages are at that moment, and keeps nothing of it.

    Args:
        movement: The averages, and the model in training: under ``fully_shard``, which is called in the same way for
            the copy, or full on each rank, while the averages are sharded. These are gathered all together.

    Raises:
        ShardingError: If ``fully_shard`` cannot be called in the same way for a copy, or over these averages.
        CopyError: If the copy would still compute with the model's own tensors, or cannot be made.
    """
    model, listing = movement.model, movement.listing
    units = units_of(model) if is_fsdp(model) else []
    movement.follow_model()
    averages = movement.expose()
    units = units or [_over_full_model(movement, averages)]
    _check_devices(units, averages)
    held = _held(movement, averages)
    managed = [one for unit in units for one in unit.parameters]
    stand_ins = {id(one.tensor): one.stand_in(held.get(id(one.tensor), one.tensor).dtype) for one in managed}
    view = module_over(model, held | stand_ins)
    cast = {id(one.tensor) for unit in units for one in unit.parameters if unit.precision.param_dtype is not None}
    match_dtypes(view, listing, cast={slot.name for slot in all_slots(model) if id(slot.tensor) in cast})
    copied = _wrap(model, view, units)
    sizes = {id(own.tensor): one.size for own, one in zip(managed, copied, strict=True)}
    movement.make_room({s.name: sizes[id(s.tensor)] for s in listing.slots if id(s.tensor) in sizes})
    for own, one in zip(managed, copied, strict=True):
        average = held.get(id(own.tensor))
        if average is None:  # a frozen one
            one.hold(own.tensor, own.memory)
        else:
            one.hold(average, local(average).as_strided((one.size,), (1,), 0))
    return view


def _over_full_model(movement: Movement, averages: Mapping[str, Tensor]) -> Unit:
    """Return one call of ``fully_shard`` for averages that are sharded, of a model that each rank has in full."""
    from torch.distributed.fsdp import MixedPrecisionPolicy  # noqa: PLC0415
    from torch.distributed.tensor import Shard  # noqa: PLC0415

    parameters = (slot for slot in movement.listing.slots if is_sharded(averages[slot.name]))
    managed = tuple(Managed(slot.tensor, slot.owner, slot.attribute, Shard(0)) for slot in parameters)
    return Unit((movement.model,), movement.settings.mesh, MixedPrecisionPolicy(), False, managed)


def _held(movement: Movement, averages: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """Return by ``id`` of a tensor of the model its average, or the view of one whose memory it shares."""
    listing = movement.listing
    held = {id(slot.tensor): averages[slot.name] for slot in listing.slots}
    for slot in all_slots(movement.model):
        if id(slot.tensor) in held:
            continue
        owner = listing.views[slot.name][0] if slot.name in listing.views else slot.name
        if owner != slot.name and owner in averages and is_sharded(averages[owner]):
            raise ShardingError(
                f"ema.model needs parameters with memory of their own where averages are sharded (got {slot.name!r} in "
                f"that of {owner!r}); tie them as one parameter, or use applied()"
            )
        if (average := listing.view(averages, slot)) is not None:
            held[id(slot.tensor)] = average
    return held


def _wrap(model: nn.Module, view: nn.Module, units: Sequence[Unit]) -> list[Managed]:
    """Call ``fully_shard`` for a copy of a model; return its parameters, in the order of those of the units."""
    twins = {id(module): view.get_submodule(name) for name, module in model.named_modules()}
    mesh = next(unit.mesh for unit in units if unit.mesh is not None)
    copied = [one for unit in units for one in unit.wrap(lambda module: twins[id(module)], mesh)]
    inner = {id(part) for unit in units for module in unit.modules for part in module.modules() if part is not module}
    # The graph of a compiled view must not depend on what a failed call has left.
    hook = torch.compiler.disable(_reshard)
    for module in {id(module): module for unit in units for module in unit.modules}.values():
        if id(module) not in inner:
            twins[id(module)].register_forward_pre_hook(hook, prepend=True)
    return copied


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

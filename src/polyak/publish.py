"""Gives averaged weights to another program, such as an inference engine, one full tensor at a time."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from polyak.averaging.ema import EMA
from polyak.averaging.habits import kind_of
from polyak.errors import ArgumentError
from polyak.export import agree_on_values, swapped_in
from polyak.sharding import (
    Communicator,
    Ranks,
    communicator_of,
    is_sharded,
    local,
    pipeline_communicator_of,
    sharded_like,
    unwrapped,
)
from polyak.tensors.slots import all_slots, places_of

Load = Callable[[str, Tensor], object]


def publish_averaged(ema: EMA, model: nn.Module, load: Load, *, every_rank: bool) -> None:
    """Call a function with each tensor of the model's state dict, with the average in it. All ranks must call this.

    Args:
        ema: The EMA whose average it is; it has begun.
        model: The one in training, as it was given to the loop.
        load: Called with a name and a full tensor.
        every_rank: Whether to call it on every rank, not on rank 0 alone.

    Raises:
        ArgumentError: If ``load`` cannot be called.
        LoanError: If the model holds another average, or ``load`` has changed a parameter.
        ShardingError: If ranks disagree, or ``load`` failed on another rank.
    """
    stage = communicator_of(model)
    ranks = pipeline_communicator_of(model, stage) or stage
    ranks.on_every_rank("publishing", lambda: check_loader(load))
    with swapped_in(ema, model):
        agree_on_values(model, ranks, stage)
        stream(model, ranks, load, every_rank=every_rank, gathered=_gathered)


def check_loader(load: object) -> None:
    """Check that something can be called.

    Args:
        load: As given.

    Raises:
        ArgumentError: If it cannot.
    """
    if not callable(load):
        raise ArgumentError(
            f"publish needs a function of a name and a tensor (got {kind_of(load)}); such as "
            "ema.publish(lambda name, tensor: engine.load_weights([(name, tensor)]))"
        )


def stream(
    model: nn.Module,
    ranks: Communicator,
    load: Load,
    *,
    every_rank: bool,
    gathered: Callable[[Tensor], AbstractContextManager[Tensor]],
) -> None:
    """Gather the tensors of a state dict one at a time, and call a function with each. All ranks must call this.

    Ranks may have other tensors: stages of a pipeline, whole experts, submodules on some of the ranks. What not every
    rank has is sent to all, by the lowest rank that has it.

    Args:
        model: The model with the average in it.
        ranks: The ranks that train it, with all stages.
        load: Called with a name of the full model and a full tensor, which is valid until it returns.
        every_rank: Whether to call it on every rank, not on rank 0 alone.
        gathered: Returns a context of the full tensor of one of the model's.

    Raises:
        ShardingError: If ``load`` failed on another rank.
    """
    own = {slot.name: unwrapped(slot.tensor) for slot in all_slots(model) if slot.persistent}
    places = places_of(model)
    held = {name: tensor for name, tensor in places.as_full(own).items() if _has_part(tensor)}
    kinds = ranks.union({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in held.items()})
    senders = dict(zip(kinds, ranks.senders([name in held for name in kinds]), strict=True))
    if every_rank:  # buffers that are not averaged may differ by rank: those of rank 0 count
        buffers = places.as_full({slot.name: slot.tensor for slot in all_slots(model) if not slot.is_parameter})
        senders |= {
            name: 0 for name in buffers if name in held and senders[name] is None and not is_sharded(held[name])
        }
    for name, (dtype, shape) in kinds.items():
        with gathered(held[name]) if name in held else _nothing(dtype, shape, ranks) as full:
            sent = _received(full.detach(), senders[name], ranks)

            def act(name: str = name, sent: Tensor = sent) -> object:
                return load(name, sent) if every_rank or ranks.rank == 0 else None

            # If it fails on one rank, the others must not wait for the next tensor.
            ranks.on_every_rank(f"publishing {name!r}", act)


def _received(full: Tensor, sender: int | None, ranks: Communicator) -> Tensor:
    """Return a tensor as it is on the rank that sends it, if one does."""
    if sender is None:
        return full
    received = full if ranks.rank == sender else full.clone()  # not into a tensor of the model
    ranks.broadcast([received], source=sender)
    return received


def _nothing(dtype: torch.dtype, shape: tuple[int, ...], ranks: Communicator) -> AbstractContextManager[Tensor]:
    """Return a context of memory for a tensor of which this rank has no part."""
    return nullcontext(torch.empty(shape, dtype=dtype, device=ranks.device if isinstance(ranks, Ranks) else None))


def _gathered(tensor: Tensor) -> AbstractContextManager[Tensor]:
    if not is_sharded(tensor):
        return nullcontext(tensor)
    # Messages go between the mesh's devices; the shard may be kept on another.
    there = sharded_like(tensor, local(tensor.detach()).to(tensor.device_mesh.device_type))
    assert is_sharded(there)
    return nullcontext(there.full_tensor())


def _has_part(tensor: Tensor) -> bool:
    return not is_sharded(tensor) or tensor.device_mesh.get_coordinate() is not None

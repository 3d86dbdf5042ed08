"""Averaged weights for another program, such as an inference engine: one full tensor at a time."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn

from polyak.averaging.agreement import agree_on_plain
from polyak.averaging.ema import EMA
from polyak.averaging.habits import kind_of
from polyak.errors import ArgumentError, ShardingError
from polyak.export import swapped_in
from polyak.sharding import (
    Communicator,
    Ranks,
    communicator_of,
    has_experts,
    is_initialized,
    is_sharded,
    local,
    pipeline_of,
    sharded_like,
    unwrapped,
)
from polyak.tensors.slots import all_slots

Load = Callable[[str, Tensor], object]


def publish_averaged(ema: EMA, model: nn.Module, load: Load, *, every_rank: bool) -> None:
    """Call a function with each tensor of the model's state dict, with the average in it. All ranks must call this.

    Args:
        ema: Whose average it is; it has begun.
        model: The one in training, as it was given to the loop.
        load: Called with a name and a full tensor.
        every_rank: Whether to call it on every rank, not on rank 0 alone.

    Raises:
        ArgumentError: If ``load`` cannot be called.
        LoanError: If the model holds another average, or ``load`` has changed a parameter.
        ShardingError: If ranks disagree, ``load`` failed on another rank, the model is a stage of a pipeline, or it has
            declared experts.
    """
    ranks = communicator_of(model)
    _refuse_parts(model)
    ranks.on_every_rank("publishing", lambda: check_loader(load))
    with swapped_in(ema, model):
        if isinstance(ranks, Ranks):
            agree_on_plain(ranks, {slot.name: slot.tensor for slot in all_slots(model) if slot.is_parameter})
        stream(model, ranks, load, every_rank=every_rank, gathered=_gathered)


def _refuse_parts(model: nn.Module) -> None:
    """Refuse a model of which ranks have other tensors. Nothing is communicated: all of them refuse."""
    stage = is_initialized() and bool(pipeline_of(model))
    if stage or has_experts(model):
        raise ShardingError(
            "every rank must have all names of the model for them to be published (this is "
            f"{'a stage of a pipeline' if stage else 'a model with declared experts'}); write the average by "
            "ema.save(path), and load that"
        )


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

    Args:
        model: With the average in it.
        ranks: That train it.
        load: Called with a name and a full tensor, which is valid until it returns.
        every_rank: Whether to call it on every rank, not on rank 0 alone.
        gathered: Returns a context of the full tensor of one of the model's.

    Raises:
        ShardingError: If ``load`` failed on another rank, or some ranks have no part of a tensor.
    """
    tensors: Mapping[str, Tensor] = {slot.name: unwrapped(slot.tensor) for slot in all_slots(model) if slot.persistent}
    buffers = {slot.name for slot in all_slots(model) if not slot.is_parameter}
    ranks.on_every_rank("publishing", lambda: _check_meshes(tensors))
    for name, tensor in tensors.items():
        with gathered(tensor) as full:
            sent = full.detach()
            if every_rank and name in buffers and not is_sharded(tensor):
                sent = sent.clone()
                ranks.broadcast([sent])  # buffers that are not averaged may differ by rank: those of rank 0 count

            def act(name: str = name, sent: Tensor = sent) -> object:
                return load(name, sent) if every_rank or ranks.rank == 0 else None

            # If it fails on one rank, the others must not wait for the next tensor.
            ranks.on_every_rank(f"publishing {name!r}", act)


def _gathered(tensor: Tensor) -> AbstractContextManager[Tensor]:
    if not is_sharded(tensor):
        return nullcontext(tensor)
    # Messages go between the mesh's devices; the shard may be kept on another.
    there = sharded_like(tensor, local(tensor.detach()).to(tensor.device_mesh.device_type))
    assert is_sharded(there)
    return nullcontext(there.full_tensor())


def _check_meshes(tensors: Mapping[str, Tensor]) -> None:
    missing = [n for n, t in tensors.items() if is_sharded(t) and t.device_mesh.get_coordinate() is None]
    if missing:
        raise ShardingError(
            f"every rank must be in the mesh of each tensor for it to be published (this one is not in that of "
            f"{', '.join(missing[:5])}); write the average by ema.save(path), and load that"
        )

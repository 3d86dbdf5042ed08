"""The weights of Megatron's ranks for another program: one tensor of the full model at a time."""

import torch
from torch import Tensor

from polyak.engines.megatron_masters import MegatronMasters
from polyak.publish import Load
from polyak.sharding import Communicator, Ranks
from polyak.tensors.slots import all_slots


def stream(masters: MegatronMasters, ranks: Communicator, load: Load, *, every_rank: bool) -> None:
    """Put the tensors of the full model together, one at a time, and call a function with each. All ranks must call it.

    Args:
        masters: Of the model, whose weights follow them.
        ranks: That train it.
        load: Called with a name of the full model and a full tensor, which is valid until it returns.
        every_rank: Whether to call it on every rank, not on rank 0 alone.

    Raises:
        ShardingError: If ``load`` failed on another rank.
    """
    own = {slot.name: slot.tensor.detach() for slot in all_slots(masters.model) if slot.name in masters.layout}
    kinds = ranks.union({name: (tensor.dtype, masters.layout[name].shape) for name, tensor in own.items()})
    for name, (dtype, shape) in kinds.items():
        full = torch.zeros(shape, dtype=dtype, device=ranks.device if isinstance(ranks, Ranks) else None)
        if name in own:
            _put_blocks(masters, name, own[name], full)
        if isinstance(ranks, Ranks):
            # Each element is on one rank, and zero on the others. A sum of bytes is right for any dtype, and for -0.0.
            full = ranks.total(full.view(-1).view(torch.uint8)).view(dtype).view(shape)

        def act(name: str = name, full: Tensor = full) -> object:
            return load(name, full) if every_rank or ranks.rank == 0 else None

        # If it fails on one rank, the others must not wait for the next tensor.
        ranks.on_every_rank(f"publishing {name!r}", act)


def _put_blocks(masters: MegatronMasters, name: str, tensor: Tensor, full: Tensor) -> None:
    """Copy a tensor of this rank to its places in the full one, unless it is a replica of another rank's."""
    place = masters.layout[name]
    if not any(place.replica):
        for box, block in place.fragment(tensor, 0, written=True).blocks():
            full[tuple(slice(at, at + size) for at, size in zip(box.offsets, box.sizes, strict=True))] = block

"""How far weights are from their average."""

import math

import torch

from polyak.averaging.movement import Movement
from polyak.averaging.swapper import Swapper
from polyak.sharding import OneProcess, Ranks, local, reshard, rows
from polyak.tensors.slots import places_of

_CHUNK = 1 << 22  # elements that are compared together, so that the differences take little memory


@torch.no_grad()
def relative_distance(movement: Movement, swapper: Swapper, ranks: Ranks | None, pipeline: Ranks | None) -> float:
    """Return the norm of weights minus average over that of the average, both over all averaged parameters.

    Args:
        movement: The averages and their model.
        swapper: Knows where the averages and the weights are.
        ranks: The ranks that train the model, or this stage of it, together, if there are several. All must call this.
        pipeline: The ranks of all stages, if the model is a stage.

    Raises:
        LoanError: If the model holds another average.
        ShardingError: If it does on another rank.
    """
    together = pipeline or ranks
    (together or OneProcess()).on_every_rank("the distance from the average", swapper.refuse_other)
    reshard(movement.model)
    places, averages, online = places_of(movement.model), swapper.averaged(), swapper.training()
    sums = torch.zeros(2, dtype=torch.float64, device="cpu")
    for name in (slot.name for slot, _ in movement.listing.averaged if slot.is_parameter):
        own = averages[name]
        share = 1.0 if ranks is None else ranks.share(own, name) * places.shards(name, own)
        shards = local(own), rows(online[name], own)
        for average, weights in zip(*(shard.reshape(-1).split(_CHUNK) for shard in shards), strict=True):
            wide = average.to(torch.promote_types(average.dtype, torch.float32))
            norms = torch.stack([(weights.to(wide) - wide).norm(), wide.norm()])
            sums = sums.to(norms.device) + share * norms.double().square()
    difference, length = (together.total(sums) if together else sums).sqrt().tolist()
    if length == 0:
        return 0.0 if difference == 0 else math.inf
    return difference / length

"""How far weights are from their average."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from polyak.sharding import Places, Ranks, local, rows

_CHUNK = 1 << 22  # elements that are compared together, so that the differences take little memory


@torch.no_grad()
def relative_distance(  # noqa: PLR0917  the tensors of both, and who holds them
    names: Iterable[str],
    averages: Mapping[str, Tensor],
    online: Mapping[str, Tensor],
    places: Places,
    ranks: Ranks | None,
    pipeline: Ranks | None = None,
) -> float:
    """Return the norm of weights minus average over that of the average, both over all named tensors.

    Args:
        names: The names of the tensors to compare.
        averages: The averages by name.
        online: The weights by name.
        places: Of the tensors in the full model.
        ranks: The ranks that train the model, or this stage of it, together, if there are several. All must call this.
        pipeline: The ranks of all stages, if the model is a stage.
    """
    sums = torch.zeros(2, dtype=torch.float64, device="cpu")
    for name in names:
        shards = local(averages[name]), rows(online[name], averages[name])
        own = averages[name]
        share = 1.0 if ranks is None else ranks.share(own, name) * places.shards(name, own)
        for average, weights in zip(*(shard.reshape(-1).split(_CHUNK) for shard in shards), strict=True):
            wide = average.to(torch.promote_types(average.dtype, torch.float32))
            norms = torch.stack([(weights.to(wide) - wide).norm(), wide.norm()])
            sums = sums.to(norms.device) + share * norms.double().square()
    together = pipeline or ranks
    difference, length = (together.total(sums) if together else sums).sqrt().tolist()
    if length == 0:
        return 0.0 if difference == 0 else math.inf
    return difference / length

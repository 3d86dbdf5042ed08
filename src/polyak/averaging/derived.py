"""Clears what torch has computed from weights and cached, which is out of date after weights change in place."""

import torch
from torch.nn.utils import parametrize


def forget_derived() -> None:
    """Drop autocast's casts of weights, and what ``parametrize.cached`` has computed from them.

    Torch keeps both until the end of their block, even if the weights change. Inside one block of autocast, a model
    that holds the average would otherwise compute with the training weights that were cast before.
    """
    torch.clear_autocast_cache()
    parametrize._cache.clear()  # noqa: SLF001  torch clears it only at the end of the block

"""What torch has derived from weights and keeps: out of date wherever the values of parameters change in place."""

import torch
from torch.nn.utils import parametrize


def forget_derived() -> None:
    """Drop autocast's casts of weights, and what ``parametrize.cached`` has computed from them.

    Both are kept until the end of their block, whatever happens to the weights meanwhile: in one block of autocast, the
    model with the average in it would compute with the training weights that were cast before.
    """
    torch.clear_autocast_cache()
    parametrize._cache.clear()  # noqa: SLF001  torch clears it only at the end of the block

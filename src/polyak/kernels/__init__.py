"""The arithmetic on tensors: ``Lerp`` moves averages towards weights, ``Exchange`` swaps two sets of tensors.

Nothing else in polyak computes on weights, so that a faster implementation has one place to go. All give the same bits.
Which one serves is settled in ``choice.py``, once.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from polyak.kernels import foreach, look
from polyak.kernels.checksum import checksums
from polyak.kernels.choice import CHOSEN, EXCHANGES, KERNELS, Exchange, Lerp
from polyak.kernels.foreach import SCRATCH_ELEMENTS
from polyak.kernels.place import Place
from polyak.kernels.versions import counting_with

__all__ = [
    "EXCHANGES",
    "KERNELS",
    "SCRATCH_ELEMENTS",
    "Exchange",
    "Lerp",
    "Place",
    "checksums",
    "counting_with",
    "lerp_",
    "unchanged",
]


def lerp_(
    averages: Sequence[Tensor], online: Sequence[Tensor], weight: float, places: Sequence[Place], num_updates: int = 0
) -> Tensor:
    """Do once what ``Lerp`` does, and return how many tensors were not all finite, as a 0-dim tensor.

    Args:
        averages: Tensors to move.
        online: Tensors to move them towards, of the same shapes and on the same devices.
        weight: Share of ``online`` taken, from 0 to 1.
        places: For each tensor what its rounding depends on; used for 16-bit averages only.
        num_updates: How often this was done. It is part of the seed.
    """
    return foreach.lerp_(averages, online, weight, places, num_updates, by=Lerp)


def unchanged(dicts: Sequence[dict[str, Any]], tensors: Sequence[Tensor]) -> look.Look:
    """Note what dicts hold and where tensors are, and return what tells whether all is as it was.

    It is not if a dict holds other objects, or under other keys, or in another order, nor if a tensor is elsewhere or
    of another dtype or layout.

    Args:
        dicts: Those of modules.
        tensors: Of any kind, in the dicts or not.
    """
    return (_LOOKS_IN_C and look.unchanged_in_c(dicts, tensors)) or look.unchanged_in_python(dicts, tensors)


_LOOKS_IN_C = look.HAS_C and CHOSEN == "c"

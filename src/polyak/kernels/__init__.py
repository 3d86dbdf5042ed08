"""The arithmetic on tensors: ``lerp`` moves averages towards weights, ``swap`` swaps two lists of tensors.

Nothing else in polyak computes on weights. ``registry.py`` lists the kernels; all of them give the same bits.
"""

from polyak.kernels.exchange import checksums
from polyak.kernels.pairs import Pair, Place, counted
from polyak.kernels.pieces import SCRATCH_ELEMENTS
from polyak.kernels.registry import Exchange, Kernel, Update, lerp, lerp_, only, reasons, serving_cpu, swap

__all__ = [
    "SCRATCH_ELEMENTS",
    "Exchange",
    "Kernel",
    "Pair",
    "Place",
    "Update",
    "checksums",
    "counted",
    "lerp",
    "lerp_",
    "only",
    "reasons",
    "serving_cpu",
    "swap",
]

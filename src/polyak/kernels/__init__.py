"""The arithmetic on tensors: ``lerp_`` moves averages towards weights, ``Exchange`` swaps two sets of tensors.

Nothing else in polyak computes on weights, so that a faster implementation has one place to go.
"""

from polyak.kernels.foreach import SCRATCH_ELEMENTS, Exchange, lerp_

__all__ = ["SCRATCH_ELEMENTS", "Exchange", "lerp_"]

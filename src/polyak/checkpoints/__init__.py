"""Checkpoints of any library: opened without running code that they may hold, read one tensor at a time, averaged.

``opening.open_checkpoint`` recognises what a path is. Each format has a file with the same three members: ``FORMAT``,
``accepts`` and ``read``. ``weights`` finds where the weights are in what was read, and ``moments`` when it was saved.
"""

from polyak.checkpoints.averaging import Plan, average
from polyak.checkpoints.opening import Checkpoint, open_checkpoint
from polyak.checkpoints.profiles import weights_at

__all__ = ["Checkpoint", "Plan", "average", "open_checkpoint", "weights_at"]

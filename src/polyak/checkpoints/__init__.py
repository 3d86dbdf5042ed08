"""Checkpoints of any library: opened without running code that they may hold, read one tensor at a time, averaged.

``average_checkpoints`` does all of it. ``opening.open_checkpoint`` recognises what a path is. Each format has a file
with the same three members: ``FORMAT``, ``accepts`` and ``read``. ``weights`` finds where the weights are in what was
read, ``moments`` when it was saved, and ``choosing`` how much each checkpoint counts.
"""

from polyak.checkpoints.averaging import Plan
from polyak.checkpoints.choosing import average_checkpoints, choose
from polyak.checkpoints.opening import Checkpoint, open_checkpoint
from polyak.checkpoints.profiles import weights_at

__all__ = ["Checkpoint", "Plan", "average_checkpoints", "choose", "open_checkpoint", "weights_at"]

"""Checkpoints of any library: opened without running code that they may hold, read one tensor at a time, averaged.

``average_checkpoints`` does all of it, ``greedy_soup`` chooses by an evaluation, ``summarize`` says what is in a
checkpoint, and ``distances`` how far two are from each other. ``opening.open_checkpoint`` recognises the format of a
path. Each format has a module with the same three members: ``FORMAT``, ``accepts`` and ``read``. ``weights`` finds
where the weights are in what was read, ``moments`` when it was saved, and ``choosing`` how much each checkpoint counts.
"""

from polyak.checkpoints.averaging import Plan
from polyak.checkpoints.choosing import average_checkpoints, choose
from polyak.checkpoints.distance import Distance, distances
from polyak.checkpoints.opening import Checkpoint, open_checkpoint
from polyak.checkpoints.profiles import weights_at
from polyak.checkpoints.provenance import provenance_of
from polyak.checkpoints.soup import Soup, greedy_soup
from polyak.checkpoints.summary import Summary, summarize

__all__ = [
    "Checkpoint",
    "Distance",
    "Plan",
    "Soup",
    "Summary",
    "average_checkpoints",
    "choose",
    "distances",
    "greedy_soup",
    "open_checkpoint",
    "provenance_of",
    "summarize",
    "weights_at",
]

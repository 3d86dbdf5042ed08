"""Finds a checkpoint that is a copy of another, as ``last.pt`` and ``best.pt`` often are: it would count twice."""

import hashlib
from collections.abc import Sequence

from polyak.checkpoints.opening import Checkpoint
from polyak.storage.safetensors import raw_bytes

_PIECE = 1 << 18  # elements that are read in one call


def copies_in(opened: Sequence[Checkpoint]) -> tuple[Checkpoint, Checkpoint] | None:
    """Return two checkpoints with the same weights, if they do not say that they are of other moments.

    The smallest tensors are compared first, so that little is read where there is no copy.

    Args:
        opened: The checkpoints of one folder.

    Raises:
        CheckpointError: If one is damaged.
    """
    by_names = dict[frozenset[str], list[Checkpoint]]()
    for one in opened:
        if any(one is not other and not _are_of_other_moments(one, other) for other in opened):
            by_names.setdefault(frozenset(one.tensors), []).append(one)
    for group in by_names.values():
        for same in _same(group):
            for i, one in enumerate(same):
                for other in same[i + 1 :]:
                    if not _are_of_other_moments(one, other):
                        return one, other
    return None


def _are_of_other_moments(one: Checkpoint, other: Checkpoint) -> bool:
    return any(one.moment[unit] != other.moment[unit] for unit in one.moment.keys() & other.moment.keys())


def _same(checkpoints: list[Checkpoint]) -> list[list[Checkpoint]]:
    """Return those checkpoints, of some with tensors of the same names, that have the same bytes in all of them."""
    tensors, groups = checkpoints[0].tensors, [checkpoints]
    for name in sorted(tensors, key=lambda name: tensors[name].numel):
        parts = [part for group in groups if len(group) > 1 for part in _split(group, name)]
        groups = [part for part in parts if len(part) > 1]
    return [group for group in groups if len(group) > 1]


def _split(group: Sequence[Checkpoint], name: str) -> list[list[Checkpoint]]:
    found = dict[bytes, list[Checkpoint]]()
    for one in group:
        found.setdefault(_hash(one, name), []).append(one)
    return [*found.values()]


def _hash(checkpoint: Checkpoint, name: str) -> bytes:
    stored = checkpoint.tensors[name]
    step = max(stored.grain, _PIECE // stored.grain * stored.grain)
    found = hashlib.blake2b(f"{stored.dtype} {stored.shape}".encode())
    for first in range(0, stored.numel, step):
        piece = stored.read(first, min(first + step, stored.numel)).contiguous()  # kept while its bytes are hashed
        found.update(raw_bytes(piece))
    checkpoint.files.release()
    return found.digest()

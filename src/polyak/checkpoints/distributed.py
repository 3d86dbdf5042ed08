"""Folders of ``torch.distributed.checkpoint`` (``.metadata`` and ``.distcp``), saved by any number of ranks.

FSDP, torchtitan, Composer, Accelerate and Lightning write such folders. Lightning keeps the rest in ``meta.pt``.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyak.checkpoints.sharded import Sharded, sizes_of
from polyak.checkpoints.stored import Files, Found, Saved, StoredTensor
from polyak.checkpoints.weights import EXTRA_STATE
from polyak.compat.files import load
from polyak.compat.folders import Box, Distributed, metadata_shape, with_rest
from polyak.compat.pickles import StandIn
from polyak.compat.tensors import Unread
from polyak.compat.words import shown
from polyak.errors import CheckpointError

FORMAT = "distributed checkpoint"
_METADATA = ".metadata"
_LIGHTNING = "meta.pt"


def accepts(path: Path) -> bool:
    """Return whether it is a folder with the metadata of ``torch.distributed.checkpoint``.

    Args:
        path: The path of a checkpoint.
    """
    return (path / _METADATA).is_file()


def read(path: Path, files: Files) -> Found:
    """Read what is in the folder, but no tensor.

    Args:
        path: The path of the folder.
        files: Opens its files.

    Raises:
        CheckpointError: If it is damaged.
    """
    try:
        saved = Distributed(path, files.open)

        def stored(name: str, item: Mapping[str, Any]) -> StoredTensor | Unread:
            return _stored(saved, files, name, item)

        content = _with_separate_optimizer(with_rest(path, saved.load(stored)))
    except CheckpointError as error:
        raise CheckpointError(f"{shown(path)} cannot be read: {error}") from None
    counters = path / _LIGHTNING
    clock = load(counters) if counters.exists() else {}
    return Found(content, clock=clock, blobs=saved.blobs(lambda name: EXTRA_STATE in name))


def _with_separate_optimizer(content: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return the content with the optimizer's tensors in their own mapping; Megatron has all names in one."""
    names = [name for name in content if isinstance(name, str) and name.startswith(("optimizer.", "chained_"))]
    found = {name: value for name, value in content.items() if name not in names}
    if names:
        found["optimizer"] = {**content.get("optimizer", {}), **{name: content[name] for name in names}}
    return found


def _stored(saved: Distributed, files: Files, name: str, item: Mapping[str, Any]) -> StoredTensor | Unread:
    shape = metadata_shape(item.get("size"))
    properties = item.get("properties")
    state = properties.state if isinstance(properties, StandIn) else None
    dtype = state[0] if isinstance(state, tuple) and state else None
    if not isinstance(dtype, torch.dtype):
        return Unread("a tensor whose dtype the metadata do not have")

    @cache
    def shards() -> Sharded:
        found = saved.shards(name, shape, files.unchecked)
        if isinstance(found, Unread):
            raise CheckpointError(f"all weights must be plain tensors ({shown(name)} is {found.kind})")
        if found[0][1].dtype != dtype:
            raise CheckpointError(f"its metadata must have the dtype of {shown(name)}")
        return Sharded.of(found, files.check)

    def part(box: Box, where: Saved | None = None, across: int = 1) -> StoredTensor:
        def read(first: int, last: int) -> Tensor:
            return shards().read(box, first, last)

        def take(inner: Box) -> StoredTensor:
            return part(tuple((at + begin, at + end) for (at, _), (begin, end) in zip(box, inner, strict=True)))

        return StoredTensor(dtype, sizes_of(box), 1, read, where, across, take)

    boxes = tuple(saved.boxes(name, item, shape))
    across = sum(box[0][0] == 0 < box[0][1] for box, _ in boxes if box)
    return part(tuple((0, n) for n in shape), Saved(name, saved.keys(name), boxes), max(1, across))

"""What is done with a batch of whatever shape: moved, counted, cut into microbatches."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def to_device(batch: Any, device: torch.device) -> Any:
    """Return the batch with its tensors on ``device``.

    Args:
        batch: Tensors in tuples, lists and mappings, or an object with a ``to`` of its own.
        device: Where to.
    """
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        moved = [to_device(value, device) for value in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    return batch.to(device, non_blocking=True) if hasattr(batch, "to") else batch


def num_samples(batch: Any) -> int:
    """Return the size of the first dimension of the first tensor in the batch.

    Args:
        batch: Tensors in tuples, lists and mappings.

    Raises:
        ValueError: If there is no such tensor.
    """
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else 1
    parts = list(batch.values()) if isinstance(batch, Mapping) else batch
    if isinstance(parts, Sequence) and len(parts) and not isinstance(parts, str):
        return num_samples(parts[0])
    raise ValueError(
        f"a batch must be tensors in tuples, lists or mappings for its samples to be counted (got a "
        f"{type(batch).__name__}); give Trainer num_samples=, a function of the batch"
    )


def split(batch: Any, parts: int) -> list[Any]:
    """Cut a batch into at most ``parts`` microbatches of nearly equal size.

    Args:
        batch: Tensors with one first dimension, in tuples, lists and mappings.
        parts: At least 1.
    """
    if parts == 1:
        return [batch]
    if isinstance(batch, Tensor):
        return list(batch.tensor_split(min(parts, batch.shape[0])))
    if isinstance(batch, Mapping):
        columns = [split(value, parts) for value in batch.values()]
        return [dict(zip(batch.keys(), row, strict=True)) for row in zip(*columns, strict=True)]
    if isinstance(batch, (tuple, list)):
        return [list(row) for row in zip(*(split(value, parts) for value in batch), strict=True)]
    raise ValueError(f"grad_accum needs batches of tensors in tuples, lists or mappings (got a {type(batch).__name__})")

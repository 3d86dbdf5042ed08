"""Functions of a batch of any structure: move it to a device, count its samples, split it into microbatches."""

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor


def to_device(batch: Any, device: torch.device) -> Any:
    """Return the batch with its tensors on ``device``.

    Args:
        batch: Tensors in tuples, lists and mappings, or an object with a method ``to``.
        device: The device to move them to.
    """
    if isinstance(batch, Mapping):
        moved = {key: to_device(value, device) for key, value in batch.items()}
        if type(batch) is dict or not isinstance(batch, MutableMapping):
            return moved
        kept = copy.copy(batch)  # keeps the class, which may also have the values as attributes
        kept.update(moved)
        return kept
    if isinstance(batch, (tuple, list)):
        values = [to_device(value, device) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch.to(device, non_blocking=True) if hasattr(batch, "to") else batch


def num_samples(batch: Any) -> int:
    """Return the size of the first dimension of the first tensor in the batch that has one; 1 if none has.

    Args:
        batch: Tensors in tuples, lists and mappings.

    Raises:
        ValueError: If there is no such tensor.
    """
    tensors = list(_tensors_in(batch))
    if tensors:
        return next((tensor.shape[0] for tensor in tensors if tensor.dim()), 1)
    raise ValueError(
        f"a batch must be tensors in tuples, lists or mappings for its samples to be counted (got a "
        f"{type(batch).__name__}); give Trainer num_samples=, a function of the batch"
    )


def _tensors_in(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors_in(value)
    elif isinstance(batch, (tuple, list)):
        for value in batch:
            yield from _tensors_in(value)


def split(batch: Any, parts: int) -> list[Any]:
    """Split a batch into at most ``parts`` microbatches of nearly equal size.

    Args:
        batch: Tensors with one first dimension, in tuples, lists and mappings. Tensors without a dimension, numbers and
            None are the same in each microbatch.
        parts: At least 1.
    """
    if parts == 1:
        return [batch]
    size = next((tensor.shape[0] for tensor in _tensors_in(batch) if tensor.dim()), parts)
    return _split(batch, min(parts, size))


def _split(batch: Any, parts: int) -> list[Any]:
    if batch is None or isinstance(batch, int | float) or (isinstance(batch, Tensor) and not batch.dim()):
        return [batch] * parts
    if isinstance(batch, Tensor):
        return list(batch.tensor_split(min(parts, batch.shape[0])))
    if isinstance(batch, Mapping):
        columns = [_split(value, parts) for value in batch.values()]
        return [dict(zip(batch.keys(), row, strict=True)) for row in zip(*columns, strict=True)]
    if isinstance(batch, (tuple, list)):
        return [list(row) for row in zip(*(_split(value, parts) for value in batch), strict=True)]
    raise ValueError(
        "for grad_accum or parallelism, batches must be tensors in tuples, lists or mappings (got a "
        f"{type(batch).__name__})"
    )


def shares(
    batch: Any, parts: int, count: Callable[[Any], int], *, rank: int = 0, size: int = 1
) -> list[tuple[Any, float]]:
    """Return the microbatches of one rank's share of a batch, each with the factor for its loss.

    With these factors, the mean over ranks of the sum over microbatches is the mean over the samples of the batch. All
    ranks get the same number of microbatches, since each forward pass may be a collective. A rank with too few samples
    gets other samples, with a factor of 0.

    Args:
        batch: Tensors with one first dimension, in tuples, lists and mappings.
        parts: The largest number of microbatches for each rank.
        count: Returns how many samples a batch has.
        rank: The rank whose share is returned.
        size: The world size.
    """
    if parts == size == 1:
        return [(batch, 1.0)]
    total, of_ranks = count(batch), split(batch, size)
    number = len(split(of_ranks[0], parts))  # the first is the largest
    if rank >= len(of_ranks):
        return [(part, 0.0) for part in split(of_ranks[0], parts)]
    own = split(of_ranks[rank], parts)
    return [(part, size * count(part) / total) for part in own] + [(own[-1], 0.0)] * (number - len(own))


def checksum(batch: Any) -> int:
    """Return a checksum of a batch, which depends on the order of its samples.

    Args:
        batch: Tensors in tuples, lists and mappings.
    """
    if isinstance(batch, Tensor):
        content = batch.detach().contiguous().view(-1).view(torch.uint8).to(torch.int64)
        return int((content * torch.arange(1, len(content) + 1, device=content.device)).sum())
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    return sum(i * checksum(part) for i, part in enumerate(parts, start=1))

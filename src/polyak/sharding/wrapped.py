"""Weights of torchao that wrap a tensor with their values, and only change how it is multiplied or gathered.

So are those of float8 training with an fp8 all-gather, of int8 mixed precision, BitNet, and of grouped products in
float8. The inner tensor has the values in high precision, and is the one that optimizers step, so it is averaged.
Weights that are kept in int8 or float8 have no such tensor.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)


def inner(tensor: Tensor) -> Tensor:
    """Return the plain tensor with the values of torchao's, in the same shape and dtype; any other tensor itself.

    Args:
        tensor: Any, not sharded.
    """
    while (name := _name(tensor)) is not None:
        tensor = getattr(tensor, name)
    return tensor


def rewrapped(tensor: Tensor, by: Tensor) -> Tensor:
    """Return a tensor of the same class with new values, without anything computed from the old ones.

    Args:
        tensor: Any tensor.
        by: The values. It is returned as it is if ``tensor`` wraps none.
    """
    if (name := _name(tensor)) is None:
        return by
    kind: Any = type(tensor)
    context = tensor.__tensor_flatten__()[1]  # pyrefly: ignore[missing-attribute]
    values = rewrapped(getattr(tensor, name), by)
    return kind.__tensor_unflatten__({name: values}, context, values.shape, values.stride())


def scales(tensor: Tensor) -> Iterator[tuple[Tensor, str]]:
    """Yield the object and the attribute that store numbers computed from the values in advance.

    Args:
        tensor: Any, not sharded.
    """
    while (name := _name(tensor)) is not None:
        for other in tensor.__tensor_flatten__()[0]:  # pyrefly: ignore[missing-attribute]
            if other != name:
                yield tensor, other
        tensor = getattr(tensor, name)


def _name(tensor: Tensor) -> str | None:
    kind = type(tensor)
    if kind in _PLAIN or not kind.__module__.startswith("torchao.") or not hasattr(tensor, "__tensor_flatten__"):
        return None
    name, *others = tensor.__tensor_flatten__()[0]
    held: Tensor = getattr(tensor, name)
    same = (held.shape, held.dtype, held.layout) == (tensor.shape, tensor.dtype, torch.strided)
    return name if same and not any(getattr(tensor, other).dim() for other in others) else None

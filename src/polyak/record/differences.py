"""Means in 8 bits: the difference from the mean of the segment before, in steps of a scale for each row.

A file has the steps in int8, and the scales in float32 under names of their own. A mean is the mean before, plus the
steps times their scale.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from polyak.storage.safetensors import TensorInfo

# The end of the name under which a file has the scales of a tensor.
SCALE = ":scale"
# At most so many segments in a row are differences: a reader of one adds up as many.
LONGEST = 16
_MOST = 127


def is_difference(info: TensorInfo) -> bool:
    """Return whether a tensor is kept as a difference; for a whole record, whether it is when that is accurate enough.

    Args:
        info: How it is kept. No mean is of whole numbers by itself.
    """
    return info.averaged and info.dtype == torch.int8


def with_scales(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Return what a file holds: the tensors, and the scales of those that are differences.

    Args:
        tensors: How a segment keeps its tensors.

    Example:
        >>> list(with_scales({"weight": TensorInfo(torch.int8, (2, 3), averaged=True)}))
        ['weight', 'weight:scale']
    """
    shapes = {name: scale_shape(info.shape) for name, info in tensors.items() if is_difference(info)}
    scales = {f"{name}{SCALE}": TensorInfo(torch.float32, shape, averaged=False) for name, shape in shapes.items()}
    return {**tensors, **scales}


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the scales of a tensor: a number for each row, or one if it has less than two dimensions.

    Args:
        shape: The shape of the tensor, or of the local shard that a file has.

    Example:
        >>> scale_shape((64, 3, 3)), scale_shape((64,)), scale_shape(())
        ((64, 1, 1), (1,), ())
    """
    return tuple(size if i == 0 and len(shape) > 1 else 1 for i, size in enumerate(shape))


def scales_of(difference: Tensor) -> Tensor:
    """Return the size of a step in each row: that for which the largest number in the row is 127 steps.

    Args:
        difference: The difference from the mean before.

    Example:
        >>> scales_of(torch.tensor([[127.0, 1.0], [0.0, 0.0]]))
        tensor([[1.],
                [0.]])
    """
    shape = scale_shape(tuple(difference.shape))
    if not difference.numel():
        return torch.zeros(shape)
    rows = difference.reshape(shape[0] if len(shape) > 1 else 1, -1)
    return torch.linalg.vector_norm(rows, torch.inf, dim=1).div_(_MOST).float().reshape(shape)


def steps_of(difference: Tensor, scales: Tensor) -> Tensor:
    """Return a difference in steps, rounded.

    Args:
        difference: The difference from the mean before.
        scales: The size of a step in each row.
    """
    steps = difference / torch.where(scales > 0, scales, 1)
    return steps.round_().clamp_(-_MOST, _MOST).to(torch.int8)


def from_steps(steps: Tensor, scales: Tensor) -> Tensor:
    """Return the difference that steps encode, in float32.

    Args:
        steps: Some elements of a tensor.
        scales: The size of a step in each of their rows.
    """
    return steps.float().mul_(scales)


def lost(difference: Tensor, scales: Tensor) -> tuple[float, float]:
    """Return the squared error bound of a difference, half a step for each number, and its squared norm.

    NaN and inf are lost completely.

    Args:
        difference: The difference from the mean before.
        scales: The size of a step in each row.
    """
    row = difference.numel() / max(1, scales.numel())
    loss = float(scales.double().square().sum()) * row / 4
    size = float(torch.linalg.vector_norm(difference, dtype=torch.float64)) ** 2
    return (loss, size) if loss < torch.inf else (torch.inf, 0.0)

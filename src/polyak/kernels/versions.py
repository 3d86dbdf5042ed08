"""The counters by which autograd knows that a tensor has changed since a forward pass used it.

What torch's own operations count, a kernel has to count itself. Each counter takes as long as moving a small tensor, so
tensors that move at once may have one together.
"""

from collections.abc import Sequence
from operator import attrgetter

from torch import Tensor
from torch.autograd.graph import increment_version


def counting_with(anchor: Tensor, tensor: Tensor) -> Tensor:
    """Return an alias of ``tensor`` that shares the counter of ``anchor``: a change of one counts as one of all.

    Args:
        anchor: Any tensor without gradients.
        tensor: Likewise.

    Example:
        >>> import torch
        >>> anchor = torch.empty(0)
        >>> one, other = (counting_with(anchor, torch.zeros(2)) for _ in range(2))
        >>> other._version, one.add_(1)._version, other._version
        (0, 1, 1)
    """
    alias = anchor.detach()
    alias.data = tensor
    return alias


def one_of_each(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return some of ``tensors``: those that share the first one's counter are left out.

    Args:
        tensors: Which all change at once.
    """
    # Inference tensors have none.
    counting = [tensor for tensor in tensors if not tensor.is_inference()]
    before = list(map(_VERSION, counting))
    increment_version(counting[:1])
    return counting[:1] + [t for t, version in zip(counting, before, strict=True) if _VERSION(t) == version]


_VERSION = attrgetter("_version")

"""Whether tensors have changed: a sum of their bits, at the speed at which memory is read."""

from collections.abc import Sequence

import torch
from torch import Tensor

from polyak.kernels.pieces import views_of


def checksums(tensors: Sequence[Tensor]) -> list[int]:
    """Return for each tensor the sum of its memory, taken as integers of 64 bits, modulo 2 ** 64.

    Args:
        tensors: Strided, with memory, on any devices. Waits for the devices.

    Example:
        >>> weights = torch.zeros(3)
        >>> before = checksums([weights])
        >>> weights.data[1] = 1e-30
        >>> checksums([weights]) == before
        False
    """
    found = [0] * len(tensors)
    for device in dict.fromkeys(tensor.device for tensor in tensors):
        own = [i for i, tensor in enumerate(tensors) if tensor.device == device]
        sums = torch.stack([_checksum(tensors[i].detach()) for i in own]).tolist()
        for i, value in zip(own, sums, strict=True):
            found[i] = value
    return found


def _checksum(tensor: Tensor) -> Tensor:
    tensor = tensor.resolve_conj().resolve_neg()
    (flat,) = views_of([tensor])
    size = tensor.element_size()
    # All but a few bytes at the end, as words, where the address allows that.
    words = flat.numel() * size // 8 * 8 // size if flat.storage_offset() * size % 8 == 0 else 0
    if not flat.is_contiguous() or words * size % 8:
        flat, words = flat.contiguous(), 0
    rest = flat[words:].view(-1).view(torch.uint8).sum(dtype=torch.int64)
    return flat[:words].view(torch.int64).sum() + rest if words else rest

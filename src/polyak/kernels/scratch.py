"""Memory that the kernels in torch work in: bounded, and kept from update to update."""

from collections.abc import Callable

import torch
from torch import Tensor

# Small enough to stay in a core's cache, large enough that the calls do not count.
SCRATCH_ELEMENTS = 131_072


class Scratch:
    """Memory for one piece at a time in another dtype than its own."""

    def __init__(self) -> None:
        self._held = dict[tuple[str, torch.dtype, torch.device], Tensor]()

    def all(self, dtype: torch.dtype, device: torch.device, purpose: str) -> Tensor:
        """Return all ``SCRATCH_ELEMENTS`` of one scratch, with whatever is in it.

        Args:
            dtype: Of the result.
            device: Of the result.
            purpose: Two results at a time have two purposes.
        """
        return self._kept(purpose, dtype, device, torch.empty, SCRATCH_ELEMENTS)

    def like(self, piece: Tensor, dtype: torch.dtype, purpose: str) -> Tensor:
        """Return a tensor of the shape of ``piece``, with whatever is in it.

        Args:
            piece: A piece of at most ``SCRATCH_ELEMENTS``.
            dtype: Of the result.
            purpose: Two results at a time have two purposes.
        """
        return self.all(dtype, piece.device, purpose)[: piece.numel()].view(piece.shape)

    def flag(self, dtype: torch.dtype, device: torch.device, purpose: str) -> Tensor:
        """Return a 0-dim tensor, with whatever is in it.

        Args:
            dtype: Of the result.
            device: Of the result.
            purpose: Two results at a time have two purposes.
        """
        return self._kept(purpose, dtype, device, torch.empty, ())

    def numbers(self, count: int, device: torch.device) -> Tensor:
        """Return the numbers from 0 to below ``count`` in int32, to be read only.

        Args:
            count: How many, at most ``SCRATCH_ELEMENTS``.
            device: Of the result.
        """
        return self._kept("numbers", torch.int32, device, torch.arange, SCRATCH_ELEMENTS)[:count]

    def _kept(
        self, purpose: str, dtype: torch.dtype, device: torch.device, make: Callable[..., Tensor], size: object
    ) -> Tensor:
        key = purpose, dtype, device
        if key not in self._held:
            self._held[key] = make(size, dtype=dtype, device=device)
        return self._held[key]

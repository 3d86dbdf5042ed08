"""Counts tensors with NaN or inf, which are kept out of the average."""

import warnings

import torch

from polyak.errors import QuarantineWarning
from polyak.sharding import Ranks


class Quarantine:
    """Counts tensors with NaN or inf.

    Attributes:
        counter: A 0-dim tensor, which kernels increment.
    """

    def __init__(self) -> None:
        self.reset(0)

    def reset(self, before: int) -> None:
        """Start the count again.

        Args:
            before: How many there were before.
        """
        self.counter = torch.zeros((), dtype=torch.int64, device="cpu")
        self._before = before
        self._by_rank = list[int]()

    def move_to(self, device: torch.device | None) -> None:
        """Move the counter to the device of the averages, since each update would wait for another device.

        Args:
            device: The device of the averages; None if there are none.
        """
        if device is not None:
            self.counter = self.counter.to(device)

    def sum_over(self, ranks: Ranks) -> None:
        """Add what other ranks have counted in their shards. All ranks must call this.

        Args:
            ranks: The ranks that train the model together.
        """
        self._by_rank = ranks.sums(int(self.counter))

    @property
    def total(self) -> int:
        """The count so far. Reading it waits for the device."""
        own = int(self.counter)
        return self._before + (sum(self._by_rank) if self._by_rank else own)

    def warn(self, since: int) -> int:
        """Warn if there are more than ``since``; return how many there are.

        Args:
            since: What the last call returned.
        """
        count = self.total
        if count > since:
            where = f" (by rank: {self._by_rank})" if self._by_rank else ""
            warnings.warn(
                f"weights must be finite to be averaged: {count - since} tensors with NaN or inf came in{where}, and "
                "those values were kept out of the average; check the loss and the learning rate",
                QuarantineWarning,
                stacklevel=3,
            )
        return count

"""``BatchSizes``: the samples and tokens in the batches of an optimizer step."""

from collections.abc import Callable
from typing import Any

from polyak.time import TimeUnit


class BatchSizes:
    """Adds up the samples and tokens of batches until an optimizer steps.

    Args:
        num_samples: Function of a batch: how many samples it has; None if samples are not counted.
        num_tokens: Function of a batch: how many tokens it has; None if tokens are not counted.

    Attributes:
        units: The units that are counted: batches and epochs, and samples and tokens where there is a function.
    """

    def __init__(self, num_samples: Callable[[Any], int] | None, num_tokens: Callable[[Any], int] | None) -> None:
        self._num_samples, self._num_tokens = num_samples, num_tokens
        functions = {TimeUnit.SAMPLE: num_samples, TimeUnit.TOKEN: num_tokens}
        self.units = {TimeUnit.BATCH, TimeUnit.EPOCH, *(unit for unit, count in functions.items() if count is not None)}
        self._samples = self._tokens = 0

    def add(self, batch: Any, world_size: int) -> None:
        """Add a batch.

        Args:
            batch: The batch of this rank.
            world_size: The number of ranks, each with a batch of the same size.
        """
        if self._num_samples is not None:
            self._samples += self._num_samples(batch) * world_size
        if self._num_tokens is not None:
            self._tokens += self._num_tokens(batch) * world_size

    def take(self) -> dict[str, int]:
        """Return ``samples`` and ``tokens``, and begin again from 0."""
        taken = {"samples": self._samples, "tokens": self._tokens}
        self._samples = self._tokens = 0
        return taken

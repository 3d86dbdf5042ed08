"""``LoopState``: the state of a loop that its algorithms read."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn

from polyak.events import elapsed_duration
from polyak.time import Time, Timestamp


@dataclass
class LoopState:
    """An ``events.State`` that a ``Loop`` keeps. A trainer with more to show derives from it.

    Args:
        model: The model in training, wrapped or not.
        timestamp: The current position in training.
        max_duration: The length of the run, if it is known.
        saving_to: The path of the checkpoint that is being written, if that is known.
        previous_timestamp: The position before the last batch or epoch ended.
    """

    model: nn.Module
    timestamp: Timestamp = field(default_factory=Timestamp)
    max_duration: Time | None = None
    saving_to: Path | None = None
    previous_timestamp: Timestamp = field(default_factory=Timestamp)

    @contextmanager
    def writing(self, path: str | Path | None) -> Iterator[None]:
        """Set ``saving_to`` for a ``with`` block.

        Args:
            path: The path of the checkpoint that is written in it, if that is known.
        """
        self.saving_to = None if path is None else Path(path)
        try:
            yield
        finally:
            self.saving_to = None

    def set_epoch_length(self, batches: int | None) -> None:
        """Set how many batches an epoch has, so that fractions of it can be counted.

        Args:
            batches: None if that is not known.
        """
        self.timestamp = replace(self.timestamp, epoch_length=batches)

    def reset_clock(self) -> None:
        """Set the clock back to the start. At the next ``FIT_START`` an average continues from there."""
        self.timestamp = self.previous_timestamp = Timestamp(epoch_length=self.timestamp.epoch_length)

    def get_elapsed_duration(self) -> Time | None:
        """Return the elapsed share of the run as ``dur``; None if ``max_duration`` is not known."""
        return elapsed_duration(self.timestamp, self.max_duration)

"""``View``: Composer's state as polyak's algorithms read it."""

from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import nn

from polyak.events import elapsed_duration
from polyak.time import Time, Timestamp, TimeUnit

_COUNTERS = ("iteration", "epoch", "sample", "token", "sample_in_epoch", "token_in_epoch", "total_wct")


class View:
    """An ``events.State`` over Composer's. Its clock leaves out the batches whose step was skipped.

    Attributes:
        composers: Composer's state.
        saving_to: The path of the checkpoint that is being written, if one is.
        skipped: Batches whose step was skipped.
        skipped_in_epoch: As ``skipped``, since the epoch began.
        batch: Composer's counter of batches where it was seen last.
    """

    def __init__(self) -> None:
        self.composers: Any = None
        self.saving_to: Path | None = None
        self._epoch_length: int | None = None
        self.skipped = self.skipped_in_epoch = 0
        self.batch = 0

    def learn(self, composers: Any) -> None:
        """Note what does not change within a fit.

        Args:
            composers: Composer's state.
        """
        self.composers = composers
        self._epoch_length = None if composers.dataloader_len is None else int(composers.dataloader_len)

    def begin_fit(self) -> None:
        """Forget the skipped batches if Composer's clock has been set back: it starts again without any."""
        now = int(self.composers.timestamp.batch)
        if now < max(self.batch, self.skipped):
            self.skipped = self.skipped_in_epoch = 0
        self.batch = now

    def begin_epoch(self) -> None:
        """Count the skipped batches of an epoch from 0."""
        self.skipped_in_epoch = 0

    @property
    def counts(self) -> set[TimeUnit]:
        """The units that Composer counts; tokens and samples only if the batches so far had any."""
        now, length = self.composers.timestamp, self.composers._iteration_length  # noqa: SLF001
        counted = {TimeUnit.BATCH, TimeUnit.EPOCH, TimeUnit.SECOND}
        counted |= {unit for unit in (TimeUnit.SAMPLE, TimeUnit.TOKEN) if now.get(unit.value) > 0 or now.batch == 0}
        return counted if length is None else {*counted, TimeUnit.ITERATION}

    def end_batch(self, *, stepped: bool) -> None:
        """Note a batch. If mixed precision skipped its step, Composer's clock counts it all the same.

        Args:
            stepped: Whether the optimizer has moved the weights.
        """
        self.batch = int(self.composers.timestamp.batch)
        if not stepped:
            self.skipped += 1
            self.skipped_in_epoch += 1

    def state(self) -> list[int]:
        """Return the batches that the clock leaves out, and where it is."""
        return [self.skipped, self.skipped_in_epoch, self.batch]

    def load(self, state: list[int]) -> None:
        """Resume from what ``state`` returned.

        Args:
            state: As saved; its last entries may be absent.
        """
        self.skipped, self.skipped_in_epoch, self.batch = (*state, 0, 0, 0)[:3]

    @property
    def model(self) -> nn.Module:
        """The model in training."""
        return self.composers.model

    @property
    def timestamp(self) -> Timestamp:
        """Composer's clock without the skipped batches."""
        now = self.composers.timestamp
        # Composer's counter of batches in an epoch starts again with each, and so must that of the skipped ones.
        in_epoch = int(now.batch_in_epoch)
        return Timestamp(
            **{name: _time(getattr(now, name)) for name in _COUNTERS},
            batch=int(now.batch) - self.skipped,
            batch_in_epoch=in_epoch - (self.skipped_in_epoch if in_epoch else 0),
            epoch_length=self._epoch_length,
        )

    @property
    def max_duration(self) -> Time | None:
        """The length of the run, if it is known."""
        duration = self.composers.max_duration
        return None if duration is None else _time(duration)

    def get_elapsed_duration(self) -> Time | None:
        """Return the elapsed share of the run as ``dur``; None if ``max_duration`` is not known."""
        return elapsed_duration(self.timestamp, self.max_duration)


def _time(time: Any) -> Time:
    """Return a time of Composer's, which keeps wall clocks as ``timedelta``, as one of ours."""
    if isinstance(time, timedelta):
        return Time(time.total_seconds(), TimeUnit.SECOND)
    return Time(time.value, TimeUnit(time.unit.value))

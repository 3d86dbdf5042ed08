"""``LoopOptions``: the options of ``attach``, checked once."""

import math
from dataclasses import dataclass
from typing import Literal

from polyak.algorithm import MetricLogger
from polyak.averaging.habits import kind_of
from polyak.errors import ArgumentError, TimeError
from polyak.time import Time, Timestamp, TimeUnit, as_span


@dataclass(frozen=True)
class LoopOptions:
    """The options that every ``attach`` has.

    Args:
        max_duration: The length of the run, for times in ``dur`` and for warnings about the plan.
        steps_per_epoch: Optimizer steps in an epoch, for times in ``ep``; or ``"by hand"`` if ``end_epoch`` is called.
        samples_per_step: Samples in a step, for times in ``sp``.
        tokens_per_step: Tokens in a step, for times in ``tok``.
        logger: Where the algorithms log.

    Raises:
        TimeError: If ``max_duration`` is not a time above 0.
        ArgumentError: If one of the numbers is not whole, or too small, or the logger has no ``log_metrics``.
    """

    max_duration: Time | str | int | None = None
    steps_per_epoch: int | Literal["by hand"] | None = None
    samples_per_step: int = 0
    tokens_per_step: int = 0
    logger: MetricLogger | None = None

    def __post_init__(self) -> None:
        if self.max_duration is not None:
            duration = as_span("max_duration", self.max_duration, above=0, steps=True)
            if math.isinf(duration.value) or duration.unit is TimeUnit.DURATION:
                raise TimeError(
                    f"max_duration must be finite, and in another unit than dur (got {duration}); leave it out"
                )
            object.__setattr__(self, "max_duration", duration)
        if self.logger is not None and not callable(getattr(self.logger, "log_metrics", None)):
            raise ArgumentError(
                f"logger must have a method log_metrics(metrics, step) (got {kind_of(self.logger)}); give a "
                "TensorBoardLogger, or an object with that method"
            )
        for name, least in (("steps_per_epoch", 1), ("samples_per_step", 0), ("tokens_per_step", 0)):
            given = getattr(self, name)
            if name != "steps_per_epoch" or given not in (None, _BY_HAND):
                object.__setattr__(self, name, _whole(name, given, least))

    @property
    def epoch_length(self) -> int | None:
        """The steps in an epoch, if that number is known."""
        return None if isinstance(self.steps_per_epoch, str) else self.steps_per_epoch

    @property
    def start(self) -> Timestamp:
        """The clock at the start of the run."""
        return Timestamp(epoch_length=self.epoch_length)

    @property
    def duration(self) -> Time | None:
        """The length of the run, if it is known."""
        assert not isinstance(self.max_duration, str | int)
        return self.max_duration

    @property
    def counts(self) -> set[TimeUnit]:
        """The units that are counted."""
        given = {
            TimeUnit.EPOCH: self.steps_per_epoch,
            TimeUnit.SAMPLE: self.samples_per_step,
            TimeUnit.TOKEN: self.tokens_per_step,
        }
        return {TimeUnit.BATCH, *(unit for unit, number in given.items() if number)}


_BY_HAND = "by hand"


def _whole(name: str, given: object, least: int) -> int:
    try:
        number = int(given)  # pyrefly: ignore
        if number == given and number >= least:
            return number
    except (TypeError, ValueError, OverflowError):
        pass
    advice = ", or give 'by hand' and call end_epoch()" if name == "steps_per_epoch" else ""
    raise ArgumentError(
        f"{name} must be a whole number of at least {least} (got {given!r}); leave it out if unknown{advice}"
    )

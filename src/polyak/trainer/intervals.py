"""When something is due: once each interval of the clock, or where a function of the user returns True."""

from collections.abc import Callable
from typing import Any

from polyak.errors import TimeError
from polyak.events import Event
from polyak.time import Time, TimeUnit, as_span
from polyak.trainer.state import TrainerState

# Returns whether something is due at an event.
Question = Callable[[TrainerState, Event], Any]


def countable(name: str, time: Time, *, tokens: bool = True) -> Time:
    """Return a time whose unit a trainer counts.

    Args:
        name: The name of the argument, for errors.
        time: In any unit.
        tokens: Whether tokens are counted.

    Raises:
        TimeError: If its unit is not counted.
    """
    if time.unit is TimeUnit.ITERATION:
        raise TimeError(f"{name} must be in ep, ba, sp, tok or sec (got {time}): polyak.Trainer counts no iterations")
    if time.unit is TimeUnit.TOKEN and not tokens:
        raise TimeError(f"{name} must be in a unit that is counted (got {time}); give Trainer num_tokens= for tok")
    return time


def question(
    name: str, interval: str | Time | float, *, at: tuple[Event, Event], counted: frozenset[TimeUnit] | None = None
) -> Question:
    """Return a question that is true once each ``interval``.

    Args:
        name: The name of the argument, for errors.
        interval: A time, or epochs as a number; above 0 and whole.
        at: As for ``every``.
        counted: The units that are counted; None if that is not known yet.

    Raises:
        TimeError: If it is not such a time.
    """
    span = as_span(name, interval, above=0, whole=True, unit=TimeUnit.EPOCH)
    return every(countable(name, span, tokens=counted is None or TimeUnit.TOKEN in counted), at=at)


def every(interval: Time, *, at: tuple[Event, Event]) -> Callable[[TrainerState, Event], bool]:
    """Return a question that is true once each ``interval``.

    Args:
        interval: In any unit; whole.
        at: The event at which intervals in ``ba``, ``sp``, ``tok`` and ``sec`` are due, and that for ``ep``.
    """
    on_batch, on_epoch = at
    countable("the interval", interval)

    def due(state: TrainerState, event: Event) -> bool:
        before, now = state.previous_timestamp, state.timestamp
        if interval.unit is TimeUnit.EPOCH:
            return event is on_epoch and now.epoch.value // interval.value > before.epoch.value // interval.value
        if event is not on_batch:
            return False
        countable("the interval", interval, tokens=now.token.value > 0 or now.batch.value == 0)
        return now.intervals(interval, state.max_duration) > before.intervals(interval, state.max_duration)

    return due


def ends_run(state: TrainerState, event: Event) -> bool:
    """Return whether a checkpoint event is the last one of the run.

    Args:
        state: The state of the trainer.
        event: ``BATCH_CHECKPOINT`` or ``EPOCH_CHECKPOINT``.
    """
    # If the last batch ends an epoch, the end of the epoch follows.
    return state.finished and (event is Event.EPOCH_CHECKPOINT or not state.timestamp.ends_epoch)


def or_at_the_end(due: Question) -> Question:
    """Return a question that is true where another is, and once at the end of the run.

    Args:
        due: The other question.
    """

    def asked(state: TrainerState, event: Event) -> bool:
        if event not in (Event.BATCH_CHECKPOINT, Event.EPOCH_CHECKPOINT):
            return False
        if state.finished:
            return ends_run(state, event)
        return due(state, event)

    return asked

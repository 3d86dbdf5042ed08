"""Warnings about suspicious configurations, before a run and after it: plain numbers, without torch."""

import math
import warnings

from polyak.averaging.progress import Progress
from polyak.averaging.schedule import Run, Schedule, convert
from polyak.errors import PlanWarning
from polyak.profiles import HalfLife, named
from polyak.time import Time, Timestamp, TimeUnit

_MOST_HALF_LIVES = 10  # in one interval, after which an update keeps less than a thousandth of the average


def warn_before(schedule: Schedule, run: Run) -> None:
    """Warn if averaging will never start, will never forget the first weights, or will forget all but the last.

    Args:
        schedule: When averaging begins, and how it updates.
        run: The run at its start.
    """
    warn_of_short(schedule, run)
    end, first = convert(run.max_duration, TimeUnit.BATCH, run), first_update(schedule, run)
    if end is None or first is None or end <= float(run.timestamp.batch):
        return
    if first >= end:
        when = "never starts" if first > end else "starts only where the run ends"
        _warn(
            f"averaging {when}: its first update is at {first:g}ba (ema_start='{schedule.start}', "
            f"update_interval='{schedule.interval}') and the run ends at {end:g}ba"
        )
        return
    share = share_of_first_weights(schedule, run, first, end)
    if share is not None and share > 0.5:
        _warn(
            f"the first weights will still be {share:.1%} of the average at the end of the run (averaging from "
            f"{first:g}ba to {end:g}ba by {schedule.profile!r}); take a shorter half-life, or "
            "EMA(profile=HalfLife(..., unbiased=True)), which forgets them"
        )


def warn_of_short(schedule: Schedule, run: Run) -> None:
    """Warn if one interval is many half-lives, so that the average is little more than the last weights.

    Args:
        schedule: How the average updates.
        run: Has the length of an epoch and of the run, if they are known.
    """
    profile = schedule.profile
    if not isinstance(profile, HalfLife) or profile.span.value == 0:  # with 0, the average is the weights
        return
    interval = convert(schedule.interval, profile.span.unit, run)
    if interval is not None and interval > _MOST_HALF_LIVES * profile.span.value:
        _warn(
            f"the average will be little more than the last weights: update_interval='{schedule.interval}' is "
            f"{interval / profile.span.value:.4g} half-lives of '{profile.span}'; take a longer half-life or a shorter "
            "interval"
        )


def first_update(schedule: Schedule, run: Run) -> float | None:
    """Return the batch of the first update event at or after the start; None if it is not known.

    Args:
        schedule: When averaging begins.
        run: Has the length of an epoch and of the run, if they are known.
    """
    start = convert(schedule.start, TimeUnit.BATCH, run)
    if schedule.by_epoch:
        epoch = run.timestamp.epoch_length
        return None if start is None or epoch is None else max(1, math.ceil(start / epoch - 1e-9)) * float(epoch)
    return None if start is None else max(1.0, math.ceil(start - 1e-9))


def share_of_first_weights(schedule: Schedule, run: Run, first: float, end: float) -> float | None:
    """Return the share of the first weights in the average at the end; None if it is not known or does not matter.

    Args:
        schedule: How the average updates.
        run: Has the length of an epoch and of the run, if they are known.
        first: The batch of the first update.
        end: The last batch.
    """
    profile = schedule.profile
    if named(profile).forgets_nothing:
        return None
    interval = convert(schedule.interval, TimeUnit.BATCH, run)
    if interval is None:
        return None
    updates = end // interval - first // interval
    if schedule.unit is None:
        return profile.decay(0, updates)
    origin = 0.0 if schedule.start.value == 0 else first
    last = end // interval * interval if updates else first
    moments = [convert(Time(t, TimeUnit.BATCH), schedule.unit, run) for t in (origin, first, last)]
    known = [moment for moment in moments if moment is not None]
    if len(known) < len(moments):
        return None
    return profile.decay(known[1] - known[0], known[2] - known[0])


def warn_never_started(schedule: Schedule, now: Timestamp) -> None:
    """Warn at the end of a run in which averaging has not begun.

    Args:
        schedule: When averaging would have begun.
        now: The end of the run.
    """
    if now.batch.value > 0:
        _warn(
            f"averaging never started: ema_start='{schedule.start}', update_interval='{schedule.interval}', and the "
            f"run ended at {now.batch}, {now.epoch}"
        )


def warn_not_updated(schedule: Schedule, progress: Progress, num_updates: int, run: Run) -> None:
    """Warn at the end of a run in which the average has not moved, unless the run was cut short.

    Args:
        schedule: How the average updates.
        progress: Its last update, and the start of the run.
        num_updates: How often the average has moved.
        run: The run at its end.
    """
    now, updated_at = run.timestamp, progress.updated_at
    if progress.fit_from is None or updated_at is None:
        return
    if run.max_duration is not None and (now.elapsed(TimeUnit.DURATION, run.max_duration) or 1.0) < 1:
        return
    batch, updates = progress.fit_from
    if updates == num_updates and now.batch > max(batch, updated_at.batch):
        _warn(
            f"the average was not updated in this run: its last update was at {updated_at.batch}, and the run went "
            f"from {batch} to {now.batch} (update_interval='{schedule.interval}'); take a shorter interval"
        )


def warn_of_waits(progress: Progress, what: str) -> None:
    """Warn, once, that averaging has waited for finite weights.

    Args:
        progress: The number of updates that have waited, which is reset.
        what: What happens now.
    """
    count, first = progress.waits, progress.waits_since
    progress.waits, progress.waits_since = 0, None
    assert first is not None
    _warn(
        f"{what}: it waits for finite weights, and from {first.batch} on they had NaN or inf at {count} "
        f"update{'s' if count > 1 else ''}; check the loss and what was loaded"
    )


def _warn(message: str) -> None:
    warnings.warn(message, PlanWarning, stacklevel=4)

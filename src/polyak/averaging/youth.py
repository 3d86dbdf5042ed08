"""Warns if raw weights, or an average that is still mostly the first weights, are used. Without torch."""

import math
import warnings

from polyak.averaging.progress import Progress
from polyak.averaging.schedule import Run, Schedule
from polyak.errors import PlanWarning
from polyak.profiles import named


def share_of_first_weights(schedule: Schedule, progress: Progress, num_updates: int) -> float | None:
    """Return the share of the first weights in an average: the product of its decays. None if it is not known.

    If the first weights count no more than others in the profile, it is 0 before the first update, since the average is
    then what the profile asks for.

    Args:
        schedule: How the average updates.
        progress: Its start and its last update.
        num_updates: How often it has moved.
    """
    profile, unit, updated_at = schedule.profile, schedule.unit, progress.updated_at
    if not progress.has_history or updated_at is None or named(profile).forgets_nothing:
        return None
    if num_updates == 0:
        return 1.0 if named(profile).constant and profile.decay(0, 1) > 0 else 0.0
    if unit is None:
        return profile.decay(0, num_updates)
    last = updated_at.elapsed(unit, progress.max_duration) - progress.origin.elapsed(unit, progress.max_duration)
    began = progress.began
    if began is None:  # it was loaded: one interval for each update
        began = last - num_updates * float(schedule.interval) if schedule.interval.unit is unit else 0.0
    return profile.decay(max(0.0, began), max(0.0, began, last))


def warn_of_youth(schedule: Schedule, progress: Progress, num_updates: int, what: str) -> None:
    """Warn, once for an average, if the first weights are more than half of it.

    Args:
        schedule: How it updates.
        progress: Its start and its last update.
        num_updates: How often it has moved.
        what: What is done with it, such as ``"evaluated"``.
    """
    share = None if progress.warned_of_youth else share_of_first_weights(schedule, progress, num_updates)
    if share is not None and share > 0.5:
        updates = f"{num_updates} update{'' if num_updates == 1 else 's'}"
        _warn(
            progress,
            f"the average that is {what} is mostly its first weights: they are {share:.1%} of it after {updates} "
            f"({_half_life_of(schedule)}); take a shorter half-life, a profile that forgets the first weights "
            "(HalfLife(..., unbiased=True) or Warmup) or a later ema_start, or use raw weights until a half-life has "
            "passed",
        )


def warn_of_raw_weights(schedule: Schedule, progress: Progress, run: Run, what: str) -> None:
    """Warn, once for an average, that averaging has not begun: the weights are the raw ones.

    Args:
        schedule: When averaging begins.
        progress: Whether it waits for finite weights.
        run: The run as it is now.
        what: What is done with the weights, such as ``"evaluated"``.
    """
    now = run.timestamp
    if progress.warned_of_youth or now.batch.value == 0:
        return  # before the first batch an average would have the same weights
    why = "it waits for finite weights, and these have NaN or inf" if progress.waits else "its first update is to come"
    _warn(
        progress,
        f"raw weights are {what}, since averaging has not begun: {why} (0 updates at {now.batch}, {now.epoch}; "
        f"ema_start='{schedule.start}', update_interval='{schedule.interval}', {_half_life_of(schedule)}); take an "
        "earlier ema_start or a shorter update_interval, or use raw weights until then",
    )


def _half_life_of(schedule: Schedule) -> str:
    """Return the half-life in words; of a constant decay the one that follows from it."""
    profile = named(schedule.profile)
    words = profile.describe()
    kept = profile.decay(0, 1) if schedule.unit is None and profile.constant else 0.0
    return f"{words}, a half-life of {-math.log(2) / math.log(kept):.4g} updates" if 0 < kept < 1 else words


def _warn(progress: Progress, message: str) -> None:
    progress.warned_of_youth = True
    warnings.warn(message, PlanWarning, stacklevel=5)

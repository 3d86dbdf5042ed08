"""Does what ``OnlineAverage.decide`` has decided at an event: one function per action."""

from collections.abc import Callable

from polyak.algorithm import MetricLogger, NoLogger
from polyak.averaging import forecast, youth
from polyak.averaging.creation import check_layout
from polyak.averaging.nothing import warn_of_nothing
from polyak.averaging.online import SWAPS, Action, OnlineAverage
from polyak.averaging.swap import swap_of
from polyak.errors import LoanError, MemoryLayoutError, ProfileError, TimeError
from polyak.events import Event, State
from polyak.sharding import local
from polyak.tensors.slots import Policy, averaged_parameters
from polyak.time import TimeUnit

# For warnings: how the weights are used after each event.
_USED = {Event.EVAL_START: "evaluated", Event.PREDICT_START: "used to predict", Event.SAVE_START: "saved"}


def _nothing(average: OnlineAverage, event: Event, state: State, logger: MetricLogger) -> None:
    del average, event, state, logger


def _meet(average: OnlineAverage, event: Event, state: State, logger: MetricLogger) -> None:
    del event, logger
    average.meet(state.model)


def _start_run(average: OnlineAverage, event: Event, state: State, logger: MetricLogger) -> None:
    """Check that the run can be averaged; warn of suspicious configurations."""
    del event, logger
    average.meet(state.model)
    if swap := swap_of(state.model):
        raise LoanError(f"training must begin with training weights: {swap.owner} has swapped its average in")
    schedule, progress = average.schedule, average.progress
    if TimeUnit.DURATION in schedule.units and state.max_duration is None:
        raise TimeError(
            f"max_duration must be known for times in dur (got None); give it, or other units to {average.name}"
        )
    schedule.profile_in(state).decay(0, 1)  # raises for a momentum that needs the unknown length of the run
    progress.counts_seconds = schedule.counts_seconds(state.max_duration)
    progress.fit_from = state.timestamp.batch, average.num_updates
    if average.started:
        progress.resume(schedule, state)
    else:
        forecast.warn_before(schedule, state)


def _end_run(average: OnlineAverage, event: Event, state: State, logger: MetricLogger) -> None:
    """Warn if the run was not averaged, if NaN or inf were kept out, or if weights exceeded the average's dtype."""
    del event, logger
    average.warn_of_quarantine()
    average.warn_of_range()
    if average.shadow is not None:
        forecast.warn_not_updated(average.schedule, average.progress, average.num_updates, state)
    elif average.progress.waits:
        forecast.warn_of_waits(average.progress, "averaging never started")
    else:
        forecast.warn_never_started(average.schedule, state.timestamp)


def _begin(average: OnlineAverage, event: Event, state: State, logger: MetricLogger) -> None:
    """Begin with the weights as they are, unless they have NaN or inf."""
    del event, logger
    schedule, progress, now = average.schedule, average.progress, state.timestamp
    parameters = averaged_parameters(state.model, average.settings.policy)
    for slot in parameters:
        check_layout(slot, Policy.AVERAGE)  # first, since torch's functions fail for some of what it refuses
        if slot.tensor.is_meta:
            raise MemoryLayoutError(
                f"a trained tensor must have values to be averaged, and {slot.name!r} is on the meta device; load the "
                "weights before the first step"
            )
    if not all(bool(local(slot.tensor).detach().isfinite().all()) for slot in parameters):
        progress.wait(now)
        return
    if progress.waits:
        forecast.warn_of_waits(progress, f"averaging begins at {now.batch}")
    schedule.check_clock(state)
    if not parameters and average.model is not None:
        warn_of_nothing(average.model, average.name)
    average.shadow = average.new_shadow(state.model)
    progress.begin(schedule, state)


def _update(average: OnlineAverage, event: Event, state: State, logger: MetricLogger) -> None:
    """Move the average towards the weights, by the time since the last update."""
    del event, logger
    shadow, schedule, progress = average.shadow, average.schedule, average.progress
    assert shadow is not None
    now, before = state.timestamp, progress.updated_at
    if before is not None and vars(now)["batch"] < vars(before)["batch"]:  # plain numbers, in each update
        progress.resume(schedule, state)  # in mid-run, an average was loaded that has gone further than this run
        return
    if schedule.unit is None:
        decay = schedule.profile.decay(shadow.num_updates, shadow.num_updates + 1)
    else:
        decay = schedule.decay(progress.origin, progress.updated_at, state)
    if not 0 <= decay <= 1:
        raise ProfileError(
            f"an update must keep from none to all of the average (got {decay!r} from {schedule.profile!r}); a profile "
            "with negative shares can be taken from a record, and BEMA(...) keeps its own"
        )
    progress.decay = decay
    shadow.update_(1 - decay)
    progress.updated_at = state.timestamp


def _swap_in(average: OnlineAverage, event: Event, state: State, logger: MetricLogger) -> None:
    """Put the average in the model until the matching end event. Before an evaluation, log metrics."""
    average.agree()
    if average.shadow is None:
        youth.warn_of_raw_weights(average.schedule, average.progress, state, _USED[event])
        return
    if event is Event.EVAL_START:
        _log(average, state, logger)
    average.warn_of_quarantine()
    average.warn_before_use(_USED[event])
    # Set before the swap and reset after the restore, so that the average is restored after an interrupt in between.
    average.restore_at = SWAPS[event]
    average.shadow.swap_in(average.name)


def _log(average: OnlineAverage, state: State, logger: MetricLogger) -> None:
    """Log metrics, at most once per batch. All ranks that train together compute them, whichever of them logs."""
    now, progress = state.timestamp.batch, average.progress
    together = average.ranks is not None or average.pipeline() is not None
    if now != progress.logged_at and (together or not isinstance(logger, NoLogger)):
        progress.logged_at = now
        logger.log_metrics(average.metrics(), step=int(now.value))


def _restore(average: OnlineAverage, event: Event, state: State, logger: MetricLogger) -> None:
    del event, state, logger
    average.restore()


def _report_waits(average: OnlineAverage, event: Event, state: State, logger: MetricLogger) -> None:
    del event, state, logger
    forecast.warn_of_waits(average.progress, "averaging had not begun when the run was left")


ACTIONS: dict[Action, Callable[[OnlineAverage, Event, State, MetricLogger], None]] = {
    Action.NOTHING: _nothing,
    Action.MEET: _meet,
    Action.START_RUN: _start_run,
    Action.END_RUN: _end_run,
    Action.BEGIN: _begin,
    Action.UPDATE: _update,
    Action.SWAP_IN: _swap_in,
    Action.RESTORE: _restore,
    Action.REPORT_WAITS: _report_waits,
}

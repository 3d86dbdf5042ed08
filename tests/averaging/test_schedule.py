"""When an average begins and moves, and by how much: on plain numbers."""

from dataclasses import dataclass

import pytest

from polyak.averaging.forecast import first_update, share_of_first_weights, warn_before, warn_never_started
from polyak.averaging.progress import Progress
from polyak.averaging.schedule import Schedule, convert
from polyak.errors import PlanWarning, ProfileError, TimeError
from polyak.profiles import HalfLife, Smoothing, Uniform
from polyak.time import Time, Timestamp, TimeUnit


@dataclass
class Run:
    timestamp: Timestamp
    max_duration: Time | None = None


def at(batch: int = 0, epoch: int = 0, *, length: int | None = None, run: str | None = None) -> Run:
    timestamp = Timestamp(batch=batch, epoch=epoch, epoch_length=length)
    return Run(timestamp, None if run is None else Time.from_timestring(run))


def schedule(start: str, interval: str, half_life: str = "10ba") -> Schedule:
    return Schedule.of(half_life=half_life, smoothing=None, profile=None, ema_start=start, update_interval=interval)


@pytest.mark.parametrize(
    ("start", "interval", "length", "run", "first"),
    [
        ("0ba", "1ba", None, None, 1),
        ("5ba", "1ba", None, None, 5),
        ("5ba", "4ba", None, None, 5),
        ("1ep", "1ba", 10, None, 10),
        ("1ep", "1ba", None, None, None),
        ("0.5dur", "1ba", 10, "4ep", 20),
        ("5ba", "1ep", 10, None, 10),
        ("0ba", "1ep", 10, None, 10),
        ("11ba", "1ep", 10, None, 20),
        ("0.5ep", "1ba", 3, None, 2),
        ("5sp", "1ba", 3, None, None),
    ],
)
def test_the_first_update_is_the_first_event_at_or_past_the_start(start, interval, length, run, first):
    run = at(length=length, run=run)
    assert first_update(schedule(start, interval), run) == first


def test_times_convert_to_another_unit_if_the_run_says_how():
    run = at(length=4, run="2ep")
    assert convert(Time(2, "ep"), TimeUnit.BATCH, run) == 8
    assert convert(Time(2, "ba"), TimeUnit.EPOCH, run) == 0.5
    assert convert(Time(0.5, "dur"), TimeUnit.BATCH, run) == 4
    assert convert(Time(4, "sp"), TimeUnit.BATCH, run) is None
    assert convert(Time(0, "sp"), TimeUnit.BATCH, run) == 0
    assert convert(None, TimeUnit.BATCH, run) is None


def test_the_share_of_the_first_weights_is_the_share_that_no_update_has_replaced():
    run = at(length=10, run="2ep")
    assert share_of_first_weights(schedule("0ba", "1ba"), run, 1, 11) == pytest.approx(0.5)
    assert share_of_first_weights(schedule("0ba", "5ba"), run, 1, 14) == pytest.approx(0.5**0.9)
    assert share_of_first_weights(schedule("0ba", "1ba", "infba"), run, 1, 14) is None
    assert share_of_first_weights(schedule("0ba", "1ba", "10sp"), run, 1, 14) is None


def test_the_last_interval_ended_where_its_counter_was_a_multiple():
    assert schedule("0ba", "4ba").last_interval(Timestamp(batch=11)).batch == 8
    assert schedule("0ba", "2ep", "1ep").last_interval(Timestamp(batch=11, epoch=3)).epoch == 2


@pytest.mark.parametrize(("batch", "may"), [(0, False), (4, False), (5, True), (6, True)])
def test_averaging_may_start_at_the_first_batch_at_or_past_the_start(batch: int, may: bool) -> None:
    assert schedule("5ba", "1ba").may_start(at(batch)) is may


def test_a_start_in_dur_is_reached_only_where_the_length_of_the_run_is_known() -> None:
    late = schedule("0.5dur", "1ba")
    assert [late.may_start(at(batch, run="10ba")) for batch in (4, 5)] == [False, True]
    assert not late.may_start(at(5))
    assert schedule("0dur", "1ba").may_start(at(1))


def test_an_update_is_due_where_an_interval_has_ended_since_the_last() -> None:
    every_four = schedule("0ba", "4ba")
    last = Timestamp(batch=5)
    assert [every_four.is_due(last, at(batch)) for batch in (5, 6, 7, 8, 9)] == [False, False, False, True, True]
    assert [every_four.is_due(None, at(batch)) for batch in (6, 7, 8)] == [False, False, True]


def test_the_decay_of_an_update_follows_the_time_since_the_last() -> None:
    ten = schedule("0ba", "1ba")
    assert ten.decay(Timestamp(), Timestamp(batch=10), at(20)) == 0.5
    assert ten.decay(Timestamp(), None, at(20)) == 2**-0.1  # one interval
    with pytest.raises(TimeError, match="time must have passed"):
        ten.decay(Timestamp(), Timestamp(batch=20), at(20))


def test_the_clock_of_a_profile_begins_at_the_start_of_averaging_and_not_at_its_first_update() -> None:
    assert schedule("0ba", "4ba").origin(Timestamp(batch=4)) == Timestamp()
    assert schedule("3ba", "4ba").origin(Timestamp(batch=4)) == Timestamp(batch=3)
    assert schedule("0.3dur", "4ba").origin(Timestamp(batch=4)) == Timestamp(batch=4)


def test_the_smoothing_of_a_schedule_is_none_where_it_depends_on_the_elapsed_time() -> None:
    batch = Time(1, "ba")
    assert schedule("0ba", "2ba").smoothing == 2**-0.2
    assert schedule("0ba", "1ep").smoothing is None
    assert Schedule(batch, batch, Smoothing(0.9)).smoothing == 0.9
    assert Schedule(batch, batch, Uniform()).smoothing is None


def test_a_clock_that_the_loop_does_not_count_is_refused_at_the_first_update() -> None:
    schedule("0ba", "1ba", "10ba").check_clock(at(1))
    with pytest.raises(ProfileError, match="the loop must count tok"):
        schedule("0ba", "1ba", "10tok").check_clock(at(1))
    with pytest.raises(ProfileError, match="the loop must count ep"):
        schedule("0ba", "1ba", "1ep").check_clock(at(1, 1))


def test_an_average_that_resumes_on_a_clock_that_starts_again_loses_no_time() -> None:
    progress = Progress(origin=Timestamp(), updated_at=Timestamp(batch=30))
    ten, again = schedule("0ba", "1ba"), at(0)
    progress.resume(ten, again)
    assert progress.updated_at == again.timestamp
    assert ten.decay(progress.origin, progress.updated_at, at(10)) == 0.5
    assert again.timestamp.elapsed("ba") - progress.origin.elapsed("ba") == 30


def test_progress_is_the_same_after_a_round_trip_and_has_no_wall_clock_that_nothing_depends_on() -> None:
    moment = Timestamp(batch=3, total_wct=5.0)
    kept, dropped = (Progress(moment, moment, 0.5, counts_seconds=counts) for counts in (True, False))
    again = Progress()
    again.load_state_dict(kept.state_dict())
    assert (again.origin, again.updated_at, again.decay) == (moment, moment, 0.5)
    assert dropped.state_dict()["updated_at"]["total_wct"] == 0


def test_a_run_that_ends_before_averaging_starts_warns_before_and_after() -> None:
    with pytest.warns(PlanWarning, match="averaging never starts: its first update is at 50ba"):
        warn_before(schedule("50ba", "1ba"), at(run="20ba"))
    with pytest.warns(PlanWarning, match="averaging never started"):
        warn_never_started(schedule("50ba", "1ba"), Timestamp(batch=20))


def test_an_automatic_half_life_is_a_sixteenth_of_the_run_without_bias() -> None:
    by_hand = Schedule.of(
        half_life=None,
        smoothing=None,
        profile=HalfLife("0.0625dur", unbiased=True),
        ema_start="0ba",
        update_interval=None,
    )
    automatic = Schedule.of(half_life="auto", smoothing=None, profile=None, ema_start="0ba", update_interval=None)
    assert automatic == by_hand
    assert automatic.profile.decay(0.5, 0.5625) == pytest.approx(0.5, rel=0.01)
    assert next(automatic.requirements()).argument == "half_life='0.0625dur', which is 'auto'"

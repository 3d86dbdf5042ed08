import copy
import dataclasses
import math
import pickle
from datetime import timedelta

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyak import Time, TimeError, Timestamp, TimeUnit
from polyak.time import as_span


@pytest.mark.parametrize(
    ("string", "value", "unit"),
    [
        ("1000ba", 1000, "ba"),
        ("1EP", 1, "ep"),
        ("0.0dur", 0.0, "dur"),
        ("1.5ep", 1.5, "ep"),
        ("2.0ep", 2, "ep"),
        ("3sp", 3, "sp"),
        ("1_000_000tok", 1_000_000, "tok"),
        ("1e6tok", 1_000_000, "tok"),
        ("30sec", 30, "sec"),
        ("2iter", 2, "iter"),
        ("infba", math.inf, "ba"),
        (" 5 ba ", 5, "ba"),
        (".5dur", 0.5, "dur"),
        ("1h30m", 5400, "sec"),
        ("90m", 5400, "sec"),
        ("5s", 5, "sec"),
    ],
)
def test_a_time_string_reads_as_its_number_and_unit(string, value, unit) -> None:
    time = Time.from_timestring(string)
    assert (time.value, time.unit) == (value, unit)


BAD_NUMBERS = ["1_000_ba", "_1ba", "1__0ba", "1_.5ep", "1._5ep", "1e5_ba", "1e_5ba", "1e999ba", "9" * 5000 + "ba"]


@pytest.mark.parametrize("string", [*BAD_NUMBERS, "9" * 400 + "h", "\u0661ba", "\xb2ba"])
def test_a_number_that_python_would_not_read_is_the_one_clear_error(string) -> None:
    with pytest.raises(TimeError, match="a time string is a number that is not negative and a unit.*got"):
        Time.from_timestring(string)


@pytest.mark.parametrize(
    "string", ["5", "", "nandur", "-3ba", "ba", "1.5.5ep", "5bananas", "5 b a", "1h30", "--5ba", "0x10ba", "h", "+-1ba"]
)
def test_a_string_that_is_no_time_string_is_one_clear_error_that_names_the_form(string) -> None:
    with pytest.raises(ValueError, match="a time string is a number that is not negative and a unit.*got"):
        Time.from_timestring(string)


@given(st.floats(min_value=0, allow_nan=False) | st.integers(0, 10**18), st.sampled_from(list(TimeUnit)))
def test_a_time_reads_back_from_its_time_string(value, unit) -> None:
    time = Time(value, unit)
    assert Time.from_timestring(time.to_timestring()) == time


def test_other_kinds_are_refused_where_a_time_is_asked_for() -> None:
    with pytest.raises(ValueError, match="got 5, a int"):
        Time.from_input(5)
    with pytest.raises(ValueError, match="unit must be one of"):
        Time(1, "bananas")
    for value in (math.nan, "3", Time(3, "ba"), None, [1], timedelta(seconds=1)):
        with pytest.raises(ValueError, match="must be a number"):
            Time(value, "ba")
    for value in (None, [123], True, 1j):
        with pytest.raises(TimeError, match="a time string is a number"):
            Time.from_input(value, "ba")
    with pytest.raises(TimeError, match="a time string is a number"):
        Time.from_timestring(5)


def test_arithmetic_is_within_one_unit() -> None:
    ten = Time(10, "ba")
    assert ten + "5ba" == Time(15, "ba")
    assert ten - "15ba" == Time(-5, "ba")
    assert ten % "3ba" == Time(1, "ba")
    assert ten * 2 == 2 * ten == Time(20, "ba")
    assert ten / "4ba" == Time(2.5, "dur")
    assert ten / 4 == Time(2.5, "ba")
    assert ten < "11ba"
    assert ten <= "10ba"
    assert ten > "9ba"
    assert ten >= "10ba"
    assert int(ten) == float(ten) == 10
    assert ten != Time(10, "ep")
    for combine in (lambda a, b: a + b, lambda a, b: a - b, lambda a, b: a % b, lambda a, b: a < b, lambda a, b: a / b):
        with pytest.raises(TimeError, match="two times must have one unit"):
            combine(ten, Time(1, "ep"))


def test_numbers_stand_for_times_in_the_unit_of_the_other_side() -> None:
    five = Time(5, "ba")
    assert five == 5
    assert five != 6
    assert five == np.int64(5) == five
    assert [five < 6, five <= 5.5, five > 4, five >= 5] == [True] * 4
    assert min(3, five, 7) == 3  # numbers on the left
    assert max(3, five, 7) == 7
    assert five in {5, 10}
    assert {5: "found"}[five] == "found"
    assert five in range(0, 10, 5)
    assert [(five + 1).value, (1 + five).value, (five - 1).value, (1 - five).value] == [6, 6, 4, -4]
    assert [(five % 2).value, (-five).value, (+five).value] == [1, -5, 5]
    assert five % 5 == 0
    assert (five == "5ba", five == "5ep", five == object(), five is None) == (True, False, False, False)
    for combine in (lambda t: t < None, lambda t: t + None, lambda t: t * [1], lambda t: t / None):
        with pytest.raises(TypeError):
            combine(five)


def test_a_product_with_a_share_of_the_run_is_a_time_in_the_other_unit() -> None:
    half = Time(0.5, "dur")
    for product in (Time(8, "ba") * half, half * Time(8, "ba"), Time(8, "ba") * "0.5dur", "0.5dur" * Time(8, "ba")):
        assert (product.value, product.unit) == (4, "ba")
    assert (half * half).unit is TimeUnit.DURATION
    assert (Time(7, "ba") * half).value == 3.5
    with pytest.raises(TimeError, match=r"one must be in dur \(got 1ep and 2ba\)"):
        Time(1, "ep") * Time(2, "ba")


def test_a_time_is_made_from_a_number_by_its_unit() -> None:
    made = [
        Time.from_iteration(1),
        Time.from_epoch(1),
        Time.from_batch(1),
        Time.from_sample(1),
        Time.from_token(1),
        Time.from_duration(1),
        Time.from_timedelta("1s"),
    ]
    assert [time.unit for time in made] == list(TimeUnit)
    assert all(time == 1 for time in made)
    assert Time.from_input(1, "EP") == Time.from_input("1ep", "ba") == Time(1, TimeUnit.EPOCH)
    assert Time.from_timedelta(timedelta(minutes=2)) == "2m"
    with pytest.raises(TimeError, match="hours, minutes and seconds"):
        Time.from_timedelta("3ba")


def test_seconds_compare_and_add_with_timedeltas() -> None:
    minute = Time(60, "sec")
    assert minute == timedelta(minutes=1)
    assert minute < timedelta(minutes=2)
    assert minute + timedelta(seconds=5) == timedelta(seconds=5) + minute == 65
    assert minute.total_seconds() == 60.0
    assert Time(60, "ba") != timedelta(minutes=1)
    with pytest.raises(TimeError, match="one unit"):
        _ = Time(1, "ba") < timedelta(seconds=2)
    with pytest.raises(TimeError, match="wall clocks"):
        Time(1, "ba").total_seconds()


def test_a_span_is_checked_where_it_is_given() -> None:
    assert as_span("x", "3ba", above=0, whole=True) == Time(3, "ba")
    with pytest.raises(TimeError, match=r"x must be at least 0 \(got -1ba\)"):
        as_span("x", Time(-1, "ba"))
    with pytest.raises(TimeError, match=r"x must be above 0 \(got 0ba\)"):
        as_span("x", "0ba", above=0)
    with pytest.raises(TimeError, match=r"x must be a whole number of ep \(got 1.5ep\)"):
        as_span("x", "1.5ep", whole=True)
    assert as_span("x", "0.5dur", whole=True).value == 0.5
    assert as_span("x", 3, unit=TimeUnit.EPOCH) == "3ep"
    with pytest.raises(TimeError, match="x must be a time: .*got 3, a int"):
        as_span("x", 3)


def test_a_timestamp_counts_each_unit() -> None:
    now = Timestamp(epoch_length=4)
    for _ in range(3):
        now = now.to_next_batch(samples=8, tokens=16, seconds=0.5)
    assert [now.get(unit).value for unit in ("ba", "sp", "tok", "sec", "ep", "iter")] == [3, 24, 48, 1.5, 0, 0]
    assert now.elapsed("ep") == 0.75
    assert now.elapsed("dur", Time(12, "ba")) == 0.25
    assert now.elapsed("dur", Time(1, "ep")) == 0.75
    after = now.to_next_batch(samples=8, steps=0).to_next_epoch()
    assert (after.batch.value, after.sample.value, after.epoch.value, after.batch_in_epoch.value) == (3, 32, 1, 0)
    assert after.elapsed("ep") == 1.0
    assert Timestamp.from_state_dict(now.state_dict()) == now
    assert now.with_counter(Time(1.5, "ep")).elapsed("ep") == 1.5


def test_the_clock_reads_the_same_at_the_last_batch_of_an_epoch_and_after_it() -> None:
    now = Timestamp(epoch_length=3)
    for _ in range(3):
        now = now.to_next_batch()
    assert now.elapsed("ep") == now.to_next_epoch().elapsed("ep") == 1.0


def test_a_timestamp_names_the_units_that_it_does_not_know() -> None:
    with pytest.raises(TimeError, match="dur needs a run whose max_duration is known"):
        Timestamp().elapsed("dur")
    with pytest.raises(TimeError, match="unit must be one of"):
        Timestamp().get("dur")
    assert Timestamp().to_next_batch().elapsed("ep") == 0.0


def test_a_timestamp_takes_numbers_and_names_a_counter_in_another_unit() -> None:
    now = Timestamp(epoch=1, batch=np.int64(3), total_wct=timedelta(seconds=2))
    assert (now.epoch, now.batch, now.total_wct) == (Time(1, "ep"), Time(3, "ba"), Time(2, "sec"))
    with pytest.raises(TimeError, match=r"batch must be in ba \(got 3ep\)"):
        Timestamp(batch="3ep")
    other = now.copy(batch=2, sample=None, epoch="4ep")
    assert (other.batch, other.sample, other.epoch, now.batch) == (2, 0, 4, 3)
    with pytest.raises(TimeError, match=r"a counter must be one of iteration, .*got batches"):
        now.copy(batches=2)


def test_a_timestamp_compares_with_a_time_by_the_counter_of_its_unit() -> None:
    now = Timestamp(epoch=2, batch=10)
    assert now < "3ep"
    assert now <= Time(10, "ba")
    assert now > "9ba"
    assert now >= "2ep"
    assert now == "10ba"
    assert now != "11ba"
    assert Time(11, "ba") > now
    with pytest.raises(TimeError, match="unit must be one of"):
        _ = now < "0.5dur"
    with pytest.raises(TypeError):
        _ = now < 3


def test_clocks_within_an_epoch_and_an_iteration_start_again_with_each() -> None:
    now = Timestamp().to_next_batch(8, 16, timedelta(seconds=3)).to_next_batch(8, 16, timedelta(seconds=2))
    assert (now.batch_wct, now.epoch_wct, now.iteration_wct, now.total_wct) == (2, 5, 5, 5)
    assert now.token_in_iteration == 32
    ended = now.to_next_epoch(timedelta(seconds=1))
    assert (ended.epoch, ended.epoch_in_iteration, ended.batch_in_epoch, ended.token_in_iteration) == (1, 1, 0, 32)
    assert (ended.batch_wct, ended.epoch_wct, ended.iteration_wct, ended.total_wct) == (0, 0, 6, 6)
    again = ended.to_next_iteration()
    assert (again.iteration, again.epoch, again.epoch_in_iteration, again.token_in_iteration) == (1, 1, 0, 0)
    assert (again.iteration_wct, again.total_wct, again.batch) == (0, 6, 2)
    details = Timestamp.from_state_dict(now.state_dict(details=True))
    assert details.epoch_wct == 5
    short = Timestamp.from_state_dict(now.state_dict())
    assert short == now == details
    assert hash(short) == hash(now)
    assert short.epoch_wct == 0


def test_reprs_of_times_and_timestamps_evaluate_to_what_they_are_of() -> None:
    now = Timestamp(epoch_length=4).to_next_batch(samples=8, seconds=0.5)
    names = {"Timestamp": Timestamp, "Time": Time}
    assert eval(repr(now), names) == now
    assert eval(repr(now.sample), names) == now.sample


def test_a_timestamp_holds_plain_numbers() -> None:
    began = Timestamp(epoch="2ep", epoch_length=4)
    now = began.to_next_batch(samples=Time(8, "sp"), tokens=np.int64(3)).to_next_epoch()
    assert {type(number) for number in vars(now).values()} <= {int, float}
    assert (now.epoch, now.sample, now.token) == (Time(3, "ep"), Time(8, "sp"), Time(3, "tok"))
    with pytest.raises(TimeError, match=r"sample must be in sp \(got 1ba\)"):
        now.to_next_batch(samples=Time(1, "ba"))


def test_counting_a_batch_makes_no_time_objects(monkeypatch) -> None:
    now = Timestamp(epoch_length=4)
    monkeypatch.setattr(Time, "__post_init__", lambda self: pytest.fail("a Time was made"))
    later = now.to_next_batch(samples=8, tokens=16, seconds=0.5)
    assert [later.elapsed(unit) for unit in ("ba", "sp", "tok", "sec", "ep")] == [1.0, 8.0, 16.0, 0.5, 0.25]
    assert later.in_epoch
    assert not later.ends_epoch


def test_a_timestamp_can_be_pickled_and_copied_and_stays_as_it_is() -> None:
    now = Timestamp(epoch_length=4).to_next_batch(samples=8, seconds=0.5)
    for other in (pickle.loads(pickle.dumps(now)), copy.deepcopy(now), dataclasses.replace(now)):
        assert other == now
        assert vars(other) == vars(now)
    with pytest.raises(dataclasses.FrozenInstanceError):
        now.batch = Time(2, "ba")


def test_a_pickle_of_a_timestamp_that_held_times_is_read() -> None:
    now = Timestamp(epoch_length=4).to_next_batch(samples=8, seconds=0.5)
    other = Timestamp.__new__(Timestamp)
    other.__setstate__([getattr(now, field.name) for field in dataclasses.fields(Timestamp)])
    assert other == now

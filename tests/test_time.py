import math

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


@pytest.mark.parametrize(
    "string", ["5", "", "nandur", "-3ba", "ba", "1.5.5ep", "5bananas", "5 b a", "1h30", "--5ba", "0x10ba", "h", "+-1ba"]
)
def test_what_is_no_time_string_is_one_clear_error_that_names_the_form(string) -> None:
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
    with pytest.raises(ValueError, match="must be a number"):
        Time(math.nan, "ba")


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


def test_a_span_is_checked_at_the_door() -> None:
    assert as_span("x", "3ba", above=0, whole=True) == Time(3, "ba")
    with pytest.raises(TimeError, match=r"x must be at least 0 \(got -1ba\)"):
        as_span("x", Time(-1, "ba"))
    with pytest.raises(TimeError, match=r"x must be above 0 \(got 0ba\)"):
        as_span("x", "0ba", above=0)
    with pytest.raises(TimeError, match=r"x must be a whole number of ep \(got 1.5ep\)"):
        as_span("x", "1.5ep", whole=True)
    assert as_span("x", "0.5dur", whole=True).value == 0.5


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


def test_a_timestamp_names_what_it_cannot_tell() -> None:
    with pytest.raises(TimeError, match="dur needs a run of known length"):
        Timestamp().elapsed("dur")
    with pytest.raises(TimeError, match="unit must be one of"):
        Timestamp().get("dur")
    assert Timestamp().to_next_batch().elapsed("ep") == 0.0

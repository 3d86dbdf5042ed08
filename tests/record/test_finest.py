"""The finest half-life of a record: what the documentation promises is served, whatever the run divides by."""

import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyak.errors import ProfileError
from polyak.profiles import HalfLife
from polyak.record import Edge, Segment, finest, fit
from polyak.record.writer import due
from polyak.time import Time, Timestamp, TimeUnit


def segments(updates, interval, per_level):
    """Return the segments of a run as a Recorder ends and merges them."""
    length, found = Time(updates, TimeUnit.BATCH), list[Segment]()
    stamps = [Timestamp().to_next_batch(steps=n) for n in range(updates + 1)]
    passed = [stamp.intervals(interval, length) for stamp in stamps]
    start = 0
    for n in range(1, updates + 1):
        if passed[n] == passed[start] and n < updates:
            continue
        found.append(Segment(Edge(start, stamps[start]), Edge(n, stamps[n]), 0, 0, "0" * 64))
        start, level = n, 0
        while (i := due([one.level for one in found], level, per_level)) is not None:
            older, newer = found[i], found[i + 1]
            found[i : i + 2] = [Segment(older.start, newer.end, level + 1, 0, "0" * 64)]
            level += 1
    return tuple(found)


@settings(max_examples=25, deadline=None)
@given(
    updates=st.integers(1, 2500),
    per_level=st.sampled_from([1, 2, 3, 4]),
    share=st.floats(1 / 512, 1.0),
    unbiased=st.booleans(),
    in_batches=st.booleans(),
)
def test_a_record_of_the_default_interval_serves_half_lives_of_a_512th_of_any_run(
    updates, per_level, share, unbiased, in_batches
) -> None:
    length = Time(updates, TimeUnit.BATCH)
    record = segments(updates, Time(1 / 1024, TimeUnit.DURATION), per_level)
    for part in (1 / 512, share, 1 / 16):
        span = Time(updates * part, TimeUnit.BATCH) if in_batches else Time(part, TimeUnit.DURATION)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of weights from before the record, for long half-lives
            assert sum(fit(HalfLife(span, unbiased=unbiased), record, max_duration=length).coefficients) == (
                pytest.approx(1)
            )


@settings(max_examples=25, deadline=None)
@given(updates=st.integers(60, 1500), interval=st.integers(1, 20), per_level=st.sampled_from([1, 2, 4, None]))
def test_a_record_serves_half_lives_of_one_interval_of_whole_updates(updates, interval, per_level) -> None:
    record = segments(updates, Time(interval, TimeUnit.BATCH), per_level)
    assert finest(record) <= interval
    fit(HalfLife(Time(interval, TimeUnit.BATCH), unbiased=True), record)


def test_a_half_life_below_the_interval_is_refused() -> None:
    record = segments(600, Time(10, TimeUnit.BATCH), 4)
    with pytest.raises(ProfileError, match="resolves half-lives of 10 updates or more"):
        fit(HalfLife("9ba", unbiased=True), record)


def test_a_last_segment_that_was_cut_short_does_not_make_the_record_finer() -> None:
    assert finest(segments(603, Time(10, TimeUnit.BATCH), 4)) == 10
    assert finest(segments(603, Time(10, TimeUnit.BATCH), 1)) == 10

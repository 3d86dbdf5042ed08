"""Averages at any recorded moment, each with its error; and how often files are read for them."""

from collections import Counter

import pytest
import torch
from torch import Tensor

from polyak import PlanWarning, TimeError
from polyak.profiles import Cooldown, HalfLife, PowerFunction, Uniform
from polyak.record import Edge, Record, SegmentFile, Writer
from polyak.storage.safetensors import TensorInfo
from polyak.time import Time, Timestamp

INFOS = {
    "weight": TensorInfo(torch.float32, (300,), averaged=True),
    "steps": TensorInfo(torch.int64, (), averaged=False),
}
LENGTH = 512


def walk():
    steps = torch.randn(LENGTH, 300, generator=torch.Generator().manual_seed(0))
    return steps.cumsum(0)


def written(folder, per_level, interval=2):
    """Write the record of a random walk; the weights after each update are those of ``walk``."""
    weights = walk()
    with Writer(folder, INFOS, per_level=per_level, max_duration=Time(LENGTH, "ba")) as writer:
        start = Edge(0, Timestamp())
        for n in range(interval, LENGTH + 1, interval):
            end = Edge(n, Timestamp().to_next_batch(steps=n))
            tensors = {"weight": weights[n - interval : n].mean(0), "steps": torch.tensor(n)}
            writer.append(tensors, start, end)
            start = end
    return Record(folder)


@pytest.fixture(scope="module")
def unmerged(tmp_path_factory):
    """The folder of a record in which each segment is as it was written."""
    return written(tmp_path_factory.mktemp("unmerged"), per_level=None).folder


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """The folder of a record with as few segments as there can be."""
    return written(tmp_path_factory.mktemp("merged"), per_level=1).folder


def exact(profile, moment) -> Tensor:
    weights = walk()[:moment].double()
    shares = [1.0]
    for n in range(moment - 1, -1, -1):
        decay = profile.decay(n, n + 1) if profile.recursive else profile.decay(n, moment) / 1
        shares.append(shares[-1] * decay if profile.recursive else decay)
    kept = torch.tensor(shares, dtype=torch.float64)
    return ((kept[:-1] - kept[1:]).flip(0)[:, None] * weights).sum(0) / (kept[0] - kept[-1])


@pytest.mark.slow
@pytest.mark.parametrize("profile", [HalfLife("40ba", unbiased=True), PowerFunction(0.1), Uniform(), Cooldown("100ba")])
def test_an_average_at_each_moment_is_as_near_to_the_exact_one_as_its_error_says(unmerged, profile) -> None:
    record = Record(unmerged)
    for moment in (128, 256, 400, 512):
        average, error = record.average(profile, f"{moment}ba"), record.error(profile, f"{moment}ba")
        want = exact(profile, moment)
        distance = (walk()[moment - 1].double() - want).norm()
        assert (average["weight"].double() - want).norm() <= max(2.5 * error, 1e-6) * distance
        assert int(average["steps"]) == moment


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::polyak.PlanWarning")
def test_an_early_average_of_a_merged_record_has_an_error_that_says_so(tmp_path) -> None:
    record = written(tmp_path / "run", per_level=4)
    profile = HalfLife("64ba", unbiased=True)
    early, last = record.moments[4], record.moments[-1]
    average, error = record.average(profile, early), record.error(profile, early)
    want = exact(profile, int(early))
    actual = (average["weight"].double() - want).norm() / (walk()[int(early) - 1].double() - want).norm()
    assert actual / 2.5 < error < 2.5 * actual
    assert error > 3 * record.error(profile, last)


def test_a_moment_may_be_a_share_of_the_record(unmerged) -> None:
    record = Record(unmerged)
    profile = HalfLife("40ba", unbiased=True)
    torch.testing.assert_close(record.average(profile, "50%"), record.average(profile, "256ba"), rtol=0, atol=0)
    assert record.error(profile, "50%") == record.error(profile, "256ba")
    with pytest.raises(TimeError, match="above 0% and at most 100%"):
        record.average(profile, "0%")


def test_moments_are_where_averages_can_end(tmp_path) -> None:
    record = written(tmp_path / "run", per_level=4, interval=4)
    assert record.moments[-1] == Time(LENGTH, "ba")
    assert len(record.moments) == len(record.segments)
    with pytest.raises(TimeError, match="must end where a segment does"):
        record.average(Uniform(), "511ba")


@pytest.fixture
def reads(monkeypatch):
    """How often each tensor of each file was read."""
    found, real = Counter(), SegmentFile.read

    def read(file, name, box=None, before=None):
        found[file._stored[name][0].file.path.name, name, str(box)] += 1
        return real(file, name, box, before)

    monkeypatch.setattr(SegmentFile, "read", read)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("profile", [HalfLife("40ba", unbiased=True), Cooldown("30ba", "1-sqrt")])
def test_an_average_reads_nothing_twice_to_decide_on_its_warning(merged, reads, profile) -> None:
    record = Record(merged)
    if isinstance(profile, Cooldown):
        with pytest.warns(PlanWarning, match="only coarsely"):
            record.average(profile)
    else:
        record.average(profile)
    assert len(reads) == len(record.segments) + 1  # `steps` is read once, from the last
    assert set(reads.values()) == {1}
    before = dict(reads)
    record.error(profile)
    record.error(HalfLife("100ba", unbiased=True))
    assert reads == before


def test_the_error_of_an_earlier_moment_reads_nothing_after_the_average_at_the_end(unmerged, reads) -> None:
    record = Record(unmerged)
    record.average(HalfLife("40ba", unbiased=True))
    before = dict(reads)
    record.error(HalfLife("40ba", unbiased=True), "50%")
    assert reads == before

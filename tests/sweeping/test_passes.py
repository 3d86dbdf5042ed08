"""A sweep reads the files of its record once for as many averages as fit into memory."""

import weakref

import pytest
import torch

from polyak.profiles import HalfLife
from polyak.record import Edge, Record, SegmentFile, Writer
from polyak.storage.safetensors import TensorInfo
from polyak.sweeping import EvaluationError, sweep
from polyak.time import Timestamp

INFOS = {
    "weight": TensorInfo(torch.float16, (3, 7), averaged=True),
    "wide": TensorInfo(torch.float32, (11,), averaged=True),
    "steps": TensorInfo(torch.int64, (), averaged=False),
}
HALF_LIVES = [HalfLife(f"{n}ba", unbiased=True) for n in (4, 8, 16, 32)]


@pytest.fixture
def folder(tmp_path):
    generator = torch.Generator().manual_seed(0)
    with Writer(tmp_path / "run", INFOS, per_level=None) as writer:
        start = Edge(0, Timestamp())
        for _ in range(64):
            end = Edge(start.updates + 2, start.timestamp.to_next_batch(steps=2))
            mean = {n: torch.randn(INFOS[n].shape, generator=generator) for n in ("weight", "wide")}
            writer.append({**mean, "steps": torch.tensor(end.updates)}, start, end)
            start = end
    return tmp_path / "run"


class States:
    """An evaluation that keeps the states it is called with, and may fail once."""

    def __init__(self, fails_at=None):
        self.seen = []
        self.fails_at = fails_at

    def __call__(self, state):
        if len(self.seen) == self.fails_at:
            self.fails_at = None
            raise ZeroDivisionError
        self.seen.append({name: tensor.clone() for name, tensor in state.items()})
        return float(state["weight"].norm())


@pytest.fixture
def reads(monkeypatch):
    """The names of the tensors that were read, once for each read."""
    found, real = [], SegmentFile.read

    def read(file, name, box=None, before=None):
        found.append(name)
        return real(file, name, box, before)

    monkeypatch.setattr(SegmentFile, "read", read)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1 << 22, 360])
@pytest.mark.parametrize("at", [None, ["50%", "100%"]])
def test_a_sweep_evaluates_the_averages_and_errors_of_one_at_a_time_bit_for_bit(folder, monkeypatch, chunk, at) -> None:
    monkeypatch.setattr("polyak.record.combining._CHUNK", chunk)
    evaluate = States()
    results = sweep(folder, evaluate, HALF_LIVES, at=at, refine=2)
    for result, state in zip(results, evaluate.seen, strict=True):
        # As before, when each average was computed alone: the newest mean, which needs no error, then the first.
        alone, moment = Record(folder), result.at
        if result.profile != HALF_LIVES[0] and result.name != "newest mean":
            alone.average(HALF_LIVES[0], moment)
        want = alone.average(result.profile, moment)
        assert state.keys() == want.keys()
        assert all(torch.equal(state[name], want[name]) for name in want)
        assert result.error == alone.error(result.profile, moment)
    assert sum(result.error > 0 for result in results) >= len(HALF_LIVES)


def test_a_sweep_reads_each_file_once_for_all_averages_of_the_grid(folder, reads) -> None:
    record = Record(folder)
    list(record.averages([HalfLife("8ba", unbiased=True)]))
    once = reads.count("weight")
    reads.clear()
    sweep(folder, States(), HALF_LIVES, refine=0)
    distances = 1 + len(HALF_LIVES)  # each result has its distance from the newest mean
    assert reads.count("weight") == once + distances


def test_a_sweep_computes_no_average_that_has_a_result_already(folder, tmp_path, reads) -> None:
    path = tmp_path / "sweep.jsonl"
    sweep(folder, States(), HALF_LIVES, refine=0, results=path)
    reads.clear()
    evaluate = States()
    assert len(sweep(folder, evaluate, HALF_LIVES, refine=0, results=path)) == 5
    assert not evaluate.seen
    assert not reads


@pytest.mark.slow
@pytest.mark.parametrize("fails_at", range(5))
def test_a_sweep_resumes_after_an_error_at_any_point_and_evaluates_nothing_twice(folder, tmp_path, fails_at) -> None:
    want = sweep(folder, States(), HALF_LIVES, refine=0)
    path, evaluate = tmp_path / "sweep.jsonl", States(fails_at)
    with pytest.raises(EvaluationError, match="ZeroDivisionError"):
        sweep(folder, evaluate, HALF_LIVES, refine=0, results=path)
    assert len(path.read_text().splitlines()) == fails_at
    results = sweep(folder, evaluate, HALF_LIVES, refine=0, results=path)
    assert len(evaluate.seen) == len(HALF_LIVES) + 1
    assert [(one.name, one.metrics, one.error, one.distance) for one in results] == [
        (one.name, one.metrics, one.error, one.distance) for one in want
    ]


def test_a_sweep_evaluates_profiles_that_are_given_twice(folder, tmp_path) -> None:
    profiles = [HALF_LIVES[0], HalfLife("4ba", unbiased=True), HALF_LIVES[1]]
    evaluate = States()
    results = sweep(folder, evaluate, profiles, refine=0, results=tmp_path / "sweep.jsonl")
    assert results[1].metrics == results[2].metrics
    assert len(evaluate.seen) == 3
    want = Record(folder).average(HALF_LIVES[1])
    assert torch.equal(evaluate.seen[-1]["weight"], want["weight"])
    sweep(folder, evaluate, profiles, refine=0, results=tmp_path / "sweep.jsonl", fresh=True)
    assert len(evaluate.seen) == 7


def test_a_sweep_holds_no_average_that_was_evaluated(folder) -> None:
    seen = []

    def evaluate(state):
        assert all(one() is None for one in seen)
        seen.append(weakref.ref(state["weight"]))
        return 1.0

    sweep(folder, evaluate, HALF_LIVES, refine=1)
    assert len(seen) >= 1 + len(HALF_LIVES)

"""A sweep over the newest checkpoints evaluates what `average_checkpoints` writes, and reads few files."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyak import ArgumentError, CheckpointError, PlanWarning, sweep_checkpoints
from polyak.checkpoints import average_checkpoints, open_checkpoint
from polyak.checkpoints.newest import Newest, choices
from polyak.checkpoints.running import RunningMean
from polyak.sweeping import EvaluationError
from polyak.sweeping import checkpoints as checkpoints_module

STEPS = range(1, 12)


@pytest.fixture
def paths(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for step in STEPS:
        state = {
            "w": torch.randn(50, generator=generator) * 10.0**step,
            "half": torch.randn(7, generator=generator).bfloat16(),
            "zero": torch.tensor([-0.0, 0.0]),
            "c": torch.randn(3, generator=generator, dtype=torch.complex64),
            "n": torch.tensor(step),
        }
        torch.save(state, tmp_path / f"step-{step}.pt")
    return [tmp_path / f"step-{step}.pt" for step in reversed(STEPS)]  # in any order


def test_each_mean_of_a_sweep_has_the_bits_of_the_average_that_is_written(paths, tmp_path) -> None:
    seen = []

    def loss(state) -> float:
        seen.append(state)
        return abs(len(seen) - 5)

    found = sweep_checkpoints(paths, loss, spacings=[1, 2, 3])
    assert len(seen) == len(found.tried) == len({one.which for one in found.tried})
    for state, one in zip(seen, found.tried, strict=True):
        chosen = [f"step-{step}.pt" for step in one.which.of(STEPS)]
        assert [checkpoint.path.name for checkpoint in one.plan.checkpoints] == chosen
        out = tmp_path / "out.pt"
        average_checkpoints([tmp_path / name for name in chosen], out, overwrite=True)
        written = torch.load(out)
        assert written.keys() == state.keys()
        for name, tensor in written.items():
            assert tensor.dtype == state[name].dtype
            assert torch.equal(*(one.reshape(-1).view(torch.uint8) for one in (tensor, state[name]))), name
    assert found.best is found.tried[4]
    found.write(tmp_path / "best.pt")
    assert torch.equal(torch.load(tmp_path / "best.pt")["w"], seen[4]["w"])


def test_each_checkpoint_is_read_once_for_each_spacing_at_most(paths, monkeypatch) -> None:
    read: list[str] = []
    add = RunningMean.add
    monkeypatch.setattr(RunningMean, "add", lambda self, one: (read.append(one.path.name), add(self, one))[1])
    found = sweep_checkpoints(paths, lambda state: float(state["w"].sum()), spacings=[1, 2, 4])
    assert len(found.tried) > 10
    assert max(read.count(name) for name in read) <= 3
    assert len(read) == 11 + 6 + 3


def test_a_sweep_that_was_stopped_reuses_its_results_and_reads_only_what_it_needs(paths, tmp_path, monkeypatch) -> None:
    results, calls = tmp_path / "results.jsonl", []

    def evaluate(state) -> float:
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return float(state["w"].double().norm())

    stop = 4
    with pytest.raises(KeyboardInterrupt):
        sweep_checkpoints(paths, evaluate, results=results)
    stop = -1
    found = sweep_checkpoints(paths, evaluate, results=results)
    assert len(calls) == len(found.tried) + 1
    read: list[str] = []
    monkeypatch.setattr(RunningMean, "add", lambda self, one: read.append(one.path.name))
    again = sweep_checkpoints(paths, evaluate, results=results)
    assert (read, again.best.which, len(calls)) == ([], found.best.which, len(found.tried) + 1)
    assert len(results.read_text().splitlines()) == len(found.tried)


def test_results_of_other_checkpoints_or_another_evaluation_are_not_reused(paths, tmp_path, monkeypatch) -> None:
    results, calls = tmp_path / "results.jsonl", []

    def evaluate(state) -> float:
        calls.append(1)
        return 1.0

    sweep_checkpoints(paths, evaluate, counts=[1, 2], spacings=[1], results=results)
    torch.save(torch.load(paths[0]), paths[0])  # the newest was saved again
    sweep_checkpoints(paths, evaluate, counts=[1, 2], spacings=[1], results=results)
    assert len(calls) == 4
    sweep_checkpoints(paths, evaluate, counts=[1, 2], spacings=[1], results=results, fresh=True)
    assert len(calls) == 6

    monkeypatch.setattr(checkpoints_module, "source_hash", lambda function: "another source")
    with pytest.warns(PlanWarning, match="the source of .*evaluate has changed"):
        sweep_checkpoints(paths, evaluate, counts=[1, 2], spacings=[1], results=results)
    assert len(calls) == 8


def test_equal_values_choose_the_fewest_checkpoints_and_nan_is_never_best(paths) -> None:
    found = sweep_checkpoints(paths, lambda state: 1.0, spacings=[1])
    assert found.best.which == Newest(1)
    values = iter([float("nan"), 3.0, 2.0])
    found = sweep_checkpoints(
        paths, lambda state: {"accuracy": next(values)}, counts=[1, 2, 3], spacings=[1], maximize=True
    )
    assert found.best.which == Newest(2)
    with pytest.raises(EvaluationError, match=r"got NaN for all 1\); check the evaluation"):
        _ = sweep_checkpoints(paths, lambda state: float("nan"), counts=[1]).best


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"counts": [12]}, r"at most the number of checkpoints \(got 12 for 11\)"),
        ({"counts": []}, "counts must be whole numbers of at least 1"),
        ({"spacings": [0]}, r"spacings must be whole numbers of at least 1 \(got \[0\]\)"),
        ({"counts": [1.5]}, "counts must be whole numbers"),
    ],
    ids=str,
)
def test_a_wrong_number_or_distance_is_refused(paths, options, said) -> None:
    with pytest.raises(ArgumentError, match=said):
        sweep_checkpoints(paths, lambda state: 1.0, **options)


def test_a_failed_evaluation_names_the_mean_and_keeps_earlier_results(paths, tmp_path) -> None:
    def evaluate(state) -> float:
        if int(state["n"]) and torch.equal(state["w"], torch.load(paths[0])["w"]):
            return 1.0
        raise KeyError("model")

    with pytest.raises(EvaluationError, match="evaluating last 2 failed: KeyError: 'model'"):
        sweep_checkpoints(paths, evaluate, results=tmp_path / "r.jsonl")
    assert [json.loads(line)["name"] for line in (tmp_path / "r.jsonl").read_text().splitlines()] == ["newest"]


def test_a_checkpoint_with_nan_is_named(paths) -> None:
    state = torch.load(paths[3])
    torch.save({**state, "w": state["w"] * torch.nan}, paths[3])
    with pytest.raises(CheckpointError, match=r"w in .*step-8.pt has NaN\); leave it out"):
        sweep_checkpoints(paths, lambda state: 1.0)


@given(st.integers(1, 60), st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_choices_are_different_sets_of_checkpoints_that_exist(total, spacings) -> None:
    found = choices(total, spacings=spacings)
    taken = [tuple(one.of(range(total))) for one in found]
    assert len({*taken}) == len(taken)
    assert all(len(inside) == one.count and inside[-1] == total - 1 for one, inside in zip(found, taken, strict=True))


def test_open_checkpoints_are_taken_as_they_are(paths) -> None:
    opened = [open_checkpoint(path) for path in paths]
    assert sweep_checkpoints(opened, lambda state: 1.0, counts=[1]).best.plan.newest.path.name == "step-11.pt"

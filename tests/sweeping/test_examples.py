"""Losses of single examples: intervals, and which half-lives are as good as the best."""

import json
import random

import pytest
import torch
from records import build, data, record

from polyak.report.text import as_good
from polyak.sweeping import EvaluationError, sweep
from polyak.sweeping.examples import interval, is_worse


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples") / "run"
    record(folder)
    return folder


def losses(state):
    model = build().eval()
    model.load_state_dict(state)
    with torch.no_grad():
        return torch.cat([(model(x) - y).square().flatten() for x, y in data(seed=1, batches=8)])


def test_the_interval_of_a_mean_holds_it_in_about_95_of_100_samples() -> None:
    generator = random.Random(0)
    for size in (4, 30):
        held = 0
        for _ in range(2000):
            low, high = interval([generator.gauss(1.0, 2.0) for _ in range(size)])
            held += low <= 1.0 <= high
        assert 0.93 < held / 2000 < 0.97, size
    assert interval([1.0]) is None


def test_a_small_paired_difference_is_seen_where_the_intervals_of_the_means_overlap() -> None:
    generator = random.Random(0)
    best = [generator.gauss(5.0, 3.0) for _ in range(200)]
    worse = [value + 0.1 + generator.gauss(0.0, 0.2) for value in best]
    assert interval(best)[1] > interval(worse)[0]
    assert is_worse(worse, best, maximize=False)
    assert not is_worse(best, worse, maximize=False)
    assert is_worse(best, worse, maximize=True)
    assert not is_worse(best, best, maximize=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "form", [lambda loss: loss, lambda loss: loss.tolist(), lambda loss: loss.numpy()], ids=["tensor", "list", "array"]
)
def test_a_tensor_a_list_and_an_array_of_losses_count_as_their_mean(folder, form) -> None:
    results = sweep(folder, lambda state: {"loss": form(losses(state))}, points=3, refine=0)
    plain = sweep(folder, lambda state: {"loss": losses(state).double().mean()}, points=3, refine=0)
    assert [one.metrics["loss"] for one in results] == pytest.approx([one.metrics["loss"] for one in plain])
    assert len(results[0].examples["loss"]) == 64
    low, high = results[0].interval()
    assert low < results[0].metrics["loss"] < high
    assert plain[0].interval() is None
    assert as_good(plain) == ""


def test_half_lives_whose_losses_do_not_differ_are_as_good_as_the_best_and_worse_ones_are_not(folder) -> None:
    half_lives = iter([None, 4.0, 16.0, 64.0, 128.0])
    noise = [random.Random(n).gauss(0.0, 1.0) for n in range(100)]

    def evaluate(state):
        half_life = next(half_lives)
        worse = 0.0 if half_life in {16.0, 64.0} else 1.0
        return {"loss": [10 + worse + value + (half_life == 64.0) * 0.01 * (-1) ** n for n, value in enumerate(noise)]}

    from polyak.profiles import HalfLife

    results = sweep(folder, evaluate, [HalfLife(f"{n}ba", unbiased=True) for n in (4, 16, 64, 128)], refine=0)
    assert [str(one.half_life) for one in results.as_good] == ["16ba", "64ba"]
    assert (
        as_good(results)
        == "As good as the best: 16ba to 64ba, by the paired difference over 100 examples (95 % interval)."
    )
    assert "95 % interval" in results.table()


def test_the_losses_of_examples_are_kept_in_the_results_file(folder, tmp_path) -> None:
    path, calls = tmp_path / "sweep.jsonl", []

    def evaluate(state):
        calls.append(1)
        return {"loss": losses(state)}

    first = sweep(folder, evaluate, points=3, refine=0, results=path)
    again = sweep(folder, evaluate, points=3, refine=0, results=path)
    assert len(calls) == 4
    assert [one.examples["loss"] for one in again] == [pytest.approx(one.examples["loss"]) for one in first]
    assert again.as_good == again.as_good != []
    assert len(json.loads(path.read_text().splitlines()[0])["examples"]["loss"]) == 64


def test_an_evaluation_of_other_examples_each_time_is_an_error(folder) -> None:
    sizes = iter(range(10, 20))
    with pytest.raises(EvaluationError, match=r"loss for the same examples each time \(got 11 for .*, 10 before\)"):
        sweep(folder, lambda _: {"loss": [1.0] * next(sizes)})


def test_an_infinite_loss_of_an_example_is_never_the_best(folder) -> None:
    values = iter([[1.0, float("inf")], [1.0, 2.0], [3.0, 4.0]])
    results = sweep(folder, lambda _: {"loss": next(values)}, points=2, refine=0)
    assert results[0].examples == {}
    assert results.best.metrics["loss"] == 1.5

"""``sweep`` as a notebook calls it, and its parts."""

import json
import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from records import build, data, record, validate
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.optim import swa_utils

from polyak.errors import PlanWarning, PolyakError, ProfileError, RecordError
from polyak.profiles import HalfLife, PowerFunction, Uniform, Window
from polyak.record import Record, Writer
from polyak.storage.safetensors import TensorInfo
from polyak.sweeping import EvaluationError, best, export, finest_half_life, grid, narrowed, newest, sweep, value_of
from polyak.time import Time, TimeUnit


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep") / "run"
    save_file(record(folder).state_dict(), folder.parent / "raw.safetensors")
    return folder


class Counting:
    """An evaluation that counts its calls."""

    def __init__(self, function=validate) -> None:
        self.calls = 0
        self._function = function

    def __call__(self, state):
        self.calls += 1
        return self._function(state)


@pytest.mark.slow
def test_the_grid_goes_from_the_finest_half_life_to_the_whole_run(folder) -> None:
    spans = [float(profile.span) for profile in grid(Record(folder), 5)]
    assert spans[0] == Record(folder).finest == 2
    assert spans[-1] == 256
    ratios = [b / a for a, b in pairwise(spans)]
    assert max(ratios) / min(ratios) < 1.02
    assert [float(profile.span) for profile in grid(Record(folder), 2)] == [2, 256]


def test_a_grid_can_be_in_any_unit(folder) -> None:
    profiles = grid(Record(folder), 3, TimeUnit.SAMPLE)
    assert [str(profile.span) for profile in profiles][::2] == ["16sp", "2048sp"]
    assert float(finest_half_life(Record(folder), TimeUnit.EPOCH).span) == pytest.approx(2 / 50)


def test_the_grid_of_a_short_record_starts_with_a_half_life_that_the_record_resolves(tmp_path) -> None:
    record(tmp_path / "run", updates=8)
    short = Record(tmp_path / "run")
    finest = finest_half_life(short)
    assert 2 <= float(finest.span) < 4
    short.error(finest)
    assert len(sweep(short, lambda _: 1.0, points=3, refine=0)) == 4


def test_sweep_refuses_a_record_that_resolves_no_half_life(tmp_path) -> None:
    record(tmp_path / "run", updates=2)
    with pytest.raises(ProfileError, match="must resolve at least one half-life"):
        sweep(tmp_path / "run", validate)
    with Writer(tmp_path / "empty", {"w": TensorInfo(torch.float32, (1,), averaged=True)}):
        pass
    with pytest.raises(ProfileError, match="at least one segment for a sweep"):
        sweep(tmp_path / "empty", validate)
    assert len(sweep(tmp_path / "run", validate, [])) == 1


@given(
    optimum=st.floats(0.0, 6.0),
    curvature=st.floats(0.1, 10.0),
    points=st.integers(3, 12),
    maximize=st.booleans(),
)
@settings(deadline=None)
def test_narrowed_ends_near_the_best_half_life_of_a_smooth_metric(optimum, curvature, points, maximize) -> None:
    def metric(half_life: float) -> float:
        value = curvature * (math.log(half_life) - optimum) ** 2
        return -value if maximize else value

    values = {x: metric(x) for x in (math.exp(6.0 * i / (points - 1)) for i in range(points))}
    for _ in range(40):
        following = narrowed(values, maximize=maximize)
        if following is None:
            break
        assert following not in values
        values[following] = metric(following)
    assert following is None
    found = (max if maximize else min)(values, key=values.get)
    assert abs(math.log(found) - optimum) < 0.15


def test_narrowed_returns_none_for_fewer_than_two_half_lives_and_for_nan_alone() -> None:
    assert narrowed({}) is None
    assert narrowed({1: 2.0}) is None
    assert narrowed({1: math.nan, 10: math.nan}) is None
    assert 10 < narrowed({1: math.nan, 10: 1.0, 100: 2.0}) < 100


def test_sweep_evaluates_the_averages_that_the_record_gives(folder) -> None:
    results = sweep(folder, validate, points=4, refine=2, others={"raw": folder.parent / "raw.safetensors"})
    names = [result.name for result in results]
    assert names[:2] == ["raw", "newest mean"]
    assert names[2:6] == ["half-life 2ba", "half-life 10.1ba", "half-life 50.8ba", "half-life 256ba"]
    assert len(names) == len(set(names)) == 8
    for result in results[1:]:
        assert result.metrics["loss"] == float(validate(Record(folder).average(result.profile))["loss"])
        assert result.error == Record(folder).error(result.profile)
    assert results[0].metrics["loss"] == float(validate(load_file(folder.parent / "raw.safetensors"))["loss"])
    assert (results[0].profile, results[0].error, results[0].distance) == (None, None, None)
    assert results[1].distance == results[1].error == 0
    distances = [result.distance for result in results[2:6]]
    assert distances == sorted(distances)
    chosen = best(results)
    assert value_of(chosen) == min(value_of(result, "loss") for result in results[1:])
    assert best(results, "accuracy", maximize=True) is chosen


def test_sweep_evaluates_given_profiles_instead_of_the_grid(folder) -> None:
    profiles = [Window("64ba"), PowerFunction(sigma_rel=0.1), Uniform("1ep"), HalfLife("1ep", unbiased=True)]
    results = sweep(folder, validate, profiles)
    assert [result.name for result in results] == [
        "newest mean",
        "window 64ba",
        "power function 0.1",
        "uniform from 1ep",
        "half-life 1ep",
    ]
    with pytest.raises(ProfileError, match="finer than the record"):
        sweep(folder, Counting(), [HalfLife("16ba"), HalfLife("1ba")])


def test_the_newest_mean_is_the_mean_of_the_last_segment(folder) -> None:
    one = Record(folder)
    with one.open(one.stretches[-1]) as file:
        assert torch.allclose(one.average(newest(one))["0.weight"], file.read("0.weight"))


def test_sweep_does_not_repeat_the_evaluations_in_the_results_file(folder, tmp_path) -> None:
    evaluate, path = Counting(), tmp_path / "new" / "sweep.jsonl"
    options = {"points": 4, "refine": 2, "results": path, "others": {"raw": folder.parent / "raw.safetensors"}}
    first = sweep(folder, evaluate, **options)
    assert evaluate.calls == len(first) == 8
    content = path.read_bytes()
    again = sweep(folder, evaluate, **options)
    assert evaluate.calls == 8
    assert path.read_bytes() == content
    assert [(one.name, one.profile, one.metrics) for one in again] == [
        (one.name, one.profile, one.metrics) for one in first
    ]
    sweep(folder, evaluate, **(options | {"points": 5, "refine": 0}))
    assert evaluate.calls == 8 + 3
    assert len(path.read_text().splitlines()) == 11


def test_sweep_repeats_the_evaluation_of_an_incomplete_line(folder, tmp_path) -> None:
    path = tmp_path / "sweep.jsonl"
    sweep(folder, Counting(), points=3, refine=0, results=path)
    complete = path.read_bytes()
    for cut in (1, 40):
        path.write_bytes(complete[:-cut])
        evaluate = Counting()
        sweep(folder, evaluate, points=3, refine=0, results=path)
        assert evaluate.calls == 1
        assert [json.loads(line)["name"] for line in path.read_text().splitlines()] == [
            json.loads(line)["name"] for line in complete.splitlines()
        ]


def test_sweep_evaluates_again_after_the_record_has_grown(tmp_path) -> None:
    path = tmp_path / "sweep.jsonl"
    for updates in (64, 66):
        evaluate = Counting()
        record(tmp_path / f"run-{updates}", updates=updates)
        sweep(tmp_path / f"run-{updates}", evaluate, [HalfLife("8ba")], refine=0, results=path)
        assert evaluate.calls == 2


def test_sweep_evaluates_again_for_another_function_and_for_changed_source(folder, tmp_path) -> None:
    path = tmp_path / "sweep.jsonl"
    evaluate = Counting()
    sweep(folder, partial(validate), points=2, refine=0, results=path)
    sweep(folder, evaluate, points=2, refine=0, results=path)
    assert evaluate.calls == 3
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line | {"code": "0123"}) + "\n" for line in lines))
    with pytest.warns(PlanWarning, match="the source of validate has changed") as caught:
        sweep(folder, validate, points=2, refine=0, results=path)
    assert caught[0].filename == __file__  # where it is called
    assert [json.loads(line)["code"] for line in path.read_text().splitlines()[6:]] == [lines[0]["code"]] * 3
    sweep(folder, validate, points=2, refine=0, results=path)
    assert len(path.read_text().splitlines()) == 9


def test_the_error_of_a_failing_evaluation_names_the_average_and_earlier_results_are_kept(folder, tmp_path) -> None:
    path = tmp_path / "sweep.jsonl"
    fails = [True]

    def evaluate(state):
        if fails[0] and len(path.read_text().splitlines()) == 3:
            raise ZeroDivisionError("too bad")
        return 1.0

    with pytest.raises(EvaluationError, match=r"half-life 22.6ba failed: ZeroDivisionError: too bad \(.*line \d+\)"):
        sweep(folder, evaluate, [HalfLife("5ba"), HalfLife("10ba"), HalfLife("22.6ba")], results=path)
    assert len(path.read_text().splitlines()) == 3
    fails[0] = False
    assert len(sweep(folder, evaluate, [HalfLife("22.6ba")], refine=0, results=path)) == 2


@pytest.mark.parametrize("returned", [None, "much", {}, {"loss": None}, torch.ones(2, 2), [], ["much"]], ids=str)
def test_an_evaluation_must_return_numbers(folder, returned) -> None:
    with pytest.raises(EvaluationError, match="must return a number, or a dict of numbers"):
        sweep(folder, lambda _: returned)


def test_nan_and_inf_are_never_the_best(folder, tmp_path) -> None:
    values = iter([math.nan, 3.0, math.inf, 2.0])
    path = tmp_path / "sweep.jsonl"
    profiles = [HalfLife("4ba"), HalfLife("8ba"), HalfLife("16ba")]
    results = sweep(folder, lambda _: next(values), profiles, refine=0, results=path)
    assert best(results).name == "half-life 16ba"
    assert "NaN" not in path.read_text()
    assert "Infinity" not in path.read_text()
    with pytest.raises(EvaluationError, match="must be a number for at least one average"):
        best(sweep(folder, lambda _: math.nan, points=3))


def test_sweep_refuses_a_missing_metric_after_the_first_evaluation(folder) -> None:
    evaluate = Counting()
    with pytest.raises(EvaluationError, match=r"\(got acc\); use loss or accuracy"):
        sweep(folder, evaluate, metric="acc", maximize=True)
    assert evaluate.calls == 1


@pytest.mark.parametrize("line", ["{", "[]", '{"key": 1}', '{"metrics": {"a": "x"}}'])
def test_sweep_refuses_a_file_that_is_not_of_results(folder, tmp_path, line) -> None:
    (tmp_path / "sweep.jsonl").write_text(f"{line}\n")
    with pytest.raises(EvaluationError, match="line 1 of .* must be a result of a sweep"):
        sweep(folder, validate, results=tmp_path / "sweep.jsonl")


def test_sweep_refuses_a_results_file_that_another_sweep_is_writing(folder, tmp_path) -> None:
    path = tmp_path / "sweep.jsonl"

    def evaluate(_):
        sweep(folder, validate, results=path)

    with pytest.raises(EvaluationError, match="another sweep is writing"):
        sweep(folder, evaluate, results=path)


@pytest.mark.parametrize("name", ["missing", "foreign"])
def test_sweep_refuses_missing_and_corrupt_files_of_other_weights(folder, tmp_path, name) -> None:
    (tmp_path / "foreign").write_text("not safetensors")
    with pytest.raises(RecordError, match="raw weights must be a safetensors file"):
        sweep(folder, validate, others={"raw": tmp_path / name})


def test_sweep_refuses_points_and_refine_that_are_out_of_range(folder) -> None:
    for options in ({"points": 1}, {"refine": -1}):
        with pytest.raises(PolyakError, match="at least"):
            sweep(folder, validate, **options)


def test_progress_is_called_before_each_evaluation(folder) -> None:
    seen = []
    results = sweep(folder, validate, points=3, refine=2, progress=lambda *args: seen.append(args))
    assert [name for _, _, name in seen] == [result.name for result in results]
    assert [done for done, _, _ in seen] == list(range(len(results)))
    assert {total for _, total, _ in seen} == {6}


def test_sweep_recomputes_batchnorm_statistics_as_torch_does(folder, tmp_path) -> None:
    loader = data(batches=6)
    profile = HalfLife("16ba", unbiased=True)
    model = build()
    model.load_state_dict(Record(folder).average(profile))
    swa_utils.update_bn(loader, model)
    seen = {}

    def evaluate(state):
        seen.update({name: value.clone() for name, value in state.items()})
        return 1.0

    used = build()
    results = sweep(folder, evaluate, [profile], refine=0, batchnorm=(used, loader), results=tmp_path / "a.jsonl")
    assert used.training
    assert all(torch.equal(value, seen[name]) for name, value in model.state_dict().items())
    export(Record(folder), results[-1].profile, tmp_path / "best.safetensors", (build(), loader))
    saved = load_file(tmp_path / "best.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    with safe_open(tmp_path / "best.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["polyak.profile"] == repr(profile)
    assert metadata["polyak.batchnorm"] == "recomputed"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "best.safetensors"]
    # Other statistics are another evaluation.
    again = Counting(lambda _: 1.0)
    sweep(folder, again, [profile], refine=0, results=tmp_path / "a.jsonl")
    assert again.calls == 2


def test_the_error_of_an_exhausted_loader_names_batchnorm(folder) -> None:
    with pytest.raises(EvaluationError, match="recomputing BatchNorm for newest mean failed: ValueError.*read before"):
        sweep(folder, validate, points=2, batchnorm=(build(), iter([])))


def test_refined_half_lives_have_the_unit_of_the_given_ones(folder) -> None:
    results = sweep(folder, validate, [HalfLife(Time(n, TimeUnit.EPOCH), unbiased=True) for n in (0.2, 1, 5)], refine=2)
    assert all(one.profile.span.unit is TimeUnit.EPOCH for one in results[1:])
    assert len(results) == 6

"""What ``sweep`` returns: a list, with the best, a table and a report."""

import sys

import pytest
import torch
from records import build, data, record, validate
from safetensors.torch import save_file

from polyak import attach
from polyak.errors import MissingExtraError, PolyakError, ProfileError, TimeError
from polyak.profiles import HalfLife, Window
from polyak.record import Record, Recorder
from polyak.sweeping import best, export, sweep
from polyak.time import Time, TimeUnit


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outcome") / "run"
    record(folder)
    return folder


@pytest.fixture(scope="module")
def results(folder):
    return sweep(folder, validate, points=4, refine=1)


@pytest.mark.slow
def test_the_result_of_a_sweep_is_the_list_that_it_was(results) -> None:
    assert isinstance(results, list)
    assert len(results) == 6
    assert results.best is best(results, "loss")
    assert [one.name for one in results[:2]] == ["newest mean", "half-life 2ba"]
    assert [one.name for one in results] == [one.name for one in list(results)]
    assert (
        repr(results)
        == f"<SweepResult of run: 6 results, best {results.best.name} with loss {results.best.metrics['loss']:.4g}>"
    )


def test_a_sweep_without_a_number_has_a_representation_and_a_table(folder) -> None:
    results = sweep(folder, lambda _: float("nan"), points=2, refine=0)
    assert repr(results) == "<SweepResult of run: 3 results, none with a number>"
    assert "NaN" in results.table()


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_the_table_fits_the_width_and_has_every_result(results, width) -> None:
    text = results.table(width)
    assert max(map(len, text.splitlines())) <= width
    assert all(one.name in text for one in results)
    assert text.count("(best)") == 1


def test_the_table_lists_half_lives_by_their_length(folder) -> None:
    profiles = [HalfLife("20ba", unbiased=True), Window("64ba"), HalfLife("4ba", unbiased=True)]
    lines = sweep(folder, validate, profiles, refine=0).table(100).splitlines()
    assert [line.split("  ")[0].removesuffix(" (best)") for line in lines[2:]] == [
        "newest mean",
        "window 64ba",
        "half-life 4ba",
        "half-life 20ba",
    ]


def test_report_writes_a_page_and_replaces_one_only_if_it_is_told_to(results, tmp_path) -> None:
    page = results.report(tmp_path / "new" / "out")
    assert page.read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in page.parent.iterdir()) == ["report.html", "sweep.png", "sweep.svg"]
    with pytest.raises(PolyakError, match="pass overwrite=True"):
        results.report(page.parent)
    page.write_text("old")
    assert results.report(page.parent, overwrite=True) == page
    assert page.read_text() != "old"


@pytest.mark.parametrize("module", ["plotly", "matplotlib"])
def test_report_names_the_package_that_is_missing(results, tmp_path, monkeypatch, module) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"missing: {module}\).*pip install 'polyak\[report\]'"):
        results.report(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_several_end_moments_are_evaluated_each_with_its_own_grid(folder, tmp_path) -> None:
    results = sweep(folder, validate, at=["75%", "100%"], points=3, refine=1)
    moments = [Time(192, TimeUnit.BATCH), Time(256, TimeUnit.BATCH)]
    assert results.moments == moments
    for moment in moments:
        part = results.at(moment)
        assert len(part) == 5
        longest = max(float(one.half_life) for one in part if one.half_life is not None)
        assert longest == float(moment)
        for one in part:
            average = Record(folder).average(one.profile, moment)
            assert one.metrics["loss"] == float(validate(average)["loss"])
    assert results.best.metrics["loss"] == min(one.metrics["loss"] for one in results)
    assert f"{results.best.name} at {results.best.at} (best)" in results.table()
    export(Record(folder), results.best.profile, tmp_path / "best.safetensors", at=results.best.at)
    assert results.report(tmp_path).is_file()


@pytest.mark.parametrize(
    "at", ["0.75dur,1dur", "192ba,256ba", [Time(192, TimeUnit.BATCH), "100%"], "100%,74%", ["256ba", "192ba", "75%"]]
)
def test_moments_are_given_in_any_form_and_their_order_does_not_count(folder, at) -> None:
    assert sweep(folder, validate, at=at, points=2, refine=0).moments == [
        Time(192, TimeUnit.BATCH),
        Time(256, TimeUnit.BATCH),
    ]


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ("191ba", r"end of a segment \(got 191ba\); near it are 128ba, 160ba, 192ba, 200ba|near it are"),
        ("0%", "above 0% and at most 100%"),
        ("x%", "above 0% and at most 100%"),
        ("soon", "a share of the record such as 50%, or a time"),
        ([], "at least one moment"),
    ],
)
def test_a_moment_that_is_none_is_an_error(folder, at, message) -> None:
    with pytest.raises(TimeError, match=message):
        sweep(folder, validate, at=at)


def test_the_error_of_a_moment_too_early_for_any_half_life_names_it(folder) -> None:
    with pytest.raises(ProfileError, match="at 32ba: the record must resolve at least one half-life"):
        sweep(folder, validate, at="10%")


def test_the_raw_weights_that_a_record_keeps_are_evaluated_first_unless_others_are_given(tmp_path) -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with attach(Recorder(tmp_path / "run", "2ba"), model, optimizer):
        for inputs, targets in data(batches=40):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(inputs), targets).backward()
            optimizer.step()
    if getattr(Record(tmp_path / "run"), "raw", None) is None:
        pytest.skip("this version of the record does not keep the raw weights")
    seen = []
    path = tmp_path / "sweep.jsonl"
    for _ in range(2):
        results = sweep(
            tmp_path / "run",
            validate,
            points=2,
            refine=0,
            results=path,
            progress=lambda done, total, name: seen.append((done, total, name)),
        )
        assert [one.name for one in results[:2]] == ["raw", "newest mean"]
        assert results[0].metrics["loss"] == pytest.approx(float(validate(model.state_dict())["loss"]), rel=1e-6)
    assert seen[:2] == [(0, 4, "raw"), (1, 4, "newest mean")]
    assert len(path.read_text().splitlines()) == 4
    save_file(build().state_dict(), tmp_path / "given.safetensors")
    given = sweep(tmp_path / "run", validate, points=2, refine=0, others={"raw": tmp_path / "given.safetensors"})
    assert [one.name for one in given].count("raw") == 1
    assert given[0].metrics["loss"] == pytest.approx(float(validate(build().state_dict())["loss"]))

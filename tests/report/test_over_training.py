"""Charts over training: the curves of ``polyak watch``, and the heat map of half-life and moment."""

import math

import pytest
from records import record, validate

from polyak.record import Record
from polyak.report.charts import DARK, LIGHT
from polyak.report.over_training import sweep_panels, watched_panels
from polyak.report.page import page
from polyak.report.watch_page import watch_page
from polyak.report.written import numbers
from polyak.sweeping import sweep
from polyak.time import Timestamp
from polyak.watching import Log, Moment, Reading


def moment(updates, best=1 / 16, *, raw=None, metric="loss", folder="/run"):
    readings = [Reading("newest", None, "newest mean", {metric: 2.0})]
    if raw is not None:
        readings.insert(0, Reading("raw", None, "raw weights", {metric: raw}))
    for share in (1 / 64, 1 / 16, 1 / 4):
        value = 1.0 + abs(math.log(share / best)) / 10
        readings.append(Reading("half_life", share, f"half-life {updates * share}ba", {metric: value}, 0.01))
    readings.append(Reading("cooldown", 0.1, "cooldown", {metric: 1.2}))
    now = Timestamp().to_next_batch(steps=updates)
    return Moment(updates, now, metric, False, tuple(readings), record=folder)


MOMENTS = [moment(100), moment(200, best=1 / 4), moment(300, raw=2.5)]


def test_the_curves_have_a_line_for_each_kind_of_weights() -> None:
    curves, _ = watched_panels(MOMENTS)
    lines = {one.name: list(one.y) for one in curves.figure.data}
    assert list(lines) == ["raw", "newest mean", "half-life T/16", "best half-life", "cooldown 10%"]
    assert lines["raw"] == [None, None, 2.5]
    assert lines["best half-life"] == [1.0, 1.0, 1.0]


def test_the_heat_map_has_the_distance_from_the_best_of_each_moment() -> None:
    _, heat = watched_panels(MOMENTS)
    cells, rings = heat.figure.data
    assert [list(row) for row in zip(*cells.z, strict=True)][1][2] == 0
    assert list(rings.y) == [1 / 16, 1 / 4, 1 / 16]
    assert list(cells.x) == [100, 200, 300]


def test_one_moment_has_no_heat_map() -> None:
    assert [one.name for one in watched_panels(MOMENTS[:1])] == ["watched"]


def test_the_page_of_watch_shows_hostile_names_as_text() -> None:
    text = watch_page([moment(n, metric="<script>alert(1)</script>", folder="/<b>run") for n in (100, 200)])
    assert "<script>alert" not in text
    assert "<b>run" not in text
    assert "https://" not in text.partition("<script>")[0]


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    run = tmp_path_factory.mktemp("over") / "run"
    record(run, per_level=None)
    return sweep(Record(run), validate, points=4, refine=0, at=["25%", "50%", "100%"])


@pytest.mark.slow
def test_a_sweep_of_several_moments_has_a_heat_map_on_its_page(several) -> None:
    moments = [numbers(several, one) for one in several.moments]
    (heat,) = sweep_panels(moments)
    cells, rings = heat.figure.data
    assert list(cells.x) == [64, 128, 256]
    assert max(cells.y) == pytest.approx(1)
    for number, one in zip(rings.y, moments, strict=True):
        best = min(one.line, key=lambda point: point[1])
        assert number == pytest.approx(best[0] / one.edges[-1])
    assert 'id="heatmap-chart"' in page(*moments)
    assert sweep_panels(moments[:1]) == []


@pytest.mark.slow
def test_the_page_of_a_sweep_shows_what_watch_has_read_into_its_folder(several, tmp_path) -> None:
    here, other = str(several.record.folder), "/another"
    with Log(tmp_path / "watch.jsonl") as log:
        for one in (moment(100, folder=here), moment(200, folder=here), moment(300, folder=other)):
            log.add(one)
    text = several.report(tmp_path).read_text(encoding="utf-8")
    assert 'id="watched-chart"' in text
    assert "loss over training in 2 moments" in text
    assert 'id="watched-chart"' not in several.report(tmp_path / "elsewhere").read_text(encoding="utf-8")


def test_the_colours_over_training_are_those_that_the_dark_page_replaces() -> None:
    for panel in watched_panels(MOMENTS):
        for trace in panel.figure.data:
            if trace.line.color if trace.type == "scatter" and trace.mode != "markers" else None:
                assert trace.line.color in LIGHT.values()
    assert LIGHT.keys() == DARK.keys()

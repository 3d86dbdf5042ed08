"""The numbers and the matplotlib figure of the demo."""

import math
import subprocess
import sys

import matplotlib as mpl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyak.profiles import HalfLife, PowerFunction, Smoothing, Uniform, Warmup
from polyak.report.figures import Comparison, comparison, percent, render
from polyak.report.series import Curve, median_update, read_curves, update_shares

PROFILES = [
    HalfLife("7ba"),
    HalfLife("7ba", unbiased=True),
    HalfLife("0ba"),
    HalfLife("infba"),
    Smoothing(0.9),
    Uniform(),
    PowerFunction(sigma_rel=0.1),
    Warmup(Smoothing(0.99)),
]


@pytest.mark.slow
@pytest.mark.parametrize("profile", PROFILES, ids=repr)
@settings(deadline=None)
@given(steps=st.lists(st.floats(0.1, 50), min_size=1, max_size=20), data=st.data())
def test_the_shares_of_the_updates_give_the_online_average(profile, steps, data) -> None:
    moments = [math.fsum(steps[: i + 1]) for i in range(len(steps))]
    weights = data.draw(st.lists(st.floats(-1, 1), min_size=len(steps), max_size=len(steps)))
    average = weights[0]
    for before, now, weight in zip(moments, moments[1:], weights[1:], strict=False):
        average += (1 - profile.decay(before, now)) * (weight - average)
    shares = update_shares(profile, moments)
    assert math.fsum(shares) == pytest.approx(1)
    assert math.fsum(s * w for s, w in zip(shares, weights, strict=True)) == pytest.approx(average, abs=1e-9)


@settings(deadline=None)
@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=30))
def test_half_of_the_average_is_at_least_as_new_as_the_median_update(amounts) -> None:
    shares = [amount / math.fsum(amounts) for amount in amounts]
    middle = median_update(shares)
    assert math.fsum(shares[middle:]) >= 0.5 - 1e-9
    assert math.fsum(shares[middle + 1 :]) < 0.5 + 1e-9


def test_half_of_the_average_is_in_as_many_steps_as_the_half_life() -> None:
    shares = update_shares(HalfLife("100ba"), range(1, 1001))
    assert len(shares) - median_update(shares) == 100


def test_read_curves_returns_curves_by_name_and_the_last_value_of_a_batch(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"batch": 2, "a": 1}\n{"batch": 1, "a": 2, "b": 3}\n{"batch": 2, "a": 4}\n')
    assert read_curves(path) == {"a": Curve((1, 2), (2.0, 4.0)), "b": Curve((1,), (3.0,))}


@pytest.mark.parametrize("line", ['{"batch": 1, "a"', '{"a": 1}', "[1]", '{"batch": null}', ""])
def test_read_curves_names_a_line_that_is_not_of_metrics(tmp_path, line) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"batch": 1, "a": 1}}\n{line}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*metrics\.jsonl must be a JSON object"):
        read_curves(path)


def draw(*, batches, raw, averaged, half_life="100ba", steps=None):
    curves = Curve(tuple(batches), tuple(raw)), Curve(tuple(batches), tuple(averaged))
    above = Comparison("up", *curves, "{:.1%}".format, percent)
    below = Comparison("down", *curves, "{:.2f}".format, "{:g}".format)
    shares = update_shares(HalfLife(half_life), range(1, (steps or batches[-1]) + 1))
    return comparison("Title", "subtitle", above, below, shares=shares, half_life=half_life)


CASES = {
    "a usual run": {"batches": range(10, 101, 10), "raw": [0.1 * i for i in range(10)], "averaged": [0.5] * 10},
    "one step": {"batches": [1], "raw": [0.1], "averaged": [0.1]},
    "equal values only": {"batches": [1, 2, 3, 4], "raw": [0.0] * 4, "averaged": [0.0] * 4},
    "a far outlier": {"batches": [1, 2, 3, 4], "raw": [1e6, 0, 1, 2], "averaged": [1, 1, 1, 1]},
    "a half-life beyond the run": {"batches": [5, 10], "raw": [0, 1], "averaged": [1, 0], "half_life": "1e6ba"},
    "a half-life below a step": {"batches": [5, 10], "raw": [0, 1], "averaged": [1, 0], "half_life": "0.01ba"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_figure_can_be_drawn_for_any_run(name) -> None:
    assert render(draw(**CASES[name]), "png").startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_same_numbers_give_the_same_file(kind) -> None:
    first, second = (render(draw(**CASES["a usual run"]), kind) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("name", CASES)
def test_texts_stay_inside_the_figure_and_do_not_overlap(name) -> None:
    figure = draw(**CASES[name])
    figure.canvas.draw()
    frame = figure.bbox
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in axes.texts]
        for i, box in enumerate(boxes):
            assert frame.x0 <= box.x0 <= box.x1 <= frame.x1
            assert frame.y0 <= box.y0 <= box.y1 <= frame.y1
            assert not any(box.overlaps(other) for other in boxes[i + 1 :])


def test_drawing_does_not_change_matplotlib_settings() -> None:
    before = dict(mpl.rcParams)
    render(draw(**CASES["one step"]), "svg")
    assert dict(mpl.rcParams) == before


def test_drawing_does_not_import_pyplot() -> None:
    code = "import sys, polyak.report.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

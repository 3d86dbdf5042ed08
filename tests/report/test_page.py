"""The report of a sweep: its numbers, the page and the picture."""

import json
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import pytest
from records import record, validate
from safetensors.torch import save_file

from polyak.profiles import HalfLife, PowerFunction, Smoothing, Uniform, Window
from polyak.record import Record
from polyak.report.figures import render
from polyak.report.layout import levels, metric_scale
from polyak.report.page import page
from polyak.report.scale import Scale, number, side, span
from polyak.report.sweep_figure import sweep_figure
from polyak.report.swept import swept
from polyak.report.words import compared, headline
from polyak.sweeping import Result, sweep

HOSTILE = 'x</script><script>alert(1)</script>"&'


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page") / "my <run>"
    save_file(record(folder).state_dict(), folder.parent / "raw.safetensors")
    return Record(folder)


@pytest.fixture(scope="module")
def results(run):
    raw = run.folder.parent / "raw.safetensors"
    return sweep(run, validate, points=5, refine=2, others={"raw": raw, "online": raw})


class Reader(HTMLParser):
    """Check that elements are closed in order, and note what is in them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in {"meta", "input", "link", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.texts.append(((self.open or [""])[-1], text))

    def ids(self):
        return [attributes["id"] for _, attributes in self.elements if "id" in attributes]

    @property
    def averages(self):
        (data,) = [text for (tag, text) in self.texts if tag == "script" and text.startswith("[{")]
        return json.loads(data)


def test_the_page_is_one_file_that_fetches_nothing(run, results) -> None:
    text = page(swept(run, results))
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    assert "url(" not in text
    reader = Reader(text)
    assert not [attributes for _, attributes in reader.elements if {"src", "href", "srcset"} & attributes.keys()]
    assert not [tag for tag, _ in reader.elements if tag in {"link", "img", "iframe", "object"}]
    policy = next(attributes["content"] for tag, attributes in reader.elements if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none';")


def test_the_page_holds_every_result(run, results) -> None:
    numbers = swept(run, results)
    reader = Reader(page(numbers))
    assert len(reader.averages) == len(numbers.points) == len(results) - 2
    words = " ".join(text for _, text in reader.texts)
    for result in results:
        assert f"{result.metrics['loss']:.4g}" in words
        assert f"{result.metrics['accuracy']:.4g}" in words
    for one, point in zip(reader.averages, numbers.points, strict=True):
        assert one["texts"]["value-name"] == point.result.name
        assert one["spoken"].startswith(f"{point.result.name}, loss ")
        assert set(one["texts"]) | set(one["paths"]) <= set(reader.ids())
    assert [one["best"] for one in reader.averages].index(True) == numbers.best
    assert "raw weights" in words
    assert "online EMA" in words
    assert "Choose on validation data" in words
    assert "no result" in words


def test_ids_are_there_once_and_the_slider_can_be_used_without_a_mouse(run, results) -> None:
    numbers = swept(run, results)
    reader = Reader(page(numbers))
    assert len(reader.ids()) == len(set(reader.ids()))
    (slider,) = [attributes for tag, attributes in reader.elements if tag == "input"]
    assert (slider["type"], slider["min"], slider["max"]) == ("range", "0", str(len(numbers.points) - 1))
    assert slider["value"] == str(numbers.best)
    assert ("label", {"for": "slider"}) in reader.elements
    plots = [attributes for tag, attributes in reader.elements if attributes.get("role") == "img"]
    assert len(plots) == 4
    assert all(attributes["aria-label"] for attributes in plots)
    assert ("html", {"lang": "en"}) in reader.elements


def test_every_plot_is_well_formed_svg(run, results) -> None:
    text = page(swept(run, results))
    plots = re.findall(r'<svg class="plot".*?</svg>.*?</svg>', text)
    assert len(plots) == 4
    for plot in plots:
        assert "nan" not in re.sub(r'aria-label=".*?"', "", ET.tostring(ET.fromstring(plot), encoding="unicode"))


def test_names_from_outside_are_only_letters(run) -> None:
    results = sweep(run, lambda state: {HOSTILE: float(state["0.weight"].norm())}, points=3, refine=0)
    results.append(Result(HOSTILE, None, {HOSTILE: 1.0}))
    text = page(swept(run, results))
    assert "alert(1)</script>" not in text
    assert len(re.findall("<script", text)) == 2
    assert "my <run>" not in text
    reader = Reader(text)
    assert HOSTILE in " ".join(content for _, content in reader.texts)
    assert len(reader.averages) == 4


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(
    "values",
    [[1.0], [0.0], [-3.0, -2.0, 1e9], [math.nan, 2.0, 1.0], [1e-9, 3e-9, 2e-9], [5.0, math.inf]],
    ids=str,
)
def test_any_numbers_can_be_shown(run, values, maximize) -> None:
    left = iter(values)
    last = [values[-1]]

    def evaluate(_):
        last[0] = next(left, last[0])
        return last[0]

    results = sweep(run, evaluate, points=3, refine=2, maximize=maximize)
    results += [Result("raw", None, {"value": 1e12}), Result("online", None, {"value": math.nan})]
    numbers = swept(run, results, maximize=maximize)
    text = page(numbers)
    assert "NaN" not in Reader(text).averages
    assert render(sweep_figure(numbers), "png").startswith(b"\x89PNG")


def test_profiles_that_are_no_half_lives_can_be_shown_alone(run) -> None:
    profiles = [Window("64ba"), PowerFunction(sigma_rel=0.1), Uniform("100ba"), Smoothing(0.95)]
    numbers = swept(run, sweep(run, validate, profiles))
    assert numbers.line == []
    assert [round(point.half_life) for point in numbers.points] == sorted(
        round(point.half_life) for point in numbers.points
    )
    window = next(point for point in numbers.points if isinstance(point.result.profile, Window))
    assert window.half_life == pytest.approx(32)
    assert window.since == pytest.approx(256 - 32)
    assert "Hollow" in page(numbers)
    assert render(sweep_figure(numbers), "svg").rstrip().endswith(b"</svg>")


def test_how_much_each_moment_counts_adds_up_to_one(run, results) -> None:
    numbers = swept(run, results)
    lengths = [b - a for a, b in zip(numbers.edges[:-1], numbers.edges[1:], strict=True)]
    parts = [b - a for a, b in zip(numbers.moments[:-1], numbers.moments[1:], strict=True)]
    for point in numbers.points:
        assert sum(a * b for a, b in zip(point.steps, lengths, strict=True)) == pytest.approx(1)
        assert sum(a * b for a, b in zip(point.curve, parts, strict=True)) == pytest.approx(1)
    by_name = {point.result.name: point for point in numbers.points}
    assert by_name["half-life 2ba"].since == pytest.approx(254)
    assert by_name["newest mean"].half_life == pytest.approx(1)


def test_numbers_are_in_the_unit_of_the_half_lives(run) -> None:
    profiles = [HalfLife("0.5ep", unbiased=True), HalfLife("2ep", unbiased=True)]
    numbers = swept(run, sweep(run, validate, profiles, refine=0))
    assert numbers.unit == "epochs"
    assert numbers.edges[-1] == pytest.approx(256 / 50)
    assert [point.half_life for point in numbers.points][1:] == [0.5, 2]


def test_the_words_say_what_was_found(run) -> None:
    values = iter([5.0, 3.0, 2.0, 4.0])
    results = sweep(run, lambda _: next(values), [HalfLife(f"{n}ba") for n in (4, 8, 16)], refine=0)
    numbers = swept(run, [*results, Result("raw", None, {"value": 1.5}), Result("online", None, {"value": 2.5})])
    assert headline(numbers) == "Best: half-life 8ba, with value 2"
    assert compared(numbers) == (
        "Lowest of 4 averages of the record my <run>. To compare: raw weights 1.5, online EMA 2.5. No average of the "
        "record is better than the raw weights."
    )
    numbers = swept(run, results, maximize=True)
    assert headline(numbers) == "Best: newest mean, with value 5"
    values = iter([5.0, 4.0, 3.0, 2.0])
    results = sweep(run, lambda _: next(values), [HalfLife(f"{n}ba") for n in (4, 8, 16)], refine=0)
    assert "longer ones may be better still" in compared(swept(run, results))


def test_a_line_far_from_all_averages_stays_at_the_edge(run, results) -> None:
    near = swept(run, [one for one in results if one.profile is not None])
    far = swept(run, [*results, Result("first", None, {"loss": 1e6})])
    assert metric_scale(far).high < 10 * metric_scale(near).high
    level = levels(far)[0]
    assert level.label == "first 1e+06 (off the scale)"
    assert (level.height, level.above) == (1, False)


def test_names_of_lines_keep_clear_of_the_averages() -> None:
    assert side(0.5, [], width=0.5, line=0.1) == (True, True)
    assert side(0.5, [(0.9, 0.6)], width=0.5, line=0.1) == (True, False)
    assert side(0.5, [(0.9, 0.6), (0.8, 0.4)], width=0.5, line=0.1) == (False, True)
    assert side(0.99, [], width=0.5, line=0.1) == (True, False)


@pytest.mark.parametrize(
    ("scale", "ticks"),
    [
        (Scale(0, 1), [0, 0.25, 0.5, 0.75, 1]),
        (Scale(0.47, 0.61), [0.5, 0.55, 0.6]),
        (Scale(-30, 70), [-25, 0, 25, 50]),
        (Scale(1, 20_000, log=True), [1, 10, 100, 1000, 10_000]),
        (Scale(2, 150, log=True), [3, 10, 30, 100]),
        (Scale(2, 12, log=True), [2, 5, 10]),
    ],
    ids=str,
)
def test_ticks_are_round(scale, ticks) -> None:
    assert scale.ticks == pytest.approx(ticks)


def test_scales_hold_what_they_are_for() -> None:
    scale = span([3.0, 4.0])
    assert 0 < scale.at(3.0) < scale.at(4.0) < 1
    assert span([0.0, 5.0], zero=True).at(0) == 0
    assert span([2.0]).low < 2 < span([2.0]).high
    assert Scale(1, 100, log=True).at(0) == 0
    assert [number(value) for value in (0.001, 1234, 1e6, 3e9)] == ["0.001", "1,234", "1M", "3G"]


def test_the_same_numbers_give_the_same_files(run, results) -> None:
    first, second = swept(run, results), swept(run, results)
    assert page(first) == page(second)
    assert render(sweep_figure(first), "svg") == render(sweep_figure(second), "svg")

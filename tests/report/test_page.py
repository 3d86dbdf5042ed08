"""The report of a sweep: its numbers, the page and the matplotlib figure."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files

import plotly.graph_objects as go
import pytest
import torch
from plotly.offline import get_plotlyjs
from records import record, validate
from safetensors.torch import save_file

import polyak
from polyak.profiles import HalfLife, PowerFunction, Smoothing, Uniform, Window
from polyak.record import Record
from polyak.report.charts import DARK, LIGHT, charts
from polyak.report.figures import render
from polyak.report.page import page
from polyak.report.sweep_figure import sweep_figure
from polyak.report.swept import swept
from polyak.report.words import compared, headline, level_label, written, younger
from polyak.report.written import numbers as written_numbers
from polyak.report.written import write_report
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
    """Check that elements are closed in order, and collect them with their texts."""

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

    def data(self, identity):
        """Return the JSON in the element with an id."""
        scripts = [attributes for tag, attributes in self.elements if tag == "script"]
        contents = [text for tag, text in self.texts if tag == "script"]
        (content,) = [text for one, text in zip(scripts, contents, strict=True) if one.get("id") == identity]
        return json.loads(content)

    @property
    def charts(self):
        return self.data("sweeps")[0]["charts"]

    @property
    def averages(self):
        return self.data("sweeps")[0]["averages"]


def without_plotly(text):
    """Return a page without plotly.js, which has addresses in its comments and messages."""
    assert text.count(get_plotlyjs()) == 1
    return text.replace(get_plotlyjs(), "0")


@pytest.mark.slow
def test_the_page_is_one_file_that_fetches_nothing(run, results) -> None:
    text = without_plotly(page(swept(run, results)))
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
    reader = Reader(without_plotly(page(numbers)))
    assert len(reader.averages) == len(numbers.points) == len(results) - 2
    words = " ".join(text for _, text in reader.texts)
    for result in results:
        assert written(numbers, result.metrics["loss"]) in words
        assert written(numbers.of("accuracy"), result.metrics["accuracy"]) in words
    for one, point in zip(reader.averages, numbers.points, strict=True):
        assert one["texts"]["value-name"] == point.result.name
        assert one["spoken"].startswith(f"{point.result.name}, loss ")
        assert set(one["texts"]) <= set(reader.ids())
        assert one["x"] == point.half_life
        assert one["heights"]["metric"] == point.result.metrics["loss"]
    assert [one["best"] for one in reader.averages].index(True) == numbers.best
    assert "raw weights" in words
    assert "online EMA" in words
    assert "Choose on validation data" in words
    assert "the test result is biased" in words


def test_ids_are_unique_and_the_slider_works_without_a_mouse(run, results) -> None:
    numbers = swept(run, results)
    reader = Reader(without_plotly(page(numbers)))
    assert len(reader.ids()) == len(set(reader.ids()))
    (slider,) = [attributes for tag, attributes in reader.elements if tag == "input"]
    assert (slider["type"], slider["min"], slider["max"]) == ("range", "0", str(len(numbers.points) - 1))
    assert slider["value"] == str(numbers.best)
    assert ("label", {"for": "slider"}) in reader.elements
    plots = [attributes for tag, attributes in reader.elements if attributes.get("role") == "img"]
    assert len(plots) == 4
    assert all(attributes["aria-label"] for attributes in plots)
    assert ("html", {"lang": "en"}) in reader.elements


def test_the_charts_on_the_page_are_plotly_figures_of_the_same_numbers(run, results) -> None:
    numbers = swept(run, results)
    drawn = Reader(without_plotly(page(numbers))).charts
    assert list(drawn) == ["metric", "metric-1", "profile", "error", "distance"]
    for name, figure in charts(numbers).items():
        assert go.Figure(drawn[name]) == figure
    traces = {trace.get("name"): trace for trace in drawn["metric"]["data"]}
    assert list(zip(traces["half-lives"]["x"], traces["half-lives"]["y"], strict=True)) == numbers.line
    best = numbers.points[numbers.best]
    assert (traces["best"]["x"], traces["best"]["y"]) == ([best.half_life], [best.result.metrics["loss"]])
    assert {"raw weights 1.558 (off the scale)", "online EMA 1.558 (off the scale)"} <= traces.keys()
    older, newer = (next(one for one in drawn["profile"]["data"] if one["uid"] == uid) for uid in ("older", "newer"))
    assert max(older["x"]) == min(newer["x"]) == best.since


def test_the_script_finds_the_traces_and_elements_that_it_changes(run, results) -> None:
    script = files("polyak.report").joinpath("page.js").read_text(encoding="utf-8")
    drawn = charts(swept(run, results))
    for name, figure in drawn.items():
        uids = {trace.uid for trace in figure.data if trace.uid}
        assert uids == ({"older", "newer", "asked"} if name == "profile" else {"chosen"})
        assert all(f"{uid}: {{" in script for uid in uids)
        assert len(figure.layout.shapes) == 1
    ids = set(Reader(without_plotly(page(swept(run, results)))).ids())
    assert set(re.findall(r'(?:by|read)\("([\w-]+)"\)', script)) <= ids
    assert {f"{name}-chart" for name in drawn if name != "metric-1"} <= ids


def test_the_dark_page_replaces_every_colour(run, results) -> None:
    text = json.dumps([figure.to_plotly_json() for figure in charts(swept(run, results)).values()])
    assert DARK.keys() == LIGHT.keys()
    for name, colour in LIGHT.items():
        assert colour in text
        text = text.replace(colour, DARK[name])
    used = set(re.findall(r"#[0-9a-f]{6}|rgba?\([^)]*\)", text))
    assert used <= {*DARK.values(), "rgba(0,0,0,0)"}
    style = files("polyak.report").joinpath("page.css").read_text(encoding="utf-8")
    for name in ("paper", "ink", "quiet", "rule", "averaged"):
        assert f"--{name}: {LIGHT[name]}" in style
        assert f"--{name}: {DARK[name]}" in style


def test_names_from_outside_stay_text(run) -> None:
    results = sweep(run, lambda state: {HOSTILE: float(state["0.weight"].norm())}, points=3, refine=0, minimize=True)
    results.append(Result(HOSTILE, None, {HOSTILE: 1.0}))
    text = without_plotly(page(swept(run, results)))
    assert "alert(1)</script>" not in text
    assert len(re.findall("<script", text)) == 4
    assert "my <run>" not in text
    reader = Reader(text)
    assert HOSTILE in " ".join(content for _, content in reader.texts)
    assert len(reader.averages) == 4
    chart = reader.charts["metric"]
    assert chart["layout"]["yaxis"]["title"]["text"] == 'x&lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;"&amp;'
    assert "<" not in json.dumps(chart)


@pytest.mark.slow
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(
    "values",
    [[1.0], [0.0], [-3.0, -2.0, 1e9], [math.nan, 2.0, 1.0], [1e-9, 3e-9, 2e-9], [5.0, math.inf]],
    ids=str,
)
def test_the_report_shows_any_numbers(run, values, maximize) -> None:
    left = iter(values)
    last = [values[-1]]

    def evaluate(_):
        last[0] = next(left, last[0])
        return last[0]

    results = sweep(run, evaluate, points=3, refine=2, maximize=maximize)
    results += [Result("raw", None, {"value": 1e12}), Result("online", None, {"value": math.nan})]
    numbers = swept(run, results, maximize=maximize)
    text = page(numbers)
    reader = Reader(without_plotly(text))
    assert len(reader.averages) == len(numbers.points)
    assert len(reader.charts) == 4
    assert render(sweep_figure(numbers), "png").startswith(b"\x89PNG")


def test_the_report_shows_profiles_without_a_half_life_alone(run) -> None:
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
    best = numbers.points[numbers.best].result
    assert f"polyak reconstruct &#x27;my &lt;run&gt;&#x27; {best.profile.options} -o" in page(numbers)
    assert render(sweep_figure(numbers), "svg").rstrip().endswith(b"</svg>")


def test_the_weights_of_all_moments_add_up_to_one(run, results) -> None:
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


def test_the_words_name_the_best_average_and_compare_it(run) -> None:
    values = iter([5.0, 3.0, 2.0, 4.0])
    results = sweep(run, lambda _: next(values), [HalfLife(f"{n}ba") for n in (4, 8, 16)], refine=0)
    numbers = swept(run, [*results, Result("raw", None, {"value": 1.5}), Result("online", None, {"value": 2.5})])
    assert headline(numbers) == "Best: half-life 8ba, with value 2.0"
    assert compared(numbers) == (
        "Lowest of 4 averages of the record my <run>. For comparison: raw weights 1.5, online EMA 2.5. No average of "
        "the record is better than the raw weights."
    )
    numbers = swept(run, results, maximize=True)
    assert headline(numbers) == "Best: newest mean, with value 5"
    values = iter([5.0, 4.0, 3.0, 2.0])
    results = sweep(run, lambda _: next(values), [HalfLife(f"{n}ba") for n in (4, 8, 16)], refine=0)
    assert "longer ones may be better still" in compared(swept(run, results))


def test_a_level_far_from_all_averages_is_off_the_scale(run, results) -> None:
    averages = [one for one in results if one.profile is not None]
    near = swept(run, [*averages, Result("near", None, {"loss": averages[0].metrics["loss"]})])
    far = swept(run, [*averages, Result("first", None, {"loss": 1e6})])
    assert far.metric_range == swept(run, averages).metric_range
    assert [level.on_scale for level in near.levels] == [True]
    (level,) = far.levels
    assert level_label(level) == "first 1e+06 (off the scale)"
    low, high = far.metric_range
    assert all(low < far.value(point) < high for point in far.points)


def test_the_legend_of_the_figure_is_inside_the_figure(run, results) -> None:
    figure = sweep_figure(swept(run, results))
    figure.canvas.draw()
    box = figure.axes[0].get_legend().get_window_extent()
    assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1
    assert box.y1 < figure.axes[0].title.get_window_extent().y0 + 1


def test_the_same_numbers_give_the_same_files(run, results) -> None:
    first, second = swept(run, results), swept(run, results)
    assert page(first) == page(second)
    assert render(sweep_figure(first), "svg") == render(sweep_figure(second), "svg")


def test_digits_are_those_that_distinguish_averages_near_the_best(run) -> None:
    def shown(values, examples=()):
        results = [
            Result(
                f"{n}",
                HalfLife(f"{n}ba", unbiased=True),
                {"loss": value},
                examples={"loss": examples} if i == 0 else {},
            )
            for i, (n, value) in enumerate(zip((4, 8, 16, 32, 64), values, strict=True))
        ]
        numbers = swept(run, results)
        return [written(numbers, numbers.value(point)) for point in numbers.points]

    assert shown([0.5123456, 0.51334, 0.519, 0.6, 9.0]) == ["0.5123", "0.5133", "0.5190", "0.6000", "9.0000"]
    assert shown([0.5, 0.5, 0.5, 0.5, 0.5]) == ["0.5"] * 5
    assert shown([1.0, 2.0, 3.0, 4.0, 5.0]) == ["1", "2", "3", "4", "5"]
    noisy = (0.3, 0.7123456) * 8  # their mean is known to about 0.1
    assert shown([sum(noisy) / 16, 0.51, 0.52, 0.53, 0.6], noisy)[0] == "0.51"


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    found = []
    for name in ("one", "two"):
        record(folder / name, per_level=None)

        def examples(state):
            loss = validate(state)["loss"]
            return {"loss": [float(loss) + 0.1 * i for i in range(8)], "norm": float(state["0.weight"].norm())}

        found.append(sweep(folder / name, examples, at=["50%", "100%"], points=4, refine=0, metric="loss"))
    return found


@pytest.mark.slow
def test_a_page_may_have_several_moments_and_records(several, tmp_path) -> None:
    written_files = write_report(several[0], tmp_path, several[1])
    assert "report.html" in written_files
    reader = Reader(without_plotly((tmp_path / "report.html").read_text(encoding="utf-8")))
    sweeps = reader.data("sweeps")
    assert len(sweeps) == 4
    for one in sweeps:
        assert list(one["charts"]) == ["metric", "metric-1", "profile", "error", "distance", "training", "heatmap"]
        assert set(one["scales"]) == {"metric", "metric-1"}
        lines = [trace for trace in one["charts"]["metric"]["data"] if trace.get("hoverinfo") == "name"]
        assert len(lines) == 3
    words = " ".join(text for _, text in reader.texts)
    assert "one at 128ba" in words
    assert "two at" in words
    assert "loss over training" in words
    assert {"pick-sweep", "pick-metric"} <= set(reader.ids())
    assert len(reader.ids()) == len(set(reader.ids()))


def test_intervals_on_the_page_are_of_the_difference_from_the_best(several) -> None:
    numbers = written_numbers(several[0])
    best = numbers.points[numbers.best]
    assert numbers.differs_by(best) is None
    assert numbers.margins(best)[0] > 0.1
    for point in numbers.points:
        if point is not best:
            assert max(numbers.differs_by(point)) < 1e-6  # all examples differ by the same
    assert "±" in headline(numbers)
    bars = [trace["error_y"] for trace in charts(numbers)["metric"].to_plotly_json()["data"] if "error_y" in trace]
    assert bars
    assert "95 % interval" in page(numbers)


def test_the_page_says_where_it_comes_from(several, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["/usr/bin/polyak", "sweep", "my run", "--evaluate", "e.py:f"])
    write_report(several[0], tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "polyak sweep &#x27;my run&#x27; --evaluate e.py:f" in text
    assert str(several[0].record.folder) in text
    assert f"polyak {polyak.__version__}, torch {torch.__version__}" in text
    assert re.search(r"<dd>20\d\d-\d\d-\d\d \d\d:\d\d UTC</dd>", text)


def test_the_axis_begins_near_the_best_where_others_are_far(run) -> None:
    def numbers(values):
        profiles = [HalfLife(f"{4 + n}ba", unbiased=True) for n in range(len(values))]
        return swept(run, [Result(f"{p}", p, {"loss": v}) for p, v in zip(profiles, values, strict=True)])

    far = numbers([900.0, 100.0, 1.3, 1.1, 1.0, 1.2, 1.25, 1.22])
    low, high = far.near_range
    assert low == pytest.approx(1, abs=0.2)
    assert high == pytest.approx(1.4, abs=0.3)
    assert far.log_range == pytest.approx((0, math.log10(900)), abs=0.2)
    assert list(charts(far)["metric"].layout.yaxis.range) == [low, high]
    near = numbers([1.4, 1.3, 1.2, 1.1, 1.0, 1.2])
    assert near.near_range is near.log_range is None
    assert 'id="pick-scale"' in page(far)
    assert 'id="pick-scale"' not in page(near)


@pytest.fixture(scope="module")
def of_two_metrics(run):
    def both(state):
        loss = torch.as_tensor(validate(state)["loss"]) * torch.linspace(0.9, 1.1, 8)
        return {"loss": loss, "accuracy": 1 / (1 + loss)}

    return page(swept(run, found := sweep(run, both, points=3, refine=0), found.metric))


def test_captions_are_true_whichever_metric_is_chosen(of_two_metrics) -> None:
    assert "that with the lowest loss" in of_two_metrics
    assert "is better" not in re.sub(r"<script.*?</script>", "", of_two_metrics, flags=re.DOTALL)


def test_the_interval_names_its_metric_where_there_are_several(of_two_metrics, results, run) -> None:
    assert ">95 % interval of loss<" in of_two_metrics
    assert "interval of" not in page(swept(run, results, "loss"))


def test_the_page_promises_no_file_that_a_report_does_not_have(results, tmp_path) -> None:
    results.report(tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    promised = set(
        re.findall(
            r"\b[\w-]+\.(?:safetensors|png|svg|json)\b", re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
        )
    )
    assert promised <= {"averaged.safetensors", *(path.name for path in tmp_path.iterdir())}


@pytest.mark.parametrize(
    ("age", "shown"), [(224.1234, "224"), (31.0412, "31"), (0.51234, "0.512"), (12345.6, "12,346")]
)
def test_the_age_of_an_average_is_not_more_precise_than_anybody_needs(results, run, age, shown) -> None:
    numbers = swept(run, results, "loss")
    point = replace(numbers.points[0], since=numbers.edges[-1] - age)
    assert younger(numbers, point) == f"{shown} {numbers.unit}"

import copy
import json
import math
import warnings
import weakref
from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from polyak.errors import PlanWarning, ProfileError, TimeError
from polyak.profiles import HalfLife, PowerFunction, Profile, Smoothing, Uniform, Warmup, Window
from polyak.record import Edge, Record, Segment, Writer, coefficients, error_estimate, finest, fit, shares
from polyak.record.files import Box, SegmentFile
from polyak.record.writer import due
from polyak.storage.safetensors import TensorInfo
from polyak.time import Time, Timestamp

T = 4096
INTERVAL = T // 512


def edge(updates: int) -> Edge:
    return Edge(updates, Timestamp(epoch_length=100).to_next_batch(steps=updates, samples=3 * updates))


def segment(start: int, end: int, level: int = 0) -> Segment:
    return Segment(edge(start), edge(end), level, 0, "0" * 64)


def segments(updates: int = T, interval: int = INTERVAL, per_level: int | None = 4) -> list[Segment]:
    """What a record would consist of."""
    result: list[Segment] = []
    for start in range(0, updates, interval):
        result.append(segment(start, min(updates, start + interval)))
        level = 0
        while (i := due([one.level for one in result], level, per_level)) is not None:
            result[i : i + 2] = [segment(result[i].start.updates, result[i + 1].end.updates, level + 1)]
            level += 1
    return result


@cache
def random_walk() -> Tensor:
    return torch.randn(T, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64).cumsum(0)


@cache
def sgd(cosine: bool = False) -> Tensor:
    """The weights of a linear model after each step, with directions that settle fast and ones that never do."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = randn(512, 100) * torch.logspace(0, -1.5, 100, dtype=torch.float64)
    targets = inputs @ randn(100) + randn(512)
    weights, history = torch.zeros(100, dtype=torch.float64), []
    for step in range(T):
        batch = torch.randint(512, (8,), generator=generator)
        rate = 0.02 * (0.5 * (1 + math.cos(math.pi * step / T)) if cosine else 1)
        weights = weights - rate * inputs[batch].T @ (inputs[batch] @ weights - targets[batch]) / 8
        history.append(weights)
    return torch.stack(history)


HISTORIES = {"walk": random_walk, "sgd": sgd, "cosine": lambda: sgd(cosine=True)}


def truth(profile: Profile, history: Tensor, scale: float = 1.0) -> Tensor:
    """The average with every step's weights at hand, without the share of what was before the first."""
    now = len(history)
    cumulative = [profile.decay(scale * n, scale * now) for n in range(now + 1)]
    return torch.tensor(cumulative, dtype=torch.float64).diff() @ history / (1 - cumulative[0])


def means_of(parts: list[Segment], history: Tensor) -> Tensor:
    return torch.stack([history[one.start.updates : one.end.updates].mean(0) for one in parts])


def relative_error(weights: list[float], parts: list[Segment], profile: Profile, history: Tensor) -> float:
    exact = truth(profile, history)
    given = torch.tensor(weights, dtype=torch.float64) @ means_of(parts, history)
    return float((given - exact).norm() / (history[-1] - exact).norm())


# Per cent of |last weights - average|, a little above what facts/science.md has measured for a constant rate.
BOUNDS = [
    *[
        (HalfLife(f"{T / k}ba", unbiased=True), bound)
        for k, bound in [
            (512, 3.5),
            (256, 1.2),
            (128, 0.6),
            (64, 0.4),
            (32, 0.4),
            (16, 0.4),
            (8, 0.4),
            (4, 0.4),
            (2, 0.4),
        ]
    ],
    (PowerFunction(sigma_rel=0.02), 0.5),
    (PowerFunction(sigma_rel=0.10), 0.4),
    (Window(f"{T / 10}ba"), 3.0),
]
PROFILES = [*[profile for profile, _ in BOUNDS], PowerFunction(sigma_rel=0.25), Uniform(f"{T // 3}ba")]


@pytest.mark.parametrize(("profile", "bound"), BOUNDS, ids=str)
@pytest.mark.parametrize("history", ["walk", "sgd"])
def test_the_error_is_what_was_measured(history, profile, bound) -> None:
    parts = segments()
    assert len(parts) == 29
    assert 100 * relative_error(coefficients(profile, parts), parts, profile, HISTORIES[history]()) < bound


@pytest.mark.slow
@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("profile", PROFILES, ids=str)
def test_the_estimate_is_within_a_factor_of_three_of_the_error_and_the_solve_beats_the_shares(history, profile) -> None:
    parts, steps = segments(), HISTORIES[history]()
    differences = means_of(parts, steps).diff(dim=0)
    fitted = fit(profile, parts)
    error = relative_error(fitted.coefficients, parts, profile, steps)
    estimate = error_estimate(fitted, (differences @ differences.T).tolist())
    assert error / 3 < estimate < 3 * error
    assert error < relative_error(shares(profile, parts), parts, profile, steps)
    if history == "walk":  # what the solve assumes: then nothing but the segments is needed
        assert fitted.expected_error == pytest.approx(error, rel=0.2)
        assert estimate == pytest.approx(error, rel=0.2)


@pytest.mark.parametrize("profile", PROFILES, ids=str)
def test_coefficients_sum_to_one_and_do_not_amplify_rounding(profile) -> None:
    weights = coefficients(profile, segments())
    assert math.fsum(weights) == pytest.approx(1, abs=1e-12)
    assert sum(abs(weight) for weight in weights) < 1.05


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=2, max_size=12),
    half_life=st.floats(0.1, 10_000),
    unit=st.sampled_from(["ba", "sp", "ep"]),
)
def test_for_any_record_coefficients_sum_to_one_or_the_profile_is_refused(lengths, half_life, unit) -> None:
    ends = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    parts = [segment(start, end) for start, end in pairwise(ends)]
    profile = HalfLife(f"{half_life:.6f}{unit}", unbiased=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PlanWarning)
        try:
            fitted = fit(profile, parts)
        except ProfileError:
            return
    assert math.fsum(fitted.coefficients) == pytest.approx(1, abs=1e-9)
    assert all(residual >= 0 for residual in fitted.residuals)


@pytest.mark.parametrize("kept", [1, 2, 5, 12, 28])
def test_a_window_or_tail_that_starts_at_an_edge_is_exact(kept) -> None:
    parts = segments()
    start = parts[-kept].start.updates
    expected = [0.0] * (len(parts) - kept) + [one.num_updates / (T - start) for one in parts[-kept:]]
    for profile in (Window(f"{T - start}ba"), Uniform(f"{start}ba"), Window(f"{3 * (T - start)}sp")):
        assert coefficients(profile, parts) == pytest.approx(expected, abs=1e-12)
        assert shares(profile, parts) == pytest.approx(expected, abs=1e-12)
        fitted = fit(profile, parts)
        assert fitted.expected_error < 1e-9
        products = torch.eye(len(parts) - 1).tolist()
        assert error_estimate(fitted, products) < 1e-9


@pytest.mark.parametrize("profile", [HalfLife("2ba", unbiased=True), PowerFunction(gamma=3.0), Window("3ba")], ids=str)
def test_with_every_step_kept_any_profile_is_exact(profile) -> None:
    parts = segments(64, interval=1, per_level=None)
    history = random_walk()[:64]
    assert relative_error(coefficients(profile, parts), parts, profile, history) < 1e-12


@pytest.mark.parametrize(
    ("profile", "same"),
    [
        (HalfLife("192sp", unbiased=True), HalfLife("64ba", unbiased=True)),
        (HalfLife("0.64ep", unbiased=True), HalfLife("64ba", unbiased=True)),
        (HalfLife(Time(64 / T, "dur"), unbiased=True), HalfLife("64ba", unbiased=True)),
        (Smoothing(2 ** (-1 / 64)), HalfLife("64ba", unbiased=True)),
        (Warmup(HalfLife("64ba")), Warmup(Smoothing(2 ** (-1 / 64)))),
    ],
    ids=str,
)
def test_a_profile_is_the_same_in_each_unit(profile, same) -> None:
    parts = [one for one in segments() if one.end.updates]
    steady = [
        Segment(
            *(
                Edge(
                    e.updates,
                    Timestamp(
                        sample=Time(3 * e.updates, "sp"),
                        batch=Time(e.updates, "ba"),
                        epoch=Time(e.updates // 100, "ep"),
                        batch_in_epoch=Time(e.updates % 100, "ba"),
                        epoch_length=100,
                    ),
                )
                for e in (one.start, one.end)
            ),
            one.level,
            0,
            one.sha256,
        )
        for one in parts
    ]
    one = coefficients(profile, steady, max_duration=Time(T, "ba"))
    assert one == pytest.approx(coefficients(same, steady), abs=1e-9)


def test_a_profile_counts_from_where_the_record_begins() -> None:
    parts = segments(512)
    late = [Segment(later(one.start), later(one.end), one.level, 0, one.sha256) for one in parts]
    for profile in (PowerFunction(sigma_rel=0.1), Uniform("100ba"), HalfLife("300ba", unbiased=True)):
        assert coefficients(profile, late) == pytest.approx(coefficients(profile, parts), abs=1e-12)
    # A moment is counted from where the run begins.
    assert coefficients(Uniform(), late, at="1256ba") == coefficients(Uniform(), parts, at="256ba")


def later(one: Edge) -> Edge:
    return Edge(one.updates, one.timestamp.to_next_batch(steps=1000))


def test_a_warm_up_takes_no_longer_than_the_run_is_long(monkeypatch) -> None:
    parts = segments(200_000, interval=400)
    profile = Warmup(Smoothing(0.9999), power=2 / 3)
    updates, decay = [], Warmup.decay
    with monkeypatch.context() as patches:
        patches.setattr(Warmup, "decay", lambda *args: updates.append(args[2] - args[1]) or decay(*args))
        weights = coefficients(profile, parts)
    assert sum(updates) < 10 * 200_000  # a product over the run for each point would be of 50 million
    ends = [profile.decay(one.start.updates, 200_000) for one in parts[-3:]] + [1.0]
    assert weights[-3:] == pytest.approx([b - a for a, b in pairwise(ends)], rel=0.02)


# What is refused, and what is warned about.


@pytest.mark.parametrize(
    "profile", [HalfLife("7ba"), HalfLife("0ba"), Window("15ba"), Uniform(f"{T}ba"), Smoothing(0.5)]
)
def test_a_profile_finer_than_the_record_is_refused_with_the_number(profile) -> None:
    with pytest.raises(
        ProfileError, match=r"resolves half-lives of 8 updates or more \(got .*, whose median age is [\d.]+"
    ):
        coefficients(profile, segments())


def test_the_finest_half_life_is_not_that_of_a_last_segment_cut_short() -> None:
    parts = segments(T + 3)
    assert parts[-1].num_updates == 3
    assert finest(parts) == 8
    with pytest.raises(ProfileError, match="8 updates"):
        coefficients(HalfLife("4ba"), parts)
    assert coefficients(HalfLife("8ba", unbiased=True), parts)


def test_a_profile_that_the_record_tells_only_coarsely_is_warned_about_with_the_number() -> None:
    with pytest.warns(PlanWarning, match=r"the error of the average is about 10.0% of its distance"):
        coefficients(Window("1500ba"), segments(per_level=1))


def test_a_share_of_weights_before_the_record_is_warned_about_and_left_out() -> None:
    parts = segments()
    with pytest.warns(PlanWarning, match=r"^6\.2% of the average under half-life 1024ba.*unbiased=True"):
        weights = coefficients(HalfLife(f"{T // 4}ba"), parts)
    assert weights == pytest.approx(coefficients(HalfLife(f"{T // 4}ba", unbiased=True), parts), abs=1e-9)
    with pytest.raises(ProfileError, match="must give weight to the record"):
        coefficients(HalfLife("infba"), parts)


def test_a_clock_that_stood_still_is_refused() -> None:
    with pytest.raises(ProfileError, match="stood still"):
        coefficients(HalfLife("100tok"), segments())
    with pytest.raises(TimeError, match="max_duration"):
        coefficients(HalfLife("0.1dur"), segments())
    with pytest.raises(ProfileError, match="at least one segment"):
        coefficients(HalfLife("100ba"), [])


def test_an_average_ends_where_a_segment_does() -> None:
    parts = segments()
    at = parts[-10].end.updates
    early = coefficients(HalfLife("600ba", unbiased=True), parts, at=f"{at}ba")
    assert len(early) == len(parts) - 9
    assert early == coefficients(HalfLife("600ba", unbiased=True), parts[:-9])
    near = f"near it are {parts[-11].end.updates}ba, {at}ba, {parts[-9].end.updates}ba"
    with pytest.raises(TimeError, match=near):
        coefficients(HalfLife("600ba"), parts, at=f"{at + 1}ba")
    # Older segments are longer, and so is the finest half-life there.
    with pytest.raises(ProfileError, match=f"half-lives of {parts[5].num_updates} updates"):
        coefficients(HalfLife("8ba"), parts, at=f"{parts[5].end.updates}ba")


# Records on disk.

HISTORY = 96


def history() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def walk(*shape: int) -> Tensor:
        return torch.randn(HISTORY, *shape, generator=generator, dtype=torch.float64).cumsum(0)

    return {"weight": walk(4, 3), "bias": walk(4), "steps": torch.arange(1, HISTORY + 1)}


@cache
def files(dtype: torch.dtype) -> dict[str, bytes]:
    """Return what is in the folder of a record: to write it takes longer than most tests."""
    steps = history()
    infos = {
        name: TensorInfo.of(steps[name][0], averaged=steps[name].is_floating_point(), dtype=dtype) for name in steps
    }
    options = {"per_level": 2, "aliases": {"tied": "weight"}, "max_duration": Time(HISTORY, "ba")}
    with TemporaryDirectory() as folder:
        with Writer(folder, infos, **options) as writer:
            for start in range(0, HISTORY, 2):
                means = {name: one[start : start + 2].double().mean(0) for name, one in steps.items()}
                writer.append(means | {"steps": steps["steps"][start + 1]}, edge(start), edge(start + 2))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def recorded(folder: Path, dtype: torch.dtype = torch.float32) -> Record:
    folder.mkdir(exist_ok=True)
    for name, content in files(dtype).items():
        (folder / name).write_bytes(content)
    return Record(folder)


def test_an_average_is_the_segments_means_under_the_coefficients(tmp_path) -> None:
    record, steps = recorded(tmp_path), history()
    for at, parts in ((None, record.segments), (f"{record.segments[-3].end.updates}ba", record.segments[:-2])):
        profile = HalfLife("0.25dur", unbiased=True)
        weights = coefficients(profile, record.segments, at, max_duration=record.max_duration)
        average = record.average(profile, at)
        assert list(average) == ["weight", "bias", "steps", "tied"]
        for name in ("weight", "bias"):
            means = means_of(list(parts), steps[name])
            expected = (torch.tensor(weights, dtype=torch.float64) @ means.flatten(1)).view(means.shape[1:])
            assert average[name].dtype is torch.float32
            torch.testing.assert_close(average[name].double(), expected, rtol=0, atol=1e-6)
        assert average["steps"] == parts[-1].end.updates
        assert average["tied"] is average["weight"]


def test_dtype_and_device_are_chosen_for_what_is_averaged(tmp_path) -> None:
    average = recorded(tmp_path).average(HalfLife("10ba"), dtype=torch.bfloat16, device="meta")
    assert [(t.dtype, t.device.type) for t in average.values()] == [
        (torch.bfloat16, "meta"),
        (torch.bfloat16, "meta"),
        (torch.int64, "meta"),
        (torch.bfloat16, "meta"),
    ]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 0.03), (torch.float16, 0.03), (torch.bfloat16, 0.1)])
def test_the_error_of_a_record_is_estimated_from_its_files(tmp_path, dtype, bound) -> None:
    record, steps = recorded(tmp_path, dtype), history()
    profile = HalfLife("8ba", unbiased=True)
    average = record.average(profile)
    exact = {name: truth(profile, steps[name].flatten(1)) for name in ("weight", "bias")}
    error = math.hypot(*(float((average[name].flatten().double() - exact[name]).norm()) for name in exact))
    distance = math.hypot(*(float((steps[name][-1].flatten() - exact[name]).norm()) for name in exact))
    assert error / distance < bound
    if dtype is torch.float32:
        assert error / distance / 3 < record.error(profile) < 3 * error / distance


def test_the_error_is_that_of_all_tensors_together_whatever_their_chunks(tmp_path, monkeypatch) -> None:
    profile = HalfLife("8ba")
    whole = recorded(tmp_path).error(profile)
    monkeypatch.setattr("polyak.record.combining._CHUNK", 40)
    assert Record(tmp_path).error(profile) == pytest.approx(whole, rel=1e-5)
    assert Record(tmp_path).error(Window("2ba")) < 1e-9
    assert Record(tmp_path).error(Uniform()) < 1e-9


def test_the_error_of_a_copy_of_a_record_is_that_of_its_own_segments(tmp_path) -> None:
    profile = HalfLife("8ba", unbiased=True)
    whole, alone = recorded(tmp_path), Record(tmp_path)
    assert whole.error(profile) > 0
    newer = copy.copy(whole)
    newer.segments = alone.segments = whole.segments[3:]
    assert newer.error(profile) == alone.error(profile) != whole.error(profile)


def test_a_coarse_average_is_warned_about_by_what_the_record_shows(tmp_path) -> None:
    """Steps that become smaller and smaller: then the old segments matter more than the segments' lengths imply."""
    parts = segments(256, interval=2, per_level=2)
    steps = (random_walk()[:256].diff(dim=0, prepend=torch.zeros(1, 200)) * torch.logspace(0, -3, 256)[:, None]).cumsum(
        0
    )
    with Writer(tmp_path, {"w": TensorInfo(torch.float32, (200,), averaged=True)}, per_level=2) as writer:
        for start in range(0, 256, 2):
            writer.append({"w": steps[start : start + 2].mean(0)}, edge(start), edge(start + 2))
    profile = HalfLife("60ba", unbiased=True)
    coefficients(profile, parts)  # no warning from the lengths alone
    with pytest.warns(PlanWarning, match=r"about [\d.]+%"):
        Record(tmp_path).average(profile)


def test_an_exported_average_loads_and_says_where_it_comes_from(tmp_path) -> None:
    record = recorded(tmp_path / "my record")
    profile = HalfLife("0.1dur", unbiased=True)
    path = tmp_path / "average.safetensors"
    record.export(profile, path)
    loaded, average = load_file(path), record.average(profile)
    assert loaded.keys() == average.keys()
    assert all(torch.equal(loaded[name], average[name]) for name in loaded)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert metadata["polyak.profile"] == "HalfLife(span=Time(0.1, 'dur'), unbiased=True)"
    assert metadata["polyak.record"] == "my record"
    assert json.loads(metadata["polyak.moment"])["updates"] == HISTORY
    assert float(metadata["polyak.error_estimate"]) == pytest.approx(record.error(profile), rel=0.01)
    assert str(tmp_path) not in json.dumps(metadata)
    record.export(profile, path, dtype=torch.float16, overwrite=True)
    assert load_file(path)["weight"].dtype is torch.float16
    assert sorted(one.name for one in tmp_path.iterdir()) == ["average.safetensors", "my record"]
    model = nn.ParameterDict({name: nn.Parameter(torch.zeros(4, 3)) for name in ("weight", "tied")})
    model.register_parameter("bias", nn.Parameter(torch.zeros(4)))
    model.register_buffer("steps", torch.tensor(0))
    model.load_state_dict(loaded)


def test_an_export_that_fails_leaves_the_file_that_was_there(tmp_path) -> None:
    record = recorded(tmp_path / "record")
    path = tmp_path / "average.safetensors"
    path.write_text("old")
    with record.open(record.segments[0]):
        (tmp_path / "record" / record.segments[0].file).unlink()
    with pytest.raises(OSError, match="cannot be opened"):
        record.export(HalfLife("8ba"), path, overwrite=True)
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(OSError, match=r"exporting to .* failed"):
        recorded(tmp_path / "another").export(HalfLife("8ba"), tmp_path / "nowhere" / "average.safetensors")


def test_a_single_segment_gives_its_own_mean_and_nothing_else(tmp_path) -> None:
    with Writer(tmp_path, {"w": TensorInfo(torch.float32, (1,), averaged=True)}) as writer:
        writer.append({"w": torch.ones(1)}, edge(0), edge(10))
    record = Record(tmp_path)
    assert record.average(Uniform()) == {"w": torch.ones(1)}
    assert record.error(Uniform()) == 0
    with pytest.raises(ProfileError, match="10 updates or more"):
        record.average(HalfLife("5ba"))


def test_an_average_and_its_warning_read_each_element_of_a_file_once(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("polyak.record.combining._CHUNK", 40)
    found = recorded(tmp_path)
    elements = dict.fromkeys(found.tensors, 0)
    read = SegmentFile.read

    def counted(file: SegmentFile, name: str, box: Box | None = None, before: Tensor | None = None) -> Tensor:
        tensor = read(file, name, box, before)
        elements[name] += tensor.numel()
        return tensor

    monkeypatch.setattr(SegmentFile, "read", counted)
    profile = HalfLife("0.25dur", unbiased=True)
    found.average(profile)
    once = {
        name: math.prod(info.shape) * (len(found.segments) if info.averaged else 1)
        for name, info in found.tensors.items()
    }
    assert elements == once
    found.error(profile)
    found.error(Uniform())
    assert elements == once


def test_a_window_at_edges_reads_its_segments_alone(tmp_path, monkeypatch) -> None:
    found = recorded(tmp_path)
    last = found.segments[-1]
    opened = []
    read = SegmentFile.read
    monkeypatch.setattr(SegmentFile, "read", lambda file, *a: opened.append(id(file)) or read(file, *a))
    found.average(Window(f"{last.num_updates}ba"))
    assert len(set(opened)) == 1


def test_an_export_warns_once_of_weights_from_before_the_record(tmp_path) -> None:
    found = recorded(tmp_path / "record")
    with pytest.warns(PlanWarning, match="weights from before the record") as caught:
        found.export(HalfLife("0.25dur"), tmp_path / "averaged.safetensors")
    assert len(caught) == 1
    assert caught[0].filename == __file__


# Several averages in a pass.


def test_averages_are_those_of_one_at_a_time_bit_for_bit_whatever_fits_in_a_pass(tmp_path, monkeypatch) -> None:
    record = recorded(tmp_path)
    profiles = [HalfLife("8ba", unbiased=True), Uniform(), Window("2ba"), PowerFunction(gamma=3)]
    want = [Record(tmp_path).average(profile) for profile in profiles]
    for max_bytes in (1, 200, 4e9):
        found = list(record.averages(profiles, max_bytes=max_bytes))
        for mine, theirs in zip(found, want, strict=True):
            assert list(mine) == list(theirs)
            assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    monkeypatch.setattr("polyak.record.combining._CHUNK", 40)
    for mine, theirs in zip(record.averages(profiles), want, strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    for profile in profiles:
        assert record.error(profile) == pytest.approx(Record(tmp_path).error(profile), rel=1e-5)


def test_averages_read_each_file_once_for_all_that_fit_in_a_pass(tmp_path, monkeypatch) -> None:
    record = recorded(tmp_path)
    read, real = [], SegmentFile.read
    monkeypatch.setattr(
        SegmentFile, "read", lambda self, name, *box: read.append((self, name)) or real(self, name, *box)
    )
    profiles = [HalfLife(f"{n}ba", unbiased=True) for n in (8, 16, 32)]
    list(record.averages(profiles))
    averaged = [name for name, info in record.tensors.items() if info.averaged]
    once = len(record.segments) * len(averaged) + 3  # the last value of the step counter, for each average
    assert len(read) == once
    read.clear()
    list(record.averages(profiles, max_bytes=1))
    assert len(read) == 3 * once - 6


def test_averages_may_end_at_several_moments(tmp_path) -> None:
    record = recorded(tmp_path)
    profile, moments = HalfLife("8ba", unbiased=True), [None, f"{record.segments[-3].end.updates}ba"]
    for average, moment in zip(record.averages([profile] * 2, moments), moments, strict=True):
        want = Record(tmp_path).average(profile, moment)
        assert all(torch.equal(average[name], want[name]) for name in want)
    with pytest.raises(ValueError, match=r"a moment for each profile \(got 1 for 2 profiles\)"):
        record.averages([profile] * 2, [None])


def test_averages_refuse_a_profile_before_any_file_is_read(tmp_path) -> None:
    record = recorded(tmp_path)
    for segment in record.segments:
        (tmp_path / segment.file).unlink()
    with pytest.raises(ProfileError, match="finer than the record"):
        record.averages([Uniform(), HalfLife("0.1ba")])


def test_averages_hold_no_more_results_than_fit_in_a_pass(tmp_path) -> None:
    record = recorded(tmp_path)
    alive = []
    for average in record.averages([Uniform()] * 6, max_bytes=150):  # two of 64 bytes
        alive.append(weakref.ref(average["weight"]))
        del average
        assert sum(one() is not None for one in alive) <= 1

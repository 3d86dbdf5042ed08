"""``Record.from_checkpoints``: averages that other libraries stored, combined to other averages."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign_runs as runs
import pytest
import torch
from torch import Tensor

from polyak import EMA, Cooldown, HalfLife, PowerFunction, Uniform, Window, attach
from polyak.errors import CheckpointError, PlanWarning, ProfileError, RecordError, TimeError
from polyak.profiles import Profile, Smoothing
from polyak.record import Record, fit
from polyak.sweeping import sweep

STEPS = 1600
FILES = Path(__file__).parents[1] / "checkpoints" / "series_files"
SIGMAS = (PowerFunction(0.05), PowerFunction(0.28))


def raw(folder: Path) -> Record:
    runs.write_raw(folder, STEPS, 50)
    return Record.from_checkpoints(folder)


def icefall(folder: Path) -> Record:
    runs.write_icefall(folder, STEPS, 100, period=1)
    return Record.from_checkpoints(folder)


def swa(folder: Path) -> Record:
    runs.write_swa(folder, STEPS, 100, stride=2)
    return Record.from_checkpoints(folder, stored=Uniform())


def edm2(folder: Path) -> Record:
    runs.write_edm2(folder, STEPS, 100)
    return Record.from_checkpoints(folder, batch_size=1024)


def ema_pytorch(_: Path) -> Record:
    return Record.from_checkpoints(FILES / "ema_pytorch", stored=SIGMAS, update_every=1)


def nitrous_ema(_: Path) -> Record:
    return Record.from_checkpoints(FILES / "nitrous_ema", stored=SIGMAS, update_every=10, step_size_correction=True)


def own(folder: Path) -> Record:
    model = runs.module()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    attached = {name: attach(EMA(name), model, optimizer) for name in ("30ba", "200ba")}
    for step in range(1, STEPS + 1):
        with torch.no_grad():
            for name, one in runs.weights(step).items():
                model.get_parameter(name).copy_(one)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        if step % 100 == 0:
            states = {name: one.state_dict() for name, one in attached.items()}
            torch.save({"model": model.state_dict(), "averages": states}, folder / f"step-{step}.pt")
    return Record.from_checkpoints(folder)


FAMILIES = [raw, icefall, swa, edm2, ema_pytorch, nitrous_ema, own]
PROFILES = [HalfLife("200ba", unbiased=True), Window("800ba"), PowerFunction(0.15), Cooldown("800ba", "cosine")]


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda one: one.__name__)
def record(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Record:
    return request.param(tmp_path_factory.mktemp("run"))


@pytest.mark.slow
def test_averages_of_each_family_are_within_their_stated_error_of_the_truth(record: Record) -> None:
    for profile in PROFILES:
        actual, stated = runs.error(record.average(profile), profile, STEPS), record.error(profile)
        assert actual < 3 * stated + 0.005, profile
        assert stated < 0.06


def test_coefficients_of_each_family_sum_to_one(record: Record) -> None:
    for profile in PROFILES:
        fitted = fit(profile, record.segments)
        assert sum(fitted.coefficients) == pytest.approx(1)
        assert fitted.cumulative[-1] == pytest.approx(1)
        assert len(fitted.profile) == len(record.segments)


def test_an_average_of_each_family_ends_at_an_earlier_checkpoint(record: Record) -> None:
    at = 960 if "ema" in record.folder.name else 800
    profile = Window("500ba")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PlanWarning)
        average, error = record.average(profile, f"{at}ba"), record.error(profile, f"{at}ba")
    assert runs.error(average, profile, at) < 3 * error + 0.005
    with pytest.raises(TimeError, match="must end at a checkpoint"):
        record.average(profile, "801ba")


@pytest.mark.slow
def test_each_family_is_swept_and_exported(record: Record, tmp_path: Path) -> None:
    found = sweep(record, lambda state: float(state["weight"].square().mean()), points=3, refine=0, at=["50%", "100%"])
    assert found.best.error is not None
    record.export(Window("800ba"), tmp_path / "average.safetensors")
    assert (tmp_path / "average.safetensors").exists()
    if "snapshots" in getattr(record, "kind", ""):
        assert found.report(tmp_path / "report")


@pytest.mark.parametrize("write", [runs.write_icefall, runs.write_swa])
def test_a_window_between_two_prefix_means_is_their_difference(
    tmp_path: Path, write: Callable[[Path, int, int], None]
) -> None:
    write(tmp_path, 800, 100)
    record = Record.from_checkpoints(tmp_path, stored=Uniform() if write is runs.write_swa else None)
    expected = torch.stack([runs.flat(runs.weights(step)) for step in range(610, 801, 10)]).mean(dim=0)
    average = record.average(Window("200ba"))
    torch.testing.assert_close(runs.flat(average), expected, rtol=0, atol=3e-6)
    assert record.error(Window("200ba")) == 0


def test_an_average_that_is_stored_is_returned_as_it_is(tmp_path: Path) -> None:
    runs.write_edm2(tmp_path, 800, 100)
    record = Record.from_checkpoints(tmp_path)
    fitted = fit(PowerFunction(0.05), record.segments)
    assert fitted.coefficients == pytest.approx([0.0] * 15 + [1.0], abs=1e-4)
    assert record.average(PowerFunction(0.05)).keys() == {"weight", "bias", "constant"}


def published(ends: list[float], gammas: list[float], gamma: float) -> Tensor:
    """Return the coefficients of Karras et al. 2024: least squares of densities, whose inner products are integrals."""
    t, g = (torch.tensor(one, dtype=torch.float64) for one in (ends, gammas))

    def product(t1: Tensor, g1: Tensor, t2: Tensor, g2: Tensor) -> Tensor:
        # The integral from 0 to min(t1, t2) of (g1 + 1) s^g1 / t1^(g1 + 1) times the same of the other.
        least = torch.minimum(t1, t2)
        size = (g1 + 1) * (g2 + 1) / (g1 + g2 + 1)
        return size * (least / t1) ** (g1 + 1) * (least / t2) ** (g2 + 1) / least

    asked = product(t, g, t[-1], torch.tensor(gamma, dtype=torch.float64))
    found = torch.linalg.solve(product(t[:, None], g[:, None], t[None], g[None]), asked)
    return found / found.sum()


def test_snapshots_of_edm2_give_averages_at_least_as_near_as_the_published_method(tmp_path: Path) -> None:
    runs.write_edm2(tmp_path, STEPS, 100)
    record = Record.from_checkpoints(tmp_path, batch_size=1024)
    opened = [record.open(segment) for segment in record.segments]
    stored = []
    for one in opened:
        with one as file:
            stored.append(runs.flat({name: file.read(name) for name in runs.SHAPES}))
    ends = [float(one.end.updates) for one in record.segments]
    gammas = [PowerFunction(0.1 if i % 2 == 0 else 0.05).exponent for i in range(len(ends))]
    for sigma in (0.03, 0.04, 0.06, 0.08, 0.12, 0.15, 0.2, 0.25):
        profile = PowerFunction(sigma)
        theirs = published(ends, gammas, profile.exponent) @ torch.stack(stored)
        true = runs.truth(profile, STEPS)
        distance = float((theirs - true).norm() / (runs.flat(runs.weights(STEPS)) - true).norm())
        assert runs.error(record.average(profile), profile, STEPS) <= 1.05 * distance, sigma


def test_the_stride_of_post_hoc_ema_is_part_of_its_profile() -> None:
    folder = FILES / "ema_pytorch_10"
    right = Record.from_checkpoints(folder, stored=SIGMAS, update_every=10)
    wrong = Record.from_checkpoints(folder, stored=SIGMAS, update_every=1)
    profile = HalfLife("400ba", unbiased=True)
    assert runs.error(right.average(profile), profile, STEPS) < 0.03
    assert runs.error(wrong.average(profile), profile, STEPS) > 0.3


@pytest.mark.parametrize(("name", "every", "corrected"), [("ema_pytorch_10", 10, False), ("nitrous_ema", 10, True)])
def test_the_profile_of_post_hoc_ema_is_that_of_its_updates(name: str, every: int, corrected: bool) -> None:
    from polyak.checkpoints.series.posthoc import Strided

    gamma = PowerFunction(0.28).exponent
    average = {key: one.double() for key, one in runs.weights(1).items()}
    for step in range(0, STEPS, every):
        beta = ((step + 1) / (step + 2)) ** (gamma + 1)
        if corrected:
            beta = (beta * (1 - 1 / (step + 2 + every)) ** (gamma + 1)) ** (every / 2)
        for key, one in runs.weights(step + 1).items():
            average[key].lerp_(one.double(), 1 - beta)
    saved = torch.load(FILES / name / f"1.{STEPS}.pt")
    stored = runs.flat({key: saved[f"ema_model.{key}"] for key in runs.SHAPES})
    torch.testing.assert_close(stored, runs.flat(average), rtol=0, atol=2e-3 if name == "ema_pytorch_10" else 1e-5)
    middles = [i * every + 1 + (every - 1) / 2 for i in range(STEPS // every)]
    decay = Strided(gamma, every, corrected).decay(middles[10], middles[11])
    s = 11 * every
    expected = ((s + 1) / (s + 2)) ** (gamma + 1)
    if corrected:
        expected = (expected * ((s + 1 + every) / (s + 2 + every)) ** (gamma + 1)) ** (every / 2)
    assert decay == pytest.approx(expected)


@pytest.mark.parametrize("library", ["ema_pytorch", "nitrous_ema"])
def test_averages_of_post_hoc_ema_are_nearer_than_those_of_the_library(library: str, tmp_path: Path) -> None:
    module = pytest.importorskip(library)
    model = runs.module()
    post_hoc = module.PostHocEMA(
        model,
        sigma_rels=(0.05, 0.28),
        update_every=10,
        checkpoint_every_num_steps=100,
        checkpoint_folder=str(tmp_path),
        checkpoint_dtype=torch.float32,
    )
    for _ in runs.follow(model, 800):
        post_hoc.update()
    profile = PowerFunction(0.15)
    device = {"device": "cpu"} if library == "nitrous_ema" else {}
    theirs = post_hoc.synthesize_ema_model(sigma_rel=0.15, **device).ema_model.state_dict()
    ours = Record.from_checkpoints(tmp_path, stored=SIGMAS, update_every=10).average(profile)
    assert runs.error(ours, profile, 800) < 0.1 * runs.error(theirs, profile, 800)


def test_an_average_of_raw_checkpoints_states_a_large_error_and_is_refused_above_the_limit(tmp_path: Path) -> None:
    runs.write_raw(tmp_path, 800, 100)
    record = Record.from_checkpoints(tmp_path)
    with pytest.warns(PlanWarning, match="save checkpoints more often"):
        record.average(HalfLife("150ba", unbiased=True))
    with pytest.raises(ProfileError, match=r"within 25% .* error of about 5\d%\); ask for a longer average"):
        record.average(HalfLife("30ba", unbiased=True))


def test_one_half_life_is_read_as_another_where_the_files_have_its_profile(tmp_path: Path) -> None:
    for step, average in runs.moving_average(lambda _: 0.5 ** (1 / 100), 800, range(50, 801, 50)).items():
        torch.save({"ema": average, "step": step}, tmp_path / f"{step}.pt")
    with pytest.raises(CheckpointError, match="the profile of an average must be known .*--stored half-life=1000ba"):
        Record.from_checkpoints(tmp_path)
    record = Record.from_checkpoints(tmp_path, stored=HalfLife("100ba"))
    for profile in (HalfLife("200ba", unbiased=True), HalfLife("50ba", unbiased=True), Window("400ba")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PlanWarning)
            assert runs.error(record.average(profile), profile, 800) < 3 * record.error(profile) + 0.005


def test_states_of_composer_need_the_profile_of_their_average(tmp_path: Path) -> None:
    for step in (100, 200, 300):
        held = {"named_parameters_dict": runs.weights(step), "named_buffers_dict": {}}
        ema = {"repr": "EMA()", "ema_model": held, "ema_weights_active": False, "ema_started": True}
        state = {"model": runs.weights(step), "algorithms": [("EMA", ema)], "timestamp": {"Timestamp": {"batch": step}}}
        torch.save({"state": state, "metadata": {}}, tmp_path / f"ba{step}.pt")
    with pytest.raises(CheckpointError, match="the profile of an average must be known"):
        Record.from_checkpoints(tmp_path)
    record = Record.from_checkpoints(tmp_path, stored=HalfLife("50ba"))
    assert [one.end.updates for one in record.segments] == [100, 200, 300]


def test_an_averaged_model_is_read_as_a_plain_mean_with_a_warning(tmp_path: Path) -> None:
    runs.write_swa(tmp_path, 400, 100)
    with pytest.warns(PlanWarning, match=r"read as a plain mean.*say so by stored=Uniform\(\)"):
        Record.from_checkpoints(tmp_path)


def test_raw_weights_are_those_of_the_newest_checkpoint_if_it_has_them(tmp_path: Path) -> None:
    runs.write_icefall(tmp_path, 300, 100)
    record = Record.from_checkpoints(tmp_path)
    assert torch.equal(record.raw_weights()["weight"], runs.weights(300)["weight"])
    snapshots = tmp_path / "snapshots"
    snapshots.mkdir()
    runs.write_edm2(snapshots, 300, 100)
    with pytest.raises(RecordError, match="has only averages"):
        Record.from_checkpoints(snapshots).raw_weights()


def test_integers_and_buffers_are_those_of_the_newest_checkpoint(tmp_path: Path) -> None:
    runs.write_edm2(tmp_path, 300, 100)
    average = Record.from_checkpoints(tmp_path).average(PowerFunction(0.1))
    assert torch.equal(average["constant"], torch.tensor([3.0, 0.1]).half())
    for step in range(10, 90, 10):
        torch.save({"w": torch.ones(2), "n": torch.tensor(step)}, tmp_path / f"step-{step}.pt")
    assert Record.from_checkpoints(tmp_path / "step-*.pt").average(Window("80ba"))["n"] == 80


def test_times_are_given_where_checkpoints_do_not_say_them(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.pt" for name in ("first", "second", "third", "fourth")]
    for i, path in enumerate(paths):
        torch.save({"w": torch.full((2,), float(i))}, path)
    with pytest.raises(CheckpointError, match=r"first\.pt does not\); name it so: step-500\.pt, or give times"):
        Record.from_checkpoints(paths)
    record = Record.from_checkpoints(paths, times=["10ep", "20ep", "30ep", "40ep"])
    assert record.segments[-1].end.timestamp.epoch == 40
    with pytest.warns(PlanWarning):
        assert record.average(Window("40ep"))["w"].tolist() == [1.125, 1.125]


def test_a_checkpoint_that_changes_after_it_was_opened_is_refused(tmp_path: Path) -> None:
    runs.write_raw(tmp_path, 400, 100)
    record = Record.from_checkpoints(tmp_path)
    torch.save({"model": runs.weights(7)}, tmp_path / "step-200.pt")
    with pytest.raises(CheckpointError, match=r"step-200\.pt did\); wait until it is complete"):
        record.average(Window("400ba"))


def test_a_checkpoint_with_nan_is_refused_by_name(tmp_path: Path) -> None:
    runs.write_raw(tmp_path, 400, 100)
    broken = {"model": {**runs.weights(200), "bias": torch.full((6,), torch.nan)}, "global_step": 200}
    torch.save(broken, tmp_path / "step-200.pt")
    with pytest.raises(RecordError, match=r"bias in step-200\.pt has NaN or inf"):
        Record.from_checkpoints(tmp_path).average(Window("400ba"))


def test_files_that_are_replaced_are_evaluated_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    runs.write_raw(folder, 800, 50)
    called: list[Any] = []

    def evaluate(state: dict[str, Tensor]) -> float:
        called.append(state)
        return float(state["weight"].mean())

    for _ in range(2):
        sweep(Record.from_checkpoints(folder), evaluate, [Window("400ba")], minimize=True, results=tmp_path / "r.jsonl")
    before = len(called)
    torch.save({"model": runs.weights(100), "global_step": 400}, folder / "step-400.pt")
    sweep(Record.from_checkpoints(folder), evaluate, [Window("400ba")], minimize=True, results=tmp_path / "r.jsonl")
    assert (before, len(called)) == (2, 4)  # the raw weights, and the window


def test_memory_of_files_is_let_go_while_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from polyak.checkpoints.stored import Files
    from polyak.record import series

    runs.write_icefall(tmp_path, 400, 100)
    record = Record.from_checkpoints(tmp_path)
    released = dict[int, Files]()
    monkeypatch.setattr(series, "_HELD_BYTES", 500)
    monkeypatch.setattr(Files, "release", lambda files: released.update({id(files): files}))
    record.average(Window("400ba"))
    assert len(released) == 4


def test_profiles_of_custom_classes_are_stored_profiles_too(tmp_path: Path) -> None:
    for step, average in runs.moving_average(lambda _: 0.98, 400, range(25, 401, 25)).items():
        torch.save({"model": average, "step": step}, tmp_path / f"step-{step}.pt")
    profile: Profile = Smoothing(0.98)
    record = Record.from_checkpoints(tmp_path, stored=profile)
    assert fit(Smoothing(0.98), record.segments).coefficients[-1] == pytest.approx(1, abs=0.01)

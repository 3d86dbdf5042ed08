"""EMA's surface in MosaicML Composer: which class goes where, what can be set, clocks set back, states exchanged."""

import copy
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import loops
import pytest
import torch
from torch import Tensor, nn

import polyak
from polyak import ArgumentError, FixedError, HalfLife, PlanWarning, Record, TimeError, attach
from polyak.algorithm import NoLogger

if find_spec("mcli") is None:
    pytest.skip("Composer needs stubs: PYTHONPATH=tests/stubs pytest ..., as in `make test`", allow_module_level=True)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Composer's own
    from composer.algorithms.ema import ema as composers
    from composer.core import Event, State, Timestamp
    from composer.devices import DeviceCPU
    from composer_script import Keeps, trainer

    from polyak.hosts.composer import EMA, EMAParameters, Recorder

# Composer's own warnings are not ours to mend.
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error::polyak.errors.PlanWarning"),
    # As in all tests: these average a few batches.
    pytest.mark.filterwarnings("ignore:the average that is .* is mostly its first weights:polyak.errors.PlanWarning"),
    pytest.mark.filterwarnings("ignore:raw weights are .* averaging has not begun:polyak.errors.PlanWarning"),
    pytest.mark.filterwarnings("ignore:training has waited:polyak.errors.PlanWarning"),  # disks differ
]


def run(folder: Path, *algorithms: Any, seed: int = 0, **options: Any) -> Any:
    made = trainer(folder, *algorithms, net=loops.perceptron(seed), **{"callbacks": Keeps(), **options})
    made.keeps = next(c for c in made.state.callbacks if isinstance(c, Keeps))
    return made


def bare(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("net."): tensor for name, tensor in weights.items()}


def followed(weights: list[dict[str, Tensor]], kept: float) -> dict[str, Tensor]:
    """Return the average of weights after each update, in float64."""
    average = {name: tensor.double() for name, tensor in weights[0].items()}
    for now in weights[1:]:
        average = {name: kept * average[name] + (1 - kept) * now[name].double() for name in average}
    return average


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for name, tensor in want.items():
        torch.testing.assert_close(got[name].double(), tensor.double(), atol=1e-5, rtol=0)


class KeepsEach(Keeps):
    """Keeps the weights after each batch, whatever the clock says."""

    def __init__(self) -> None:
        super().__init__()
        self.each: list[dict[str, Tensor]] = []

    def run_event(self, event: Any, state: Any, logger: Any) -> None:
        super().run_event(event, state, logger)
        if event.value == "batch_end":
            self.each.append(loops.bits(state.model))


# Which class goes where


@pytest.mark.parametrize(("build", "argument"), [(polyak.EMA, "4ba"), (polyak.Recorder, "record")])
def test_an_algorithm_of_other_loops_in_composers_trainer_names_the_right_import(build, argument, tmp_path):
    with pytest.raises(ArgumentError, match=rf"from polyak\.hosts\.composer import {build.__name__}"):
        run(tmp_path, build(argument))


@pytest.mark.parametrize(
    ("build", "argument"),
    [(EMA, "4ba"), (composers.EMA, "4ba"), (Recorder, "record")],
    ids=["our EMA", "Composer's EMA", "Recorder"],
)
def test_an_algorithm_of_composers_trainer_in_any_other_loop_names_the_right_import(build, argument):
    model, says = loops.perceptron(), f"from polyak import {build.__name__}"
    with pytest.raises(ArgumentError, match=says):
        polyak.Trainer(model, loss=nn.functional.cross_entropy, algorithms=build(argument))
    for given in (build(argument), [build(argument)]):
        with pytest.raises(ArgumentError, match=says):
            attach(given, model, torch.optim.SGD(model.parameters(), lr=0.1))


# What can be set


def test_attributes_of_the_average_are_fixed_here_too():
    ema = EMA("4ba")
    for name in ("smoothing", "half_life", "update_interval", "ema_start", "training_model", "ema_weights_active"):
        with pytest.raises(FixedError, match=f"^{name}"):
            setattr(ema, name, 0.5)
    assert ema.smoothing == pytest.approx(0.5**0.25)
    ema.note = "mine"
    assert ema.note == "mine"
    assert not hasattr(ema.algorithm, "note")


def state(model: nn.Module) -> Any:
    return State(model=model, run_name="r", device=DeviceCPU(), rank_zero_seed=0, max_duration="100ep")


@pytest.mark.parametrize("kind", ["a module", "EMAParameters", "Composer's EMAParameters"])
@pytest.mark.parametrize("unit", ["ba", "ep"])
def test_an_average_that_was_set_is_updated_by_hand(kind, unit):
    first, model = loops.perceptron(0), loops.perceptron(1)
    build = {
        "a module": copy.deepcopy,
        "EMAParameters": EMAParameters,
        "Composer's EMAParameters": composers.EMAParameters,
    }[kind]
    ema, now = EMA(f"1{unit}"), state(model)
    ema.ema_model = build(first)
    ema.ema_started = True
    now.timestamp = Timestamp(epoch=1 if unit == "ep" else 0, batch=1)
    ema.apply(Event.BATCH_END if unit == "ba" else Event.EPOCH_END, now, NoLogger())
    want = followed([loops.bits(first), loops.bits(model)], 0.5)
    with pytest.raises(TimeError, match="time must have passed"):
        ema.apply(Event.BATCH_END, now, NoLogger())
    assert_close(loops.bits(ema.ema_model), want)
    ema.apply(Event.EVAL_START, now, NoLogger())
    assert_close(loops.bits(now.model), want)
    ema.apply(Event.EVAL_END, now, NoLogger())
    assert loops.differences(loops.bits(loops.perceptron(1)), loops.bits(now.model)) == []


def test_a_state_loads_without_strict_here_too(tmp_path):
    made = run(tmp_path, ema := EMA("4ba"))
    made.fit()
    saved = copy.deepcopy(ema.state_dict())
    name = next(iter(saved["ema_model"]))
    saved["ema_model"].pop(name)
    with pytest.warns(PlanWarning, match="strict=False"):
        ema.load_state_dict(saved, strict=False)


# A clock that is set back


@pytest.mark.parametrize(
    "arguments",
    [
        {"half_life": "4ba"},
        {"half_life": "8ba", "update_interval": "2ba"},
        {"half_life": "1ep", "update_interval": "1ba"},
    ],
)
def test_an_average_continues_where_a_second_fit_sets_the_clock_back(tmp_path, arguments):
    keeps, ema = KeepsEach(), EMA(**arguments)
    made = run(tmp_path, ema, callbacks=keeps, save=None, max_duration="2ep")
    made.fit()
    batches = len(keeps.each)
    made.fit(duration="2ep", reset_time=True)
    assert int(made.state.timestamp.batch) == batches
    assert len(keeps.each) == 2 * batches
    every = int(str(arguments.get("update_interval", "1ba")).removesuffix("ba"))
    updates = keeps.each if every == 1 else [keeps.each[0], *keeps.each[1::2]]
    if every == 1:
        kept = 0.5 ** (1 / 4) if arguments["half_life"] == "4ba" else 0.5 ** (2 / batches)
        assert_close(loops.bits(ema.ema_model), followed(updates, kept))
    assert ema.num_updates == len(updates) - 1


def test_a_record_continues_where_a_second_fit_sets_the_clock_back(tmp_path):
    keeps, recorder = KeepsEach(), Recorder(tmp_path / "record", interval="1ba", per_level=None, dtype=torch.float32)
    made = run(tmp_path, recorder, callbacks=keeps, save=None, max_duration="2ep")
    made.fit()
    made.fit(duration="1ep", reset_time=True)
    record = Record(tmp_path / "record")
    assert recorder.num_updates == len(keeps.each)
    assert_close(record.average(HalfLife("0ba")), keeps.each[-1])


@pytest.mark.parametrize("kind", ["ema", "record"])
def test_a_checkpoint_loads_with_its_clock_left_out(tmp_path, kind):
    def algorithm() -> Any:
        if kind == "ema":
            return EMA("4ba")
        return Recorder(tmp_path / "record", interval="1ba", per_level=None, dtype=torch.float32)

    made = run(tmp_path / "a", first := algorithm(), max_duration="6ba", save="6ba")
    made.fit()
    made.close()
    (path,) = (tmp_path / "a").glob("ep*-ba6-rank0.pt")
    keeps, again = KeepsEach(), algorithm()
    resumed = run(
        tmp_path / "b",
        again,
        seed=5,
        callbacks=keeps,
        save=None,
        max_duration="3ba",
        load_path=str(path),
        load_ignore_keys=["state/timestamp"],
    )
    assert int(resumed.state.timestamp.batch) == 0
    average = loops.bits(first.ema_model) if kind == "ema" else None
    resumed.fit()
    assert len(keeps.each) == 3
    assert again.num_updates == first.num_updates + 3
    if kind == "ema":
        assert_close(loops.bits(again.ema_model), followed([average, *keeps.each], 0.5**0.25))
    else:
        assert_close(Record(tmp_path / "record").average(HalfLife("0ba")), keeps.each[-1])


def test_skipped_steps_are_forgotten_where_the_clock_is_set_back(tmp_path):
    ema = EMA("4ba")
    made = run(tmp_path, ema, save=None, max_duration="6ba")
    made.fit()
    saved = ema.state_dict()
    view = ema._view
    view.skipped = 2
    made.fit(duration="4ba", reset_time=True)
    assert (view.skipped, ema.num_updates) == (0, 9)
    ema.load_state_dict(saved)
    assert view.batch == 6


# States that are exchanged


@pytest.mark.parametrize("half_life", ["4ba", "1ep"])
def test_composers_own_ema_resumes_from_our_checkpoint(tmp_path, half_life):
    made = run(tmp_path / "a", EMA(half_life), max_duration="2ep", save="1ep")
    made.fit()
    paths = sorted((tmp_path / "a").glob("ep1-*-rank0.pt"))
    content = torch.load(paths[0], weights_only=False)["state"]
    batch = int(content["timestamp"]["Timestamp"]["batch"])
    average = bare(content["model"])
    keeps = KeepsEach()
    theirs = composers.EMA(half_life)
    resumed = run(
        tmp_path / "b", theirs, seed=7, callbacks=keeps, save=None, max_duration="2ep", load_path=str(paths[0])
    )
    assert_close(bare(loops.bits(resumed.state.model)), average)
    resumed.fit()
    # It trains from the training weights, and averages on from the average.
    assert loops.differences(made.keeps.trained[batch + 1], keeps.each[0]) == []
    weights = [content["model"], *keeps.each] if half_life == "4ba" else [content["model"], keeps.each[-1]]
    theirs._ensure_training_weights_active(resumed.state)
    got = {**dict(theirs.ema_model.named_parameters())}
    assert_close(got, {n: t for n, t in followed(weights, theirs.smoothing).items() if n in got})


@pytest.mark.parametrize("taken_up", [True, False])
def test_a_checkpoint_whose_model_is_ignored_sets_the_weights_only_with_its_average(tmp_path, taken_up):
    made = run(tmp_path / "a", EMA("4ba"), max_duration="6ba", save="6ba")
    made.fit()
    (path,) = (tmp_path / "a").glob("ep*-ba6-rank0.pt")
    algorithms = [EMA("4ba")] if taken_up else []
    resumed = run(
        tmp_path / "b",
        *algorithms,
        seed=7,
        save=None,
        max_duration="9ba",
        load_path=str(path),
        load_ignore_keys=["state/model/*"],
        load_strict_model_weights=False,
    )
    # The average brings the training weights that it belongs to; without it, the model is not changed.
    want = made.state.model if taken_up else loops.perceptron(7)
    assert loops.differences(bare(loops.bits(want)), bare(loops.bits(resumed.state.model))) == []
    resumed.fit()


def test_states_of_two_equal_runs_are_equal_to_the_last_entry(tmp_path):
    states = []
    for name in ("a", "b"):
        made = run(tmp_path / name, ema := EMA("4ba"), save=None, max_duration="6ba")
        made.fit()
        states.append({key: value for key, value in ema.state_dict().items() if key != "ema_model"})
    assert states[0] == states[1]


def test_the_model_and_the_average_left_out_of_a_checkpoint_start_again(tmp_path):
    made = run(tmp_path / "a", EMA("4ba"), max_duration="6ba", save="6ba")
    made.fit()
    (path,) = (tmp_path / "a").glob("ep*-ba6-rank0.pt")
    again = run(
        tmp_path / "b",
        ema := EMA("4ba"),
        seed=7,
        save=None,
        max_duration="9ba",
        load_path=str(path),
        load_ignore_keys=["state/model/*", "state/algorithms"],
        load_strict_model_weights=False,
    )
    assert not ema.ema_started
    assert loops.differences(loops.bits(loops.perceptron(7)), bare(loops.bits(again.state.model))) == []
    again.fit()
    assert ema.num_updates == 2

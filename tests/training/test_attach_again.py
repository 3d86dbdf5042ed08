"""What is attached more than once, copied, or dropped; and times that a loop does not count."""

import copy
import gc
import io
import pickle
import warnings
import weakref
from typing import Any

import pytest
import reference
import torch
from torch import nn

from polyak import (
    EMA,
    Algorithm,
    CheckpointError,
    CopyError,
    Event,
    HalfLife,
    PlanWarning,
    Policy,
    ProfileError,
    Record,
    Recorder,
    Smoothing,
    TimeError,
    Trainer,
    Uniform,
    attach,
)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.inner(inputs)


class Counts(Algorithm):
    """Averages nothing, but says that it does; has a state, and can be copied."""

    swaps = True

    def __init__(self) -> None:
        self.batches, self.model = 0, None

    def match(self, event: Event, state: Any) -> bool:
        return event in {Event.INIT, Event.BATCH_END}

    def apply(self, event: Event, state: Any, logger: Any) -> None:
        self.model = state.model
        self.batches += event is Event.BATCH_END


class Notes(Counts):
    """The same, but with effects of its own."""

    swaps = False


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[torch.Tensor]:
    weights = []
    for _ in range(steps):
        optimizer.zero_grad()
        (model(torch.linspace(-1, 1, 32).reshape(8, 4)) - 1).square().mean().backward()
        optimizer.step()
        weights.append(next(model.parameters()).detach().clone())
    return weights


@pytest.fixture
def model() -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Model()


@pytest.fixture
def optimizer(model: Model) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)


# Dropped, and attached again


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.filterwarnings("ignore:a model should have one average")
def test_an_average_that_nobody_refers_to_is_released_when_a_cell_runs_again(model, optimizer, held) -> None:
    old, kept = [], []
    for _ in range(4):
        ema = attach(EMA("5ba"), model, optimizer)
        old.append(weakref.ref(ema.algorithm))
        kept.append(ema if held else None)
        train(model, optimizer, 2)
    gc.collect()
    assert [ref() is not None for ref in old] == [held, held, held, True]
    assert ema.algorithm.num_updates == 1
    # Nor do hooks remain, but for those of the last that was dropped.
    assert len(optimizer._optimizer_step_post_hooks) == (4 if held else 2)


def test_two_averages_that_begin_together_are_meant_unless_they_are_the_same(model, optimizer) -> None:
    first, second = attach(EMA("5ba"), model, optimizer), attach(EMA("9ba"), model, optimizer)
    train(model, optimizer, 3)
    assert first.algorithm.num_updates == second.algorithm.num_updates == 2
    third, fourth = attach(EMA("5ba"), other := Model(), optimizer := torch.optim.SGD(other.parameters(), lr=0.1)), None
    fourth = attach(EMA("5ba"), other, optimizer)
    with pytest.warns(PlanWarning, match="a model should have one average"):
        train(other, optimizer, 3)
    del third, fourth


@pytest.mark.parametrize("kind", ["held", "rebound", "detached", "other parameters", "a record"])
def test_a_second_average_of_the_same_steps_is_noticed_where_it_begins(model, optimizer, tmp_path, kind) -> None:
    first = attach(Recorder(tmp_path / "record", "2ba") if kind == "a record" else EMA("5ba"), model, optimizer)
    train(model, optimizer, 3)
    if kind == "rebound":
        first = attach(EMA("9ba"), model, optimizer)
    elif kind == "other parameters":
        model.other = nn.Linear(2, 2)
        other = torch.optim.SGD(model.other.parameters(), lr=0.1)
        second = attach(EMA("9ba"), model, other)
    else:
        if kind == "detached":
            first.detach()
        second = attach(EMA("9ba"), model, optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, optimizer, 3)
        if kind == "other parameters":
            assert second.loop.hooks is not None
            train(model, other, 3)
    found = [str(warning.message) for warning in caught]
    assert len(found) == (kind == "held"), found
    if found:
        assert "HalfLife(span=Time(5, 'ba')" in found[0]
        assert "call detach() of what the first attach returned" in found[0]
    assert first.algorithm.num_updates > 0


def test_an_average_is_updated_while_only_the_algorithm_is_referred_to(model, optimizer) -> None:
    ema = EMA("5ba")
    attach(ema, model, optimizer)
    gc.collect()
    train(model, optimizer, 5)
    assert ema.num_updates == 4


def test_an_algorithm_that_does_more_than_average_keeps_working_without_a_reference(model, optimizer, tmp_path) -> None:
    notes = weakref.ref(attach(Notes(), model, optimizer).algorithm)
    recorder = weakref.ref(attach(Recorder(tmp_path / "record", interval="2ba"), model, optimizer).algorithm)
    gc.collect()
    train(model, optimizer, 5)
    assert (notes().batches, recorder().num_updates) == (5, 5)


def test_an_algorithm_that_is_attached_again_follows_the_new_loop_alone(model, optimizer) -> None:
    ema = EMA(smoothing=0.5)
    first = attach(ema, model, optimizer)
    weights = train(model, optimizer, 3)
    with pytest.warns(PlanWarning, match=r"was attached already.*call detach\(\)"):
        second = attach(ema, model, optimizer)
    weights += train(model, optimizer, 3)
    assert (first.timestamp.batch, second.timestamp.batch) == ("3ba", "3ba")
    want = reference.online(weights, [0.5] * 5)
    torch.testing.assert_close(ema.ema_model.inner.weight.double(), want, rtol=1e-5, atol=1e-6)


def test_an_algorithm_follows_a_new_optimizer_when_the_old_one_is_gone(model) -> None:
    ema = EMA("3ba")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(ema, model, optimizer)
    train(model, optimizer, 3)
    optimizer = torch.optim.Adam(model.parameters())
    gc.collect()
    attached = attach(ema, model, optimizer)
    train(model, optimizer, 3)
    with attached.applied():
        pass
    assert ema.num_updates == 5


SPANS = [HalfLife("4ba"), HalfLife("20sp"), HalfLife("0.5ep"), HalfLife("0.1dur"), Uniform("3ba"), Smoothing(0.8)]
COUNTS = {"samples_per_step": 5, "steps_per_epoch": 8, "max_duration": "40ba"}
PER_BATCH = {"ba": 1, "sp": 5, "ep": 1 / 8, "dur": 1 / 40}


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("profile", SPANS, ids=repr)
def test_an_average_continues_where_the_clock_starts_again(model, optimizer, profile, interval) -> None:
    ema = EMA(profile=profile, update_interval=f"{interval}ba")
    with attach(ema, model, optimizer, **COUNTS):
        weights = train(model, optimizer, 20)
    updates = ema.num_updates
    average = ema.ema_model.inner.weight.detach().clone()
    with attach(ema, model, optimizer, **COUNTS):
        weights = train(model, optimizer, 20)
    moments = range(interval, 21, interval)
    assert ema.num_updates == updates + len(moments)
    # Between the last update by the old clock and the beginning of the new one no time has passed.
    per = PER_BATCH.get(str(profile.unit))
    at = {1: 20, 3: 18}[interval]
    if per is None:
        decays = [profile.decay(updates + i, updates + i + 1) for i in range(len(moments))]
    else:
        decays = [profile.decay((at + b - interval) * per, (at + b) * per) for b in moments]
    want = reference.online([average, *(weights[b - 1] for b in moments)], decays)
    torch.testing.assert_close(ema.ema_model.inner.weight.double(), want, rtol=1e-5, atol=1e-6)


def test_a_state_that_was_saved_after_the_clock_started_again_is_resumed(model, optimizer) -> None:
    ema = EMA("4ba")
    with attach(ema, model, optimizer):
        train(model, optimizer, 20)
    second = attach(ema, model, optimizer)
    train(model, optimizer, 5)
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict(), second.state_dict()])
    train(model, optimizer, 5)
    other, again = Model(), EMA("4ba")
    resumed = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.5)
    attached = attach(again, other, resumed)
    for one, state in zip((other, resumed, attached), saved, strict=True):
        one.load_state_dict(state)
    train(other, resumed, 5)
    assert torch.equal(again.ema_model.inner.weight, ema.ema_model.inner.weight)


def test_a_record_continues_where_the_clock_starts_again(model, optimizer, tmp_path) -> None:
    recorder = Recorder(tmp_path / "record", interval="5ba", per_level=None)
    for _ in range(2):
        with attach(recorder, model, optimizer, steps_per_epoch=8):
            train(model, optimizer, 20)
    third = attach(recorder, model, optimizer, steps_per_epoch=8)
    train(model, optimizer, 7)
    state = io.BytesIO()
    torch.save(third.state_dict(), state)
    train(model, optimizer, 3)
    third.detach()
    ends = [stretch.end for stretch in Record(tmp_path / "record").stretches]
    assert [end.updates for end in ends] == list(range(5, 51, 5))
    assert [end.timestamp.batch.value for end in ends] == list(range(5, 51, 5))
    assert [end.timestamp.elapsed("ep") for end in ends] == [number / 8 for number in range(5, 51, 5)]
    state.seek(0)
    again = attach(Recorder(tmp_path / "record", interval="5ba", per_level=None), model, optimizer, steps_per_epoch=8)
    again.load_state_dict(torch.load(state, weights_only=True))
    train(model, optimizer, 3)
    again.detach()
    assert [s.end.timestamp.batch.value for s in Record(tmp_path / "record").stretches] == list(range(5, 51, 5))


# Copies


def pickled(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


@pytest.mark.parametrize("by", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("held", ["apart", "by the model", "by a submodule"])
def test_a_copy_made_with_its_model_and_optimizer_follows_the_copied_ones(model, optimizer, by, held) -> None:
    attached = attach(Counts(), model, optimizer, steps_per_epoch=2)
    if held != "apart":
        (model if held == "by the model" else model.inner).attached = attached
    train(model, optimizer, 3)
    new_model, new_optimizer, again = by((model, optimizer, attached))
    if held != "apart":
        assert (new_model if held == "by the model" else new_model.inner).attached is again
    train(new_model, new_optimizer, 4)
    assert (attached.timestamp.batch, again.timestamp.batch, again.timestamp.epoch) == ("3ba", "7ba", "3ep")
    assert (attached.algorithm.batches, again.algorithm.batches) == (3, 7)
    assert attached.algorithm.model is model
    assert again.algorithm.model is new_model
    train(model, optimizer, 1)
    assert (attached.algorithm.batches, again.algorithm.batches) == (4, 7)
    again.detach()
    train(new_model, new_optimizer, 1)
    assert again.algorithm.batches == 7


@pytest.mark.parametrize("by", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_a_copy_of_a_loop_that_is_detached_or_counted_by_hand_stays_so(model, optimizer, by) -> None:
    detached, by_hand = attach(Counts(), model, optimizer), attach(Counts(), model, None)
    detached.detach()
    by_hand.step()
    with pytest.raises(ValueError, match="it is detached"):
        by(detached).step()
    again = by(by_hand)
    again.step()
    assert (by_hand.timestamp.batch, again.timestamp.batch) == ("1ba", "2ba")


class Locked:
    """A logger that cannot be copied."""

    def __init__(self) -> None:
        self.lines: list[Any] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.lines.append(metrics)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError("as planned")


def test_a_copy_logs_to_the_same_place_and_a_logger_that_cannot_be_pickled_is_refused(model, optimizer) -> None:
    attached = attach(Counts(), model, optimizer, logger=Locked())
    again = copy.deepcopy(attached)
    assert again.loop._logger is attached.loop._logger
    with pytest.raises(CopyError, match=r"Locked.*as planned.*load this one's state_dict\(\)"):
        pickle.dumps(attached)


def test_an_algorithm_that_cannot_be_copied_is_refused(model, optimizer) -> None:
    counts = Counts()
    counts.logger = Locked()
    with pytest.raises(CopyError, match=r"cannot be copied: as planned.*load this one's state_dict\(\)"):
        copy.deepcopy(attach(counts, model, optimizer))


# Times that are not counted


@pytest.mark.parametrize(
    ("options", "error", "argument"),
    [
        ({"ema_start": "4tok"}, TimeError, "tok for ema_start='4tok'.*tokens_per_step="),
        ({"update_interval": "4tok"}, TimeError, "tok for update_interval='4tok'.*tokens_per_step="),
        ({"half_life": "4tok"}, ProfileError, "tok for half_life='4tok'.*tokens_per_step="),
        ({"half_life": None, "profile": Uniform("4tok")}, ProfileError, r"tok for profile=Uniform\(.*tokens_per_step="),
        ({"ema_start": "1iter"}, TimeError, "iter for ema_start='1iter'.*Composer"),
        ({"update_interval": "1iter"}, TimeError, "iter for update_interval='1iter'.*Composer"),
        ({"half_life": "1iter"}, ProfileError, "iter for half_life='1iter'.*Composer"),
    ],
    ids=str,
)
@pytest.mark.parametrize("loop", ["attach", "by hand", "Trainer"])
def test_a_unit_that_the_loop_does_not_count_is_an_error_before_the_first_batch(
    model, optimizer, loop, options, error, argument
) -> None:
    ema = EMA(**{"half_life": "4ba", **options})
    with pytest.raises(error, match=f"the loop must count {argument}"):
        if loop == "Trainer":
            Trainer(model, [torch.ones(2, 4)], "1ep", optimizers=optimizer, algorithms=ema, loss=nn.functional.mse_loss)
        else:
            attach(ema, model, optimizer if loop == "attach" else None)


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"ema_start": "8sp"}, "sp for ema_start='8sp'.*samples_per_step="),
        ({"ema_start": "1h"}, "sec for ema_start='3600sec'.*Trainer"),
        ({"update_interval": "30sec"}, "sec for update_interval='30sec'"),
        ({"ema_start": "1ep"}, "ep for ema_start='1ep', and it counts ba; .*steps_per_epoch='by hand' if you call"),
        ({"update_interval": "1ep"}, "ep for update_interval='1ep', and it counts ba; .*steps_per_epoch="),
        ({"ema_start": "0.5dur"}, "sp for ema_start='0.5dur', max_duration='100sp'"),
    ],
    ids=str,
)
def test_attach_counts_only_the_units_that_it_was_given(model, optimizer, options, argument) -> None:
    with pytest.raises(TimeError, match=f"the loop must count {argument}"):
        attach(EMA("4ba", **options), model, optimizer, max_duration="100sp")


def test_a_share_of_a_run_whose_length_fit_gets_is_known_then(model, optimizer) -> None:
    data = [(torch.ones(2, 4), torch.ones(2, 2))] * 4
    ema = EMA("2ba", ema_start="0.5dur")
    trainer = Trainer(model, data, optimizers=optimizer, algorithms=ema, loss=nn.functional.mse_loss)
    trainer.fit(duration="2ep")
    assert ema.num_updates == 4
    with pytest.raises(TimeError, match="tok for ema_start='4tok'"):
        Trainer(model, data, optimizers=optimizer, algorithms=EMA(ema_start="4tok"), loss=nn.functional.mse_loss)


def test_a_recorders_interval_must_be_counted_too(model, optimizer, tmp_path) -> None:
    with pytest.raises(TimeError, match="the loop must count tok for interval='4tok'"):
        attach(Recorder(tmp_path, interval="4tok"), model, optimizer)


def test_a_recorder_whose_segments_are_shares_of_the_run_needs_its_length_where_it_is_attached(
    model, optimizer, tmp_path
) -> None:
    with pytest.raises(TimeError, match="length of a segment must be known"):
        attach(Recorder(tmp_path), model, optimizer)


@pytest.mark.parametrize(
    "options", [{"ema_start": "2ep"}, {"half_life": "1ep"}, {"ema_start": "0.5ep", "half_life": "1ep"}]
)
def test_whole_epochs_may_be_counted_by_hand(model, optimizer, options) -> None:
    ema = EMA(**{"half_life": "3ba", **options})
    with attach(ema, model, optimizer, steps_per_epoch="by hand") as attached:
        for _ in range(4):
            train(model, optimizer, 3)
            attached.end_epoch()
    assert ema.num_updates > 0


def test_epochs_that_are_counted_by_hand_have_no_fractions(model, optimizer) -> None:
    with pytest.raises(TimeError, match="ep for ema_start='1.5ep', and it counts only whole ba, ep"):
        attach(EMA("4ba", ema_start="1.5ep"), model, optimizer, steps_per_epoch="by hand")


def test_a_half_life_in_epochs_of_unknown_length_is_an_error_where_it_is_attached(model, optimizer) -> None:
    with pytest.raises(ProfileError, match="ep for half_life='1ep', and it counts ba; .*steps_per_epoch="):
        attach(EMA("1ep"), model, optimizer)


def test_a_run_without_an_update_ends_with_a_warning(model, optimizer) -> None:
    with (
        pytest.warns(PlanWarning, match="was not updated in this run: its last update was at 1ba.*from 0ba to 20ba"),
        attach(EMA("5ba", update_interval="50ba"), model, optimizer),
    ):
        train(model, optimizer, 20)


def test_a_model_with_nothing_to_average_is_warned_of_where_averaging_begins() -> None:
    model = nn.Linear(2, 1).requires_grad_(requires_grad=False)
    attached = attach(EMA(smoothing=0.5), model, None)
    with pytest.warns(PlanWarning, match="nothing to average: of the 2 parameters of Linear none is trained"):
        attached.step()
    ema = EMA(smoothing=0.5, policy=lambda _: Policy.AVERAGE)
    evolved = attach(ema, model, None)
    for value in (0.0, 1.0):
        model.weight.fill_(value)
        evolved.step()
    assert torch.equal(ema.ema_model.weight, torch.full((1, 2), 0.5))


@pytest.mark.parametrize("use", ["save", "publish"])
def test_a_replaced_optimizer_is_noticed_where_weights_are_saved_or_published(model, optimizer, tmp_path, use) -> None:
    ema = attach(EMA("3ba"), model, optimizer)
    other = torch.optim.Adam(model.parameters())
    train(model, optimizer, 3)
    train(model, other, 3)
    with pytest.warns(PlanWarning, match="since then 3 of Adam"):
        ema.save(tmp_path / "a.safetensors") if use == "save" else ema.publish(lambda name, tensor: None)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda s: s.update(timestamp=None), "numbers in 'timestamp'"),
        (lambda s: s["timestamp"].pop("batch"), "numbers in 'timestamp'"),
        (lambda s: s.update(algorithms=None), "pairs of a name and a state"),
        (lambda s: s.update(algorithms=[["EMA"]]), "pairs of a name and a state"),
        (lambda s: s["algorithms"][0][1].update(num_updates=None), "another kind of num_updates"),
        (lambda s: s["algorithms"][0][1].update(ema_model=None), "another kind of ema_model"),
        (
            lambda s: s["algorithms"][0][1]["ema_model"].update({"inner.bias": [1.0]}),
            r"another kind of ema_model\['inner.bias'\]",
        ),
        (
            lambda s: s["algorithms"][0][1]["ema_model"].update({"inner.bias": torch.ones(1, device="meta")}),
            "another kind of ema",
        ),
        (
            lambda s: s["algorithms"][0][1]["ema_model"].update({"inner.bias": torch.ones(2).long()}),
            "got torch.int64 for 'inner.bias'",
        ),
    ],
)
def test_a_state_that_is_not_whole_is_refused_by_name_and_changes_nothing(model, optimizer, spoil, says) -> None:
    ema = attach(EMA(smoothing=0.5), model, optimizer)
    train(model, optimizer, 3)
    before = {name: tensor.clone() for name, tensor in ema.model.state_dict().items()}
    state = copy.deepcopy(ema.state_dict())
    state["algorithms"] = [list(pair) for pair in state["algorithms"]]
    spoil(state)
    with pytest.raises(CheckpointError, match=says):
        ema.load_state_dict(state)
    assert ema.average.num_updates == 2
    assert all(torch.equal(before[name], tensor) for name, tensor in ema.model.state_dict().items())


def test_a_name_with_a_line_separator_is_resumed_as_it_was_decided() -> None:
    def made() -> tuple[nn.Linear, torch.optim.Optimizer]:
        model = nn.Linear(2, 1)
        model.register_buffer("count\u2028er", torch.zeros(1))
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    model, optimizer = made()
    ema = attach(EMA(smoothing=0.5), model, optimizer)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    again, other = made()
    resumed = attach(EMA(smoothing=0.5), again, other)
    resumed.load_state_dict(ema.state_dict())
    again._buffers["count\u2028er"] += 4
    again(torch.ones(1, 2)).sum().backward()
    other.step()
    assert resumed.state_dict()["algorithms"][0][1]["ema_model"]["count\u2028er"].item() == 4.0


def test_a_lazily_built_model_is_shown_before_it_is_built() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    assert "Sequential (10 parameters)" in repr(attach(EMA("5ba"), model, torch.optim.SGD(model.parameters(), lr=0.1)))

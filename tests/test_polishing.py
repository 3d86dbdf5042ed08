"""A polish begins with the average, keeps the optimizer's state, and ends at a rate of 0."""

import copy

import pytest
import torch
from torch import nn

from polyak import (
    EMA,
    ArgumentError,
    HalfLife,
    LoanError,
    MismatchError,
    PlanWarning,
    Record,
    Recorder,
    RecordError,
    Uniform,
    attach,
    polish,
)
from polyak.record import Writer
from polyak.storage.safetensors import TensorInfo


def net(width: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 1))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, scheduler=None) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 3)).square().mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def trained(*algorithms, steps: int = 32):
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    attached = attach(list(algorithms), model, optimizer)
    train(model, optimizer, steps)
    return model, optimizer, attached


def state_of(thing) -> dict:
    return copy.deepcopy(thing.state_dict())


def equal(some: dict, others: dict) -> bool:
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


@pytest.mark.parametrize("given", ["the average", "the record"])
def test_training_continues_after_a_polish_without_a_warning_of_weights_that_have_changed(tmp_path, given) -> None:
    algorithms = EMA("4ba"), Recorder(tmp_path / "record", "1ba")
    model, optimizer, attached = trained(*algorithms, steps=10)  # from step 10 to 11 weights are watched
    attached.state_dict()  # waits until all segments are written
    average = attached if given == "the average" else Record(tmp_path / "record")
    polish(model, optimizer, average, steps=3, profile=None if given == "the average" else Uniform())
    train(model, optimizer, 2)


@pytest.mark.parametrize("given", ["what attach returned", "the EMA"])
def test_a_polish_starts_at_the_average_with_the_state_of_the_optimizer(given) -> None:
    model, optimizer, attached = trained(ema := EMA("4ba"))
    with attached.applied():
        averaged = state_of(model)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    assert not equal(state_of(model), averaged)
    polish(model, optimizer, ema if given == "the EMA" else attached, steps=5)
    assert equal(state_of(model), averaged)
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(before[i][name], after[i][name]) for i in before for name in before[i])


def test_the_rates_fall_linearly_to_zero_whatever_scheduler_came_before() -> None:
    model, optimizer, attached = trained(EMA("4ba"))
    earlier = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    train(model, optimizer, 1, earlier)
    now = optimizer.param_groups[0]["lr"]
    assert now == 0.005
    scheduler, rates = polish(model, optimizer, attached, steps=4, factor=0.4), []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"] / now)
        train(model, optimizer, 1, scheduler)
    assert rates == pytest.approx([0.4, 0.3, 0.2, 0.1, 0, 0])


def test_a_polish_is_what_one_would_write_by_hand() -> None:
    model, optimizer, attached = trained(EMA("4ba"))
    other = net()
    with attached.applied():
        other.load_state_dict(model.state_dict())
    others = torch.optim.Adam(other.parameters(), lr=0.01)
    others.load_state_dict(state_of(optimizer))
    scheduler = polish(model, optimizer, attached, steps=3)
    attached.detach()
    torch.manual_seed(1)
    train(model, optimizer, 3, scheduler)
    torch.manual_seed(1)
    for n in range(3):
        others.param_groups[0]["lr"] = 0.01 * 0.3 * (1 - n / 3)
        train(other, others, 1)
    assert equal(state_of(model), state_of(other))


@pytest.mark.slow
@pytest.mark.parametrize("profile", [None, Uniform("16ba")])
def test_a_polish_from_a_record_starts_at_the_average_asked_for(tmp_path, profile) -> None:
    model, optimizer, attached = trained(Recorder(tmp_path / "record", "1ba"), steps=64)
    attached.detach()
    record = Record(tmp_path / "record")
    expected = record.average(profile or HalfLife("4ba", unbiased=True))
    polish(model, optimizer, record, steps=5, profile=profile)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.items())


def test_tied_weights_stay_tied(tmp_path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(x))

    model = Tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    attached = attach([EMA("4ba"), Recorder(tmp_path / "record", "1ba")], model, optimizer)
    train(model, optimizer, 20)
    attached.detach()
    for average in (attached, Record(tmp_path / "record")):
        polish(model, optimizer, average, steps=2)
        assert model.one.weight is model.two.weight
        assert isinstance(model.one.weight, nn.Parameter)


def test_what_cannot_be_polished_is_refused_by_name_and_nothing_changes(tmp_path) -> None:
    model, optimizer, attached = trained(ema := EMA("4ba"), Recorder(tmp_path / "record", "1ba"))
    before, rate = state_of(model), optimizer.param_groups[0]["lr"]
    with attached.applied(), pytest.raises(LoanError):
        polish(model, optimizer, attached, steps=5)
    attached.detach()
    other = net(5)
    wide = net(5)
    wrong = [
        (ArgumentError, "model must be the torch.nn.Module", lambda: polish(before, optimizer, ema, 5)),
        (ArgumentError, "optimizer must be one of torch.optim", lambda: polish(model, model.parameters(), ema, 5)),
        (ArgumentError, "optimizer must move the model's", lambda: polish(wide, optimizer, ema, 5)),
        (ArgumentError, "factor must be above 0", lambda: polish(model, optimizer, ema, 5, factor=float("nan"))),
        (
            MismatchError,
            "the model to polish must be the one that was averaged",
            lambda: polish(wide, torch.optim.SGD(wide.parameters()), ema, 5),
        ),
        (ArgumentError, "steps must be a whole number of at least 1", lambda: polish(model, optimizer, ema, 0)),
        (ArgumentError, "steps must be", lambda: polish(model, optimizer, ema, 0.05)),
        (ArgumentError, "factor must be above 0", lambda: polish(model, optimizer, ema, 5, factor=0)),
        (ArgumentError, "average must be what attach returned", lambda: polish(model, optimizer, before, 5)),
        (ArgumentError, "profile must be None unless", lambda: polish(model, optimizer, ema, 5, profile=Uniform())),
        (
            MismatchError,
            "the model to polish must be that of the record",
            lambda: polish(other, torch.optim.SGD(other.parameters()), Record(tmp_path / "record"), 5),
        ),
    ]
    for kind, message, act in wrong:
        with pytest.raises(kind, match=message):
            act()
    assert equal(state_of(model), before)
    assert optimizer.param_groups[0]["lr"] == rate


def test_a_model_with_merged_adapters_is_not_polished(tmp_path) -> None:
    model, optimizer, attached = trained(ema := EMA("4ba"), Recorder(tmp_path / "record", "1ba"))
    model[0].weight.requires_grad_(False)
    model[0].merged = True
    attached.detach()
    before = state_of(model)
    for average in (ema, Record(tmp_path / "record")):
        with pytest.raises(LoanError, match="adapters must not be merged"):
            polish(model, optimizer, average, steps=5)
    assert equal(state_of(model), before)


def test_an_average_that_has_not_begun_and_an_empty_record_are_refused(tmp_path) -> None:
    model, optimizer, attached = trained(EMA("4ba", ema_start="100ba"), steps=3)
    with pytest.raises(LoanError, match="averaging must have begun"):
        polish(model, optimizer, attached, steps=5)
    with pytest.warns(PlanWarning, match="averaging never started"):
        attached.detach()
    with Writer(tmp_path, {"weight": TensorInfo(torch.float32, (1, 3), averaged=True)}):
        model = nn.Linear(3, 1, bias=False)
    with pytest.raises(RecordError, match="is empty"):
        polish(model, torch.optim.SGD(model.parameters()), Record(tmp_path), steps=5)

"""Nothing averages in silence: raw weights, and averages of mostly the first weights, are used with one warning."""

import math
import warnings
from collections.abc import Iterator
from pathlib import Path

import loops
import pytest
import torch
from torch import nn

from polyak import EMA, HalfLife, PowerFunction, Smoothing, Uniform, Warmup, attach, export_averaged
from polyak.averaging.youth import share_of_first_weights
from polyak.errors import PlanWarning

YOUNG, RAW = "is mostly its first weights", "averaging has not begun"


@pytest.fixture
def model() -> nn.Module:
    return loops.perceptron()


@pytest.fixture
def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05)


@pytest.fixture
def caught() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as all_of_them:
        warnings.simplefilter("always")
        yield all_of_them


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(2, 6)).square().mean().backward()
        optimizer.step()


def test_an_evaluation_before_averaging_has_begun_warns_once_with_numbers_and_remedy(model, optimizer, caught) -> None:
    attached = attach(EMA("100ba", ema_start="50ba"), model, optimizer)
    train(model, optimizer, 30)
    for _ in range(3):
        with attached.applied():
            pass
    (warning,) = caught
    assert warning.category is PlanWarning
    for part in ("raw weights are evaluated", "0 updates at 30ba", "ema_start='50ba'", "half-life 100ba", "earlier"):
        assert part in str(warning.message)


def test_an_evaluation_of_mostly_the_first_weights_warns_once_with_numbers_and_remedy(model, optimizer, caught) -> None:
    attached = attach(EMA("1000ba"), model, optimizer)
    train(model, optimizer, 30)
    for _ in range(3):
        with attached.applied():
            pass
    (warning,) = caught
    share = f"{2 ** -(29 / 1000):.1%}"
    for part in (
        share,
        "29 updates",
        "half-life 1000ba",
        "shorter half-life",
        "unbiased=True",
        "Warmup",
        "raw weights",
    ):
        assert part in str(warning.message)


def test_an_average_that_was_warned_of_as_raw_is_not_warned_of_again_as_young(model, optimizer, caught) -> None:
    attached = attach(EMA("1000ba", ema_start="5ba"), model, optimizer)
    for _ in range(2):
        train(model, optimizer, 4)
        with attached.applied():
            pass
    assert len(caught) == 1


def test_a_smoothing_is_told_as_a_half_life_too(model, optimizer) -> None:
    attached = attach(EMA(smoothing=0.999), model, optimizer)
    train(model, optimizer, 3)
    with (
        pytest.warns(PlanWarning, match=r"99.8% of it after 2 updates \(smoothing 0.999, a half-life of 692.8 updates"),
        attached.applied(),
    ):
        pass


@pytest.mark.parametrize(
    "options",
    [
        {"half_life": "4ba"},
        {"half_life": "0ba"},
        {"half_life": "infba"},
        {"smoothing": 0.0},
        {"profile": HalfLife("1000ba", unbiased=True)},
        {"profile": HalfLife("1000ba", unbiased=True), "update_interval": "10ba"},
        {"profile": HalfLife("infba", unbiased=True)},
        {"profile": Uniform()},
        {"profile": Uniform(), "update_interval": "100ba"},
        {"profile": PowerFunction(0.1)},
        {"profile": Warmup(Smoothing(0.9999))},
        {"profile": Warmup(HalfLife("1000ba"), power=2 / 3)},
        {"profile": Warmup(Smoothing(0.9999)), "ema_start": "10ba"},
    ],
    ids=str,
)
def test_averages_that_forget_their_first_weights_are_used_without_a_warning(model, optimizer, options, caught) -> None:
    attached = attach(EMA(**{"half_life": None, **options}), model, optimizer)
    for _ in range(2):
        train(model, optimizer, 12)
        with attached.applied():
            pass
    assert [str(warning.message) for warning in caught] == []


def test_before_the_first_batch_there_is_nothing_to_warn_of(model, optimizer, caught) -> None:
    with attach(EMA("1000ba"), model, optimizer).applied():
        pass
    assert not caught


@pytest.mark.parametrize(
    ("options", "counts", "steps", "want"),
    [
        ({"half_life": "1000ba"}, {}, 30, 2 ** -(29 / 1000)),
        ({"half_life": "1000ba", "update_interval": "10ba"}, {}, 35, 2 ** -(29 / 1000)),
        ({"half_life": "1000ba", "ema_start": "10ba"}, {}, 35, 2 ** -(25 / 1000)),
        ({"half_life": "10ep"}, {"steps_per_epoch": 5}, 15, 2 ** -(2 / 10)),
        ({"half_life": "10ep", "update_interval": "1ba"}, {"steps_per_epoch": 5}, 15, 2 ** -(14 / 50)),
        ({"half_life": "2dur"}, {"max_duration": "40ba"}, 20, 2 ** -(19 / 80)),
        ({"half_life": "100tok"}, {"tokens_per_step": 7}, 11, 2 ** -(70 / 100)),
        ({"smoothing": 0.9}, {}, 5, 0.9**4),
        ({"smoothing": 0.9, "update_interval": "3ba"}, {}, 7, 0.9**2),
        ({"half_life": "10ba", "update_interval": "50ba"}, {}, 4, 1.0),
        ({"profile": Warmup(Smoothing(0.9999))}, {}, 3, 0.1 * 2 / 11),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:the first weights will still be")
def test_the_share_of_the_first_weights_is_the_product_of_the_decays(model, optimizer, options, counts, steps, want):
    ema = EMA(**{"half_life": None, **options})
    attach(ema, model, optimizer, **counts)
    train(model, optimizer, steps)
    average = ema._average
    assert math.isclose(share_of_first_weights(average.schedule, average.progress, ema.num_updates), want)


def test_a_resumed_average_is_as_old_as_the_one_that_was_saved(model, optimizer, caught) -> None:
    first = attach(EMA("10ba"), model, optimizer)
    train(model, optimizer, 7)
    other = loops.perceptron()
    steps = torch.optim.SGD(other.parameters(), lr=0.05)
    second = attach(EMA("10ba"), other, steps)
    second.load_state_dict(first.state_dict())
    with second.applied():
        pass
    assert f"{2**-0.6:.1%} of it after 6 updates" in str(caught.pop().message)
    third = attach(EMA("10ba"), other, steps)
    third.load_state_dict(first.state_dict())
    train(other, steps, 4)
    with third.applied():
        pass
    assert [str(warning.message) for warning in caught if YOUNG in str(warning.message)] == []


def test_an_average_that_was_given_is_as_old_as_its_user_knows(model, optimizer, caught) -> None:
    ema = EMA("1000ba")
    attached = attach(ema, model, optimizer)
    ema.ema_model = loops.perceptron(seed=1)
    train(model, optimizer, 3)
    with attached.applied():
        pass
    assert not caught


@pytest.mark.parametrize("how", ["get_ema_model", "another model", "export"])
def test_a_young_average_that_is_copied_or_exported_is_warned_of(model, optimizer, tmp_path: Path, how: str) -> None:
    ema = EMA("1000ba")
    attach(ema, model, optimizer)
    train(model, optimizer, 3)
    with pytest.warns(PlanWarning, match=f"{YOUNG}.*99.9% of it after 2 updates"):
        if how == "export":
            export_averaged(ema, model, tmp_path / "averaged")
        else:
            ema.get_ema_model(model if how == "get_ema_model" else loops.perceptron())
    ema.get_training_model(model)


def test_an_update_asks_nothing_of_the_age_of_an_average(model, optimizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyak.averaging.youth.warn_of_youth", lambda *_: pytest.fail("in a step"))
    monkeypatch.setattr("polyak.averaging.youth.share_of_first_weights", lambda *_: pytest.fail("in a step"))
    attach(EMA("1000ba"), model, optimizer)
    train(model, optimizer, 3)


@pytest.mark.parametrize(
    ("half_life", "interval", "warns"),
    [("1ba", "100ba", True), ("0.05ba", "1ba", True), ("0ba", "1ba", False), ("1ba", "10ba", False)],
)
def test_an_interval_of_many_half_lives_is_warned_of_before_the_first_update(half_life, interval, warns) -> None:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attached = attach(EMA(half_life, update_interval=interval), model, optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(torch.ones(1, 1)).sum().backward()
        optimizer.step()
    assert any("little more than the last weights" in str(warning.message) for warning in caught) is warns
    attached.load_state_dict(attached.state_dict())

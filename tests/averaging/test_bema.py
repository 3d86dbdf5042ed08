"""``BEMA`` against its authors' formula, and where it is saved, resumed, copied and refused."""

import copy
import pickle

import pytest
import torch
from torch import nn

from polyak import BEMA, EMA, ArgumentError, CheckpointError, Momentum, PlanWarning, ProfileError, TimeError, attach

torch.set_num_threads(1)


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).to(dtype)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(8, 3).to(next(model.parameters()).dtype)).square().mean().backward()
    optimizer.step()


def attached(bema: EMA, model: nn.Module | None = None):
    model = net() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, optimizer, attach(bema, model, optimizer)


def copies(model: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(dict(model.state_dict()))


def equal(some, others) -> bool:
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


@pytest.mark.parametrize(
    ("options", "start", "stride"),
    [
        ({}, 0, 1),
        ({"update_interval": "3ba"}, 0, 3),
        ({"ema_power": 0.2, "bias_power": 0.8, "lag": 1, "multiplier": 2.5}, 0, 1),
        ({"bias_power": None}, 0, 1),
        ({"ema_power": 0.0}, 0, 1),
        ({"ema_start": "7ba"}, 7, 1),
    ],
)
def test_the_average_is_that_of_the_authors_formula(options, start, stride) -> None:
    model, optimizer, ema = attached(BEMA(**options))
    kappa, eta = options.get("ema_power", 0.5), options.get("bias_power", 0.2)
    rho, gamma = options.get("lag", 10), options.get("multiplier", 1.0)
    first = trailing = copies(model)
    for t in range(1, 31):
        step(model, optimizer)
        now = copies(model)
        if t == 1 and not start:
            # The first weights are taken at the first step, when a forward pass has moved statistics already.
            trailing = {name: now[name] if "1." in name and "running" in name else one for name, one in first.items()}
        if t == start:
            first = trailing = now
        if t <= start or (t - start) % stride:
            continue
        age = rho + gamma * (t - start)
        beta = age**-kappa
        trailing = {
            name: (1 - beta) * trailing[name] + beta * one if one.is_floating_point() else one
            for name, one in now.items()
        }
        alpha = 0.0 if eta is None else age**-eta
        got = ema.model.state_dict()
        for name, _ in model.named_parameters():
            want = trailing[name] + alpha * (now[name] - first[name])
            assert torch.allclose(got[name], want, rtol=1e-12, atol=1e-14)
        # A variance that is corrected might be negative.
        assert torch.allclose(got["1.running_var"], trailing["1.running_var"], rtol=1e-12, atol=1e-14)
        assert got["1.num_batches_tracked"] == t


def test_the_average_is_swapped_in_and_the_training_weights_are_restored_bit_for_bit() -> None:
    model, optimizer, ema = attached(BEMA(), net(torch.float32))
    for _ in range(5):
        step(model, optimizer)
    trained, averaged = copies(model), copies(ema.model)
    with ema.applied():
        assert equal(copies(model), averaged)
    assert equal(copies(model), trained)
    assert not equal(trained, averaged)


@pytest.mark.parametrize("swapped", [False, True])
def test_a_saved_run_resumes_bit_for_bit_also_from_a_state_of_swapped_weights(swapped) -> None:
    model, optimizer, ema = attached(BEMA(update_interval="2ba"))
    for _ in range(5):
        step(model, optimizer)
    trained, moments = copies(model), copy.deepcopy(optimizer.state_dict())
    if swapped:
        with ema.applied():
            state = copy.deepcopy(ema.state_dict())
    else:
        state = copy.deepcopy(ema.state_dict())
    other = net()
    other.load_state_dict(trained)
    _, others, resumed = attached(BEMA(update_interval="2ba"), other)
    others.load_state_dict(moments)
    resumed.load_state_dict(state)
    for run, its in ((model, optimizer), (other, others)):
        torch.manual_seed(1)
        for _ in range(6):
            step(run, its)
    assert equal(copies(ema.model), copies(resumed.model))


def test_a_copy_and_a_pickle_have_the_same_average() -> None:
    bema = BEMA()
    model, optimizer, ema = attached(bema)
    for _ in range(3):
        step(model, optimizer)
    for other in (copy.deepcopy(bema), pickle.loads(pickle.dumps(bema))):
        state, again = bema.state_dict(), other.state_dict()
        for part in ("ema_model", "trailing", "first"):
            assert equal(state[part], again[part])
    ema.detach()


def test_weights_with_nan_leave_their_elements_of_the_average_as_they_were() -> None:
    model, optimizer, ema = attached(BEMA())
    for _ in range(3):
        step(model, optimizer)
    before = copies(ema.model)
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    optimizer.zero_grad()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    after = copies(ema.model)
    assert after["0.weight"][0, 0] == before["0.weight"][0, 0]
    assert (after["0.weight"] != before["0.weight"]).sum() == after["0.weight"].numel() - 1
    with pytest.warns(Warning, match="NaN or inf"):
        ema.detach()


def test_a_bfloat16_model_has_a_float32_average() -> None:
    model, optimizer, ema = attached(BEMA(), net(torch.bfloat16))
    step(model, optimizer)
    assert ema.model[0].weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"ema_power": 1.5}, ArgumentError, "ema_power must be a number from 0 to 1"),
        ({"bias_power": -0.1}, ArgumentError, "bias_power must be a number from 0 to 1"),
        ({"lag": 0.5}, ArgumentError, "lag must be a number finite and at least 1"),
        ({"multiplier": 0}, ArgumentError, "multiplier must be above 0"),
        ({"lag": True}, ArgumentError, "lag must be a number"),
        ({"lag": float("nan")}, ArgumentError, "lag must be a number"),
        ({"update_interval": "1ep"}, TimeError, "update_interval of a BEMA must be a number of steps"),
        ({"update_interval": "0ba"}, TimeError, "update_interval must be above 0"),
    ],
)
def test_an_argument_out_of_range_is_a_clear_error(options, kind, message) -> None:
    with pytest.raises(kind, match=message):
        BEMA(**options)


def test_the_state_of_another_average_is_refused() -> None:
    ema = EMA("4ba")
    model, optimizer, handle = attached(ema)
    for _ in range(5):
        step(model, optimizer)
    state = copy.deepcopy(ema.state_dict())
    handle.detach()
    bema = BEMA()
    attached(bema, model)
    with (
        pytest.warns(PlanWarning, match="was averaged so far by EMA"),
        pytest.raises(CheckpointError, match="must be that of a BEMA"),
    ):
        bema.load_state_dict(state)


def test_a_momentum_over_the_run_is_that_of_a_teacher() -> None:
    model, teacher = net(), net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = attach(EMA(profile=Momentum(0.9, 1.0, over="1dur")), model, optimizer, max_duration="20 steps")
    schedule = [
        1 - (1 - 0.9) * (torch.cos(torch.tensor(torch.pi * k / 20, dtype=torch.float64)) + 1) / 2 for k in range(20)
    ]
    step(model, optimizer)
    teacher.load_state_dict(model.state_dict())  # an average begins with the weights after the first step
    for k in range(1, 20):
        step(model, optimizer)
        for mine, own in zip(teacher.parameters(), model.parameters(), strict=True):
            mine.data = schedule[k] * mine.data + (1 - schedule[k]) * own.data
    for mine, averaged in zip(teacher.parameters(), ema.model.parameters(), strict=True):
        assert torch.allclose(mine, averaged, rtol=1e-12, atol=1e-14)


def test_a_momentum_over_a_run_of_unknown_length_is_refused_before_the_first_step() -> None:
    model, optimizer, _ = attached(EMA(profile=Momentum(0.9, 1.0, over="1dur")))
    before = copies(model)
    with pytest.raises(ProfileError, match=r"give max_duration to the loop, or over in steps: Momentum\(over="):
        step(model, optimizer)
    assert equal(
        {n: p for n, p in copies(model).items() if "running" not in n and "num" not in n},
        {n: p for n, p in before.items() if "running" not in n and "num" not in n},
    )


class Growing:
    unit, recursive = "ba", True

    def decay(self, before: float, now: float) -> float:
        return 1.0 if now == before else -0.2


def test_a_profile_that_keeps_less_than_nothing_is_refused_in_a_loop() -> None:
    model, optimizer, _ = attached(EMA(profile=Growing()))
    step(model, optimizer)
    with pytest.raises(ProfileError, match="an update must keep from none to all of the average .got -0.2"):
        step(model, optimizer)

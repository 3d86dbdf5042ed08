"""The plan says what is done with each tensor, before training, and training then does it."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from polyak import EMA, ArgumentError, HalfLife, LoanError, Policy, Record, Recorder, attach
from polyak.averaging.plan import plan
from polyak.averaging.weights import Shadow
from polyak.cli import main


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.b = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))
        self.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
        self.tied = nn.Linear(3, 3)
        self.tied.weight = self.a.weight
        self.register_buffer("rows", self.a.weight.data[1:])
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.register_buffer("scale", torch.tensor(0.5))
        self.register_buffer("cache", torch.zeros(2), persistent=False)
        self.register_buffer("edges", torch.eye(2).to_sparse())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tied(self.b(self.norm(self.a(x)))) * self.scale


EXPECTED = {
    "a.weight": "average",
    "norm.running_mean": "average",
    "norm.num_batches_tracked": "copy",
    "b.parametrizations.weight.original": "average",
    "b.parametrizations.weight.0._u": "copy",
    "frozen": "leave",
    "tied.weight": "shared",
    "rows": "shared",
    "mask": "copy",
    "scale": "copy",
    "cache": "leave",
    "edges": "leave",
}


def test_a_plan_says_what_averaging_does() -> None:
    model = Net()
    rows = {row.name: row.decision for row in plan(model)}
    assert {name: rows[name] for name in EXPECTED} == EXPECTED
    shadow = Shadow(model)
    kinds = {name: "average" if averaged else "copy" for name, (_, averaged) in shadow.kinds().items()}
    assert {name: decision for name, decision in rows.items() if decision in ("average", "copy")} == kinds


def test_an_ema_prints_the_plan_of_the_model_that_it_has_met() -> None:
    ema, model = EMA("10ba"), Net()
    with pytest.raises(LoanError, match="must know a model"):
        ema.plan()
    attach(ema, model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert str(ema.plan()) == str(plan(model))
    assert "its memory is that of a.weight" in str(ema.plan())


def test_a_plan_follows_the_policy_and_names_tensors_that_will_be_refused() -> None:
    rows = {row.name: row for row in EMA("10ba", policy=lambda _: Policy.AVERAGE).plan(Net())}
    assert rows["frozen"].decision == "average"
    assert rows["edges"].decision == "refused"
    assert "only strided tensors can be averaged" in rows["edges"].reason


def test_a_frozen_tensor_that_shares_its_memory_with_a_trained_one_is_averaged() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False).requires_grad_(requires_grad=False), nn.Linear(2, 2, bias=False))
    model[1].weight.data = model[0].weight.data.t()
    assert [row.decision for row in plan(model)] == ["average", "shared"]
    assert set(Shadow(model).averages) == {"0.weight"}


def test_parameters_that_any_optimizer_moves_are_averaged_whenever_they_are_frozen() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"g": nn.Linear(2, 2), "d": nn.Linear(2, 2)})
    optimizers = {name: torch.optim.SGD(model[name].parameters(), lr=0.1) for name in model}
    ema, want = attach(EMA(smoothing=0.5), model, optimizers["d"]), {}
    for _ in range(6):
        for name, other in (("g", "d"), ("d", "g")):
            model[other].requires_grad_(requires_grad=False)
            optimizers[name].zero_grad()
            model["d"](model["g"](torch.randn(4, 2))).square().mean().backward()
            optimizers[name].step()
            model[other].requires_grad_(requires_grad=True)
            if name == "d":
                now = {n: p.detach().double() for n, p in model.named_parameters()}
                want = {n: 0.5 * want.get(n, p) + 0.5 * p for n, p in now.items()}
    averages = ema.algorithm.state_dict()["ema_model"]
    assert averages.keys() == want.keys()
    assert all(torch.allclose(averages[name].double(), want[name], atol=1e-6) for name in want)


def test_the_command_prints_the_plan_of_a_function_of_the_user(tmp_path: Path, capsys) -> None:
    (tmp_path / "train.py").write_text("from torch import nn\ndef build():\n    return nn.Linear(2, 1)\n")
    assert main(["plan", f"{tmp_path}/train.py:build"]) == 0
    assert "weight  1x2  float32  average  a parameter that is trained" in capsys.readouterr().out
    assert main(["plan", f"{tmp_path}/train.py:build", "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["counts"] == {"average": 2}
    assert plain["tensors"][0] == {
        "name": "weight",
        "shape": [1, 2],
        "dtype": "torch.float32",
        "decision": "average",
        "reason": "a parameter that is trained",
    }


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def build(x): return x", "must return a model when it is called without arguments"),
        ("def build(): return 3", r"must return a torch.nn.Module \(got int\)"),
        ("x = 3", "there is no function 'build'"),
    ],
)
def test_the_command_refuses_code_that_makes_no_model(tmp_path: Path, capsys, code, said) -> None:
    (tmp_path / "train.py").write_text(code)
    assert main(["plan", f"{tmp_path}/train.py:build"]) == 2
    assert re.search(said, capsys.readouterr().err)


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm], ids=["old", "new"])
def test_averaged_weights_have_about_the_spectral_norm_that_they_are_given(tmp_path: Path, norm) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(norm(nn.Linear(8, 8)), nn.ReLU(), norm(nn.Linear(8, 8)))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    attached = attach([EMA("30ba"), Recorder(tmp_path / "record", interval="5ba")], model, optimizer)
    for _ in range(150):
        x = torch.randn(32, 8)
        optimizer.zero_grad()
        (model(x) - x.flip(1)).square().mean().backward()
        optimizer.step()

    def largest() -> float:
        model.eval()
        with torch.no_grad():
            model(x)
            return max(torch.linalg.matrix_norm(model[i].weight.double(), 2).item() for i in (0, 2))

    raw = largest()
    with attached.applied():
        assert largest() < raw + 0.3
    attached.detach()
    model.load_state_dict(Record(tmp_path / "record").average(HalfLife("30ba", unbiased=True)), strict=False)
    assert largest() < raw + 0.3


@pytest.mark.parametrize("answer", [None, True, "leaf", Policy, 0])
def test_a_policy_that_returns_something_else_is_refused_with_the_tensors_name(answer) -> None:
    ema = EMA("10ba", policy=lambda _: answer)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ArgumentError, match=r"policy must return a Policy for each tensor \(got .* for 'weight'\)"):
        ema.plan(model)
    attached = attach(ema, model, optimizer)
    model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(ArgumentError, match="for 'weight'"):
        optimizer.step()
    assert attached.num_updates == 0


def test_a_policy_may_return_the_text_of_one() -> None:
    ema = EMA("10ba", policy=lambda slot: "leave" if slot.name == "weight" else "average")
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attached = attach(ema, model, optimizer)
    for _ in range(3):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    assert {row.name: row.decision for row in ema.plan()} == {"weight": "leave", "bias": "average"}
    assert set(ema.state_dict()["ema_model"]) == {"bias"}
    attached.detach()

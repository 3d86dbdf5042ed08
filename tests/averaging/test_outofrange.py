"""An average whose dtype has a smaller range than the model's tells once that weights exceed it."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from polyak import EMA, PlanWarning, attach, export_averaged
from polyak.training.attached import Attached

BEYOND = "weights must be at most .*those of 'weight'"
pytestmark = pytest.mark.filterwarnings("ignore:the average that is .* mostly its first weights")


def trained(dtype: torch.dtype | None, *, to: float, model_dtype: torch.dtype = torch.float32) -> tuple[Attached, Any]:
    """Return an average of a weight that grows linearly from about 0, and its model."""
    model = nn.Linear(2, 1, bias=False).to(model_dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    ema = attach(EMA("2 steps", dtype=dtype), model, optimizer)
    for _ in range(20):
        model.weight.grad = torch.full_like(model.weight, -to / 20)
        optimizer.step()
    return ema, model


@pytest.mark.parametrize(
    ("dtype", "to", "model_dtype"),
    [
        (torch.float16, 1e5, torch.float32),
        (torch.float16, -1e5, torch.float32),
        (torch.float16, 1e5, torch.bfloat16),
        (torch.float32, 1e39, torch.float64),
    ],
)
@pytest.mark.parametrize("use", ["read", "applied", "save", "export", "detach"])
def test_weights_beyond_the_range_of_an_average_are_warned_of(
    tmp_path: Path, use: str, dtype: torch.dtype, to: float, model_dtype: torch.dtype
) -> None:
    ema, model = trained(dtype, to=to, model_dtype=model_dtype)
    with pytest.warns(PlanWarning, match=BEYOND):
        if use == "read":
            _ = ema.model
        elif use == "applied":
            with ema.applied():
                pass
        elif use == "save":
            ema.save(tmp_path / "averaged.safetensors")
        elif use == "export":
            export_averaged(ema, model, tmp_path / "averaged")
        else:
            ema.detach()


def test_weights_beyond_the_range_are_warned_of_once() -> None:
    ema, _ = trained(torch.float16, to=1e5)
    with pytest.warns(PlanWarning, match=BEYOND) as caught:
        for _ in range(3):
            with ema.applied():
                _ = ema.num_updates
        _ = ema.model
    assert len(caught) == 1


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_an_average_within_its_range_warns_of_nothing(tmp_path: Path, dtype: torch.dtype | None) -> None:
    ema, _ = trained(dtype, to=1e4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ema.applied():
            pass
        ema.save(tmp_path / "averaged.safetensors")
    assert load_file(tmp_path / "averaged.safetensors")["weight"].isfinite().all()


def test_an_average_of_the_models_range_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    ema, _ = trained(torch.bfloat16, to=1e4)
    monkeypatch.setattr("polyak.averaging.outofrange._is_full", lambda average: pytest.fail("it was read"))
    with ema.applied():
        pass

"""Averaged weights for another program, one full tensor at a time."""

import pytest
import sharded
import torch
from torch import Tensor, nn

from polyak import EMA, ArgumentError, Attached, LoanError, attach


def trained(model: nn.Module, steps: int = 3) -> Attached:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = attach(EMA("2ba"), model, optimizer)
    for step in range(steps):
        model(sharded.batch(step, own=False).to(next(model.parameters()).dtype)).float().square().mean().backward()
        optimizer.step()
    return ema


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_published_has_the_names_order_dtypes_and_values_of_the_averaged_model(dtype) -> None:
    model = nn.Sequential(nn.Linear(37, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).to(dtype)
    model[2].weight.requires_grad_(False)
    ema = trained(model)
    published = {}
    raw = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ema.publish(lambda name, tensor: published.update({name: tensor.clone()}))
    assert sharded.unequal(raw, model.state_dict()) == []
    with ema.applied():
        assert list(published) == list(model.state_dict())
        assert sharded.unequal(published, model.state_dict()) == []
    assert sharded.unequal(published, raw) != []


def test_publishing_before_averaging_has_begun_and_to_nothing_is_refused() -> None:
    with pytest.raises(LoanError, match="averaging must have begun"):
        trained(sharded.net(), steps=0).publish(print)
    with pytest.raises(ArgumentError, match="publish needs a function of a name and a tensor"):
        trained(sharded.net()).publish([])


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_training_resumes_when_the_loader_fails(error) -> None:
    model = sharded.net()
    ema = trained(model)
    raw = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def fails(name: str, tensor: Tensor) -> None:
        raise error

    with pytest.raises(error):
        ema.publish(fails)
    assert sharded.unequal(raw, model.state_dict()) == []


def test_a_loader_that_changes_a_parameter_is_found_and_the_weights_are_restored() -> None:
    model = sharded.net()
    ema = trained(model)
    raw = model.first.weight.clone()
    with pytest.raises(LoanError, match=r"first\.weight"):
        ema.publish(lambda name, tensor: tensor.zero_())
    assert torch.equal(raw, model.first.weight)

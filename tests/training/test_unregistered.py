"""What an optimizer steps and no module has registered: users learn of it before the first step."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from polyak import EMA, PlanWarning, Trainer, attach


class Holds(nn.Module):
    """A model with something that it does not register."""

    def __init__(self, held: object) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.held = held


LAYER = nn.Linear(4, 4)
KINDS: dict[str, tuple[object, list[Tensor], str]] = {
    "a list of layers": ([LAYER], list(LAYER.parameters()), r"2 tensors .*'held\[0\]\.weight'"),
    "a dict of parameters": (
        {"w": (one := nn.Parameter(torch.ones(4)))},
        [one],
        r"1 tensors .*held\['w'\]",
    ),
    "a tensor": (two := torch.ones(4, requires_grad=True), [two], r"1 tensors .*'held'"),
    "a tuple in a list": ([((three := torch.ones(4, requires_grad=True)),)], [three], r"'held\[0\]\[0\]'"),
}


@pytest.mark.parametrize(("held", "tensors", "said"), KINDS.values(), ids=KINDS)
def test_what_an_optimizer_steps_and_a_module_does_not_register_is_named(held, tensors, said) -> None:
    model = Holds(held)
    optimizer = torch.optim.SGD([*model.parameters(), *tensors], lr=0.1)
    with pytest.warns(PlanWarning, match=f"must be a parameter of the model.*{said}.*nn.ModuleList"):
        attach(EMA("10ba"), model, optimizer)
    with pytest.warns(PlanWarning, match=said):
        Trainer(model, [torch.ones(1)], "1ep", optimizers=optimizer, loss=nn.functional.mse_loss)


def listed_twice() -> nn.Module:
    model = Holds([])
    model.held.append(model.head)
    return model


OTHERS: dict[str, Callable[[], tuple[nn.Module, list[Tensor]]]] = {
    "the loss has parameters of its own": lambda: (Holds(None), list(nn.Linear(1, 1).parameters())),
    "a part of the model is in a list too": lambda: (listed_twice(), []),
    "a list of frozen layers": lambda: (Holds([nn.Linear(4, 4)]), []),
}


@pytest.mark.parametrize("build", OTHERS.values(), ids=OTHERS)
def test_other_tensors_are_not_warned_of(build) -> None:
    model, tensors = build()
    optimizer = torch.optim.SGD([*model.parameters(), *tensors], lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(EMA("10ba"), model, optimizer).detach()

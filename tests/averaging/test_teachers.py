"""``ema.model`` in the loss of a training step: compiled, under autocast, and against an average made by hand."""

import copy

import pytest
import torch
from torch import Tensor, nn

from polyak import EMA, attach

DECAY, STEPS = 0.8, 5


def batch(step: int) -> Tensor:
    return torch.randn(16, 4, generator=torch.Generator().manual_seed(step))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


class ByHand:
    """The usual way: a copy of the student that the loop moves."""

    def __init__(self, student: nn.Module) -> None:
        self.model, self._student = copy.deepcopy(student), student

    @torch.no_grad()
    def update(self) -> None:
        for average, weight in zip(self.model.parameters(), self._student.parameters(), strict=True):
            average.lerp_(weight, 1 - DECAY)


def trained(kind: str, by_hand: bool) -> tuple[nn.Module, list[Tensor]]:
    """Return the student after some steps towards its average, and the outputs of the average in each."""
    student, targets = net(), []
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    ema = attach([] if by_hand else EMA(decay=DECAY), student, optimizer)
    compiled = "compiled" in kind
    trains = torch.compile(student, backend="aot_eager") if compiled else student
    teacher, average = student, None
    for step in range(STEPS):
        with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in kind):
            with torch.no_grad():
                targets.append(teacher(batch(step)).float())
            output = trains(batch(step) + 0.1)
        (output.float() - targets[-1] - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if by_hand and average is not None:
            average.update()
        elif step == 0:
            average = ByHand(student) if by_hand else None
            found = average.model if average else ema.model
            teacher = torch.compile(found, backend="aot_eager") if compiled else found
    torch._dynamo.reset() if compiled else None
    return student, targets


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the average that is read is mostly its first weights")
@pytest.mark.parametrize("kind", ["plain", "autocast", "compiled", "compiled, autocast"])
def test_a_training_step_towards_the_average_is_that_of_a_copy_moved_by_hand(kind) -> None:
    (one, targets), (other, expected) = (trained(kind, by_hand) for by_hand in (False, True))
    for found, want in zip(targets, expected, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-2 if "autocast" in kind else 1e-5, atol=1e-5)
    for found, want in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-2 if "autocast" in kind else 1e-5, atol=1e-5)
    for step in range(2, STEPS):  # each step has seen another average
        with torch.no_grad():
            assert (targets[step] - one(batch(step))).abs().max() > 1e-2


@pytest.mark.filterwarnings("ignore:the average that is read is mostly its first weights")
def test_no_gradient_reaches_the_average_even_without_no_grad() -> None:
    student = net()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    ema = attach(EMA(decay=DECAY), student, optimizer)
    student(batch(0)).square().mean().backward()
    optimizer.step()
    teacher = ema.model
    (student(batch(1)) - teacher(batch(1))).square().mean().backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())

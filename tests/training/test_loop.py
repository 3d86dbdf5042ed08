"""What hosts have in common, without any of their frameworks."""

from pathlib import Path
from typing import Any

import loops
import pytest
import torch
from torch import nn

from polyak import EMA, Algorithm, CheckpointError, Event, Recorder
from polyak.algorithm import as_algorithms
from polyak.averaging.swap import swap_of
from polyak.training.loop import Loop
from polyak.training.state import LoopState
from polyak.training.steps import StepHooks


def joined(algorithms: list[Algorithm], model: nn.Module | None = None) -> Loop:
    loop = Loop(algorithms, LoopState(model or loops.perceptron()))
    loop.meet()
    return loop


def stepped(loop: Loop, steps: int) -> None:
    for _ in range(steps):
        with torch.no_grad():
            for parameter in loop.state.model.parameters():
                parameter.add_(1.0)
        loop.end_batch(samples=4)


def test_one_algorithm_or_several_are_taken_and_two_averages_refused() -> None:
    ema, recorder = EMA(), Recorder("record")
    assert as_algorithms(ema) == [ema]
    assert as_algorithms((ema, recorder)) == [ema, recorder]
    with pytest.raises(ValueError, match="one average at a time"):
        as_algorithms([ema, EMA()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_lent_in_inference_mode_can_be_taken_back_outside_and_averaged_on(dtype: torch.dtype) -> None:
    ema = EMA("2ba")
    loop = joined([ema], loops.perceptron().to(dtype))
    stepped(loop, 2)
    before = loops.bits(loop.state.model)
    with torch.inference_mode():
        loop.fire(Event.EVAL_START)
    assert loops.differences(before, loops.bits(loop.state.model))
    loop.fire(Event.EXCEPTION)
    assert not loops.differences(before, loops.bits(loop.state.model))
    stepped(loop, 1)
    assert ema.num_updates == 2


def test_an_error_between_two_events_still_fires_the_second() -> None:
    loop = joined([EMA("2ba")])
    stepped(loop, 2)
    before = loops.bits(loop.state.model)
    with pytest.raises(RuntimeError, match="as planned"), loop.saving("somewhere"):
        assert loop.state.saving_to == Path("somewhere")
        assert swap_of(loop.state.model) is not None
        raise RuntimeError("as planned")
    assert loop.state.saving_to is None
    assert not loops.differences(before, loops.bits(loop.state.model))


def test_an_epoch_that_was_left_counts_when_the_next_begins() -> None:
    loop = joined([EMA()])
    stepped(loop, 2)
    loop.begin_epoch()
    assert (loop.state.timestamp.epoch.value, loop.state.timestamp.batch_in_epoch.value) == (1, 0)
    loop.begin_epoch()
    assert loop.state.timestamp.epoch.value == 1


def test_a_state_is_gone_on_with_and_that_of_other_algorithms_refused() -> None:
    one, other = (joined([EMA("2ba")]) for _ in range(2))
    stepped(one, 3)
    with one.saving():
        weights, state = loops.bits(one.state.model), one.state_dict()
        other.state.model.load_state_dict(weights)
        other.load_state_dict(state)
    assert not loops.differences(loops.bits(one.state.model), loops.bits(other.state.model))
    stepped(one, 2)
    stepped(other, 2)
    assert not loops.differences(one.state_dict(), other.state_dict())
    assert other.state.timestamp.sample.value == 20
    with pytest.raises(CheckpointError, match=r"that of \['Recorder'\] \(got that of \['EMA'\]\)"):
        joined([Recorder("record")]).load_state_dict(state)


def test_hooks_can_be_removed_once() -> None:
    model, seen = nn.Linear(1, 1), list[Any]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hooks = StepHooks(optimizer, lambda: seen.append("after"), lambda: seen.append("first"))
    optimizer.step()  # without gradients
    model(torch.ones(1, 1)).sum().backward()
    optimizer.step()
    assert hooks.remove()
    assert not hooks.remove()
    optimizer.step()
    assert seen == ["first", "after"]

"""What integrations have in common, without any of their frameworks."""

from pathlib import Path
from typing import Any

import loops
import pytest
import torch
from torch import nn

from polyak import EMA, Algorithm, ArgumentError, CheckpointError, Event, Recorder, Time, Timestamp, TimeUnit
from polyak.algorithm import as_algorithms
from polyak.averaging.swap import swap_of
from polyak.errors import ProfileError, TimeError
from polyak.training.loop import Loop
from polyak.training.options import LoopOptions
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
def test_an_average_swapped_in_in_inference_mode_can_be_restored_outside_and_updated(dtype: torch.dtype) -> None:
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


@pytest.mark.parametrize(
    "algorithm",
    [lambda: EMA("4ba", ema_start="100tok"), lambda: EMA("4ba", update_interval="100tok"), lambda: EMA("100tok")],
)
def test_a_unit_of_which_the_first_batch_has_none_is_an_error_after_it(algorithm) -> None:
    loop = Loop([algorithm()], LoopState(loops.perceptron()), counts={TimeUnit.BATCH, TimeUnit.TOKEN})
    loop.meet()
    loop.fire(Event.FIT_START)
    with pytest.raises(
        (TimeError, ProfileError), match="the loop must count tok for .*100tok.*, and it counts ba; say"
    ):
        loop.end_batch(tokens=0)


def test_a_batch_without_tokens_is_allowed_where_no_algorithm_needs_them_or_others_had_some() -> None:
    for algorithm, tokens in ((EMA("4ba"), 0), (EMA("100tok"), 5)):
        loop = Loop([algorithm], LoopState(loops.perceptron()), counts={TimeUnit.BATCH, TimeUnit.TOKEN})
        loop.meet()
        loop.fire(Event.FIT_START)
        loop.end_batch(tokens=tokens)
        loop.end_batch(tokens=0)


def test_an_epoch_that_was_left_counts_when_the_next_begins() -> None:
    loop = joined([EMA()])
    stepped(loop, 2)
    loop.begin_epoch()
    assert (loop.state.timestamp.epoch.value, loop.state.timestamp.batch_in_epoch.value) == (1, 0)
    loop.begin_epoch()
    assert loop.state.timestamp.epoch.value == 1


def test_a_state_is_resumed_and_that_of_other_algorithms_refused() -> None:
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


def test_an_algorithm_that_sets_the_old_name_of_swaps_is_read_with_a_warning() -> None:
    class Never(Algorithm):
        def match(self, event, state):
            return False

        def apply(self, event, state, logger) -> None: ...

    with pytest.warns(DeprecationWarning, match="`lends` of Old is deprecated; name it `swaps`"):

        class Old(Never):
            lends = True

    assert Old().swaps
    assert not Never().swaps
    with pytest.warns(DeprecationWarning, match="read `swaps`"):
        assert not Never().lends
    with pytest.raises(ValueError, match="one average at a time"):
        as_algorithms([Old(), EMA()])


def test_algorithms_act_before_callbacks_and_a_batch_is_counted_without_an_event() -> None:
    seen = []

    class Watches(Algorithm):
        def match(self, event, state):
            return True

        def apply(self, event, state, logger) -> None:
            seen.append((f"algorithm {event}", state.timestamp.batch.value))

    class Callback:
        def run_event(self, event, state, logger) -> None:
            seen.append((f"callback {event}", state.timestamp.batch.value))

    callbacks = [Callback()]
    loop = Loop([Watches()], LoopState(loops.perceptron()), callbacks=callbacks)
    loop.fire(Event.FIT_START)
    loop.count_batch(samples=8, seconds=0.5, steps=0)
    loop.count_batch(samples=8, seconds=0.5)
    loop.dispatch(Event.BATCH_END)
    loop.notify(Event.BATCH_END)
    assert seen == [
        ("algorithm init", 0),
        ("callback init", 0),
        ("algorithm fit_start", 0),
        ("callback fit_start", 0),
        ("algorithm batch_end", 1),
        ("callback batch_end", 1),
    ]
    assert (loop.state.timestamp.sample, loop.state.timestamp.total_wct) == (16, 1)
    assert loop.state.previous_timestamp.sample == 8


def test_a_clock_that_is_set_back_starts_again_with_the_same_epoch_length() -> None:
    loop = joined([EMA("2ba")])
    loop.state.set_epoch_length(3)
    stepped(loop, 2)
    loop.leave_epoch()
    assert loop.state.timestamp.epoch == "1ep"
    loop.leave_epoch()
    assert loop.state.timestamp.epoch == "1ep"
    loop.state.reset_clock()
    assert loop.state.timestamp == Timestamp(epoch_length=3)
    assert loop.state.previous_timestamp == Timestamp(epoch_length=3)


@pytest.mark.parametrize(
    "given",
    [{"steps_per_epoch": 0}, {"steps_per_epoch": 1.5}, {"samples_per_step": -1}, {"tokens_per_step": "many"}],
    ids=str,
)
def test_a_number_that_counts_nothing_is_refused_with_its_name(given) -> None:
    with pytest.raises(ArgumentError, match=f"{next(iter(given))} must be a whole number"):
        LoopOptions(**given)


def test_whole_numbers_of_any_kind_are_options_of_a_loop() -> None:
    options = LoopOptions(max_duration="10ba", steps_per_epoch=10.0, samples_per_step=torch.tensor(8).item())
    assert (options.steps_per_epoch, options.samples_per_step, options.duration) == (10, 8, Time(10, "ba"))
    assert TimeUnit.SAMPLE in options.counts
    assert TimeUnit.TOKEN not in options.counts


@pytest.mark.parametrize("given", ["infba", "1dur"])
def test_a_length_of_the_run_that_measures_nothing_is_refused(given) -> None:
    with pytest.raises(TimeError, match="max_duration must be finite, and in another unit than dur"):
        LoopOptions(max_duration=given)


def test_an_algorithm_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "record", interval="2ba")
    with pytest.raises(ArgumentError, match="algorithms must be different ones"):
        as_algorithms([recorder, recorder])

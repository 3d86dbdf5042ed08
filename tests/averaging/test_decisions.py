"""One decision per event: what an average does at each, and that asking changes nothing."""

import copy
import sys
from pathlib import Path

import loops
import pytest
import torch

import polyak
from polyak import EMA, Event, Timestamp, attach
from polyak.algorithm import NoLogger
from polyak.averaging.actions import ACTIONS
from polyak.averaging.online import Action
from polyak.training.loop import LoopState

ENDS = {Event.EVAL_START: Event.EVAL_END, Event.PREDICT_START: Event.PREDICT_END, Event.SAVE_START: Event.SAVE_END}
ALWAYS = {Event.INIT: Action.MEET, Event.FIT_START: Action.START_RUN, Event.FIT_END: Action.END_RUN}


def average(kind: str, **options) -> tuple[EMA, LoopState]:
    """Return an EMA that has not begun, has begun, or is in the model, and the state of its loop."""
    model = loops.perceptron()
    ema, state = EMA("4ba", **options), LoopState(model, Timestamp())
    ema.apply(Event.INIT, state, NoLogger())
    if kind != "new":
        state.timestamp = Timestamp(batch=1, epoch=1)
        ema.apply(Event.BATCH_END, state, NoLogger())
        state.timestamp = Timestamp(batch=2, epoch=2)
    if kind == "active":
        ema.apply(Event.EVAL_START, state, NoLogger())
    return ema, state


WANTED = {
    "new": {},
    "begun": {Event.BATCH_END: Action.UPDATE, **dict.fromkeys(ENDS, Action.SWAP_IN)},
    "active": {
        Event.BATCH_END: Action.RESTORE,
        Event.EVAL_END: Action.RESTORE,
        Event.EXCEPTION: Action.RESTORE,
    },
}


@pytest.mark.parametrize("kind", WANTED)
def test_each_event_has_one_decision_and_match_says_whether_it_is_to_act(kind: str) -> None:
    ema, state = average(kind)
    for event in Event:
        action = ema._average.decide(event, state)
        assert action is {**ALWAYS, **WANTED[kind]}.get(event, Action.NOTHING), event
        assert ema.match(event, state) is (action is not Action.NOTHING)
    ema.get_training_model(state.model)


def test_every_action_is_done_by_one_function() -> None:
    assert set(ACTIONS) == set(Action)


@pytest.mark.parametrize("kind", WANTED)
def test_match_changes_nothing(kind: str) -> None:
    ema, state = average(kind)
    before, model = copy.deepcopy(ema.state_dict()), loops.bits(state.model)
    progress = copy.copy(ema._average.progress)
    for event in Event:
        ema.match(event, state)
    after = ema.state_dict()
    assert after.keys() == before.keys()
    assert all(loops.differences(before[k], after[k]) == [] for k in ("ema_model", "training_model") if k in before)
    assert {k: v for k, v in after.items() if "model" not in k} == {k: v for k, v in before.items() if "model" not in k}
    assert loops.differences(model, loops.bits(state.model)) == []
    assert ema._average.progress == progress
    ema.get_training_model(state.model)


def test_by_hand_an_update_is_made_whether_or_not_it_is_due() -> None:
    ema, state = average("begun", update_interval="4ba")
    assert not ema.match(Event.BATCH_END, state)
    ema.apply(Event.BATCH_END, state, NoLogger())
    assert ema.num_updates == 1


def test_updates_in_epochs_are_due_at_the_ends_of_epochs_only() -> None:
    ema, state = average("begun", update_interval="1ep")
    state.timestamp = Timestamp(batch=4, epoch=3)
    assert [ema.match(event, state) for event in (Event.BATCH_END, Event.EPOCH_END)] == [False, True]


def test_averaging_that_waits_for_finite_weights_reports_it_when_the_run_is_left() -> None:
    ema, state = average("new")
    with torch.no_grad():
        next(state.model.parameters()).fill_(torch.nan)
    state.timestamp = Timestamp(batch=1)
    assert ema._average.decide(Event.BATCH_END, state) is Action.BEGIN
    ema.apply(Event.BATCH_END, state, NoLogger())
    assert ema._average.decide(Event.EXCEPTION, state) is Action.REPORT_WAITS
    with pytest.warns(UserWarning, match="averaging had not begun when the run was left"):
        ema.apply(Event.EXCEPTION, state, NoLogger())
    assert ema._average.decide(Event.EXCEPTION, state) is Action.NOTHING


def test_a_plain_update_takes_at_most_18_calls_of_averaging() -> None:
    model = loops.perceptron()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    calls, package = list[str](), Path(polyak.__file__).parent

    def note(frame, event, argument) -> None:
        del argument
        if event == "call" and frame.f_code.co_filename.startswith(str(package)):
            calls.append(frame.f_code.co_filename)

    with attach(EMA("100ba"), model, optimizer):
        for _ in range(4):
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            calls.clear()
            before = sys.getprofile()
            sys.setprofile(note)
            try:
                optimizer.step()
            finally:
                sys.setprofile(before)
    assert 0 < sum(Path(file).parent == package / "averaging" for file in calls) <= 18

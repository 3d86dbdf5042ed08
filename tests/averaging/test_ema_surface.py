"""What of an EMA can be set, and what is said about what cannot: arguments, attributes, states, events by hand."""

import copy
import math
import re
import warnings
from types import SimpleNamespace

import loops
import numpy as np
import pytest
import torch
from torch import nn

import polyak
from polyak import (
    EMA,
    ArgumentError,
    CheckpointError,
    Event,
    FixedError,
    HalfLife,
    LoanError,
    MismatchError,
    PlanWarning,
    PolyakError,
    Time,
    TimeError,
    Timestamp,
    attach,
    compute_ema,
)
from polyak.algorithm import NoLogger
from polyak.training.state import LoopState


def at(model: nn.Module, batch: int = 0, epoch: int = 0, *, length: int | None = None, run: str | None = None):
    max_duration = None if run is None else Time.from_timestring(run)
    return LoopState(model, Timestamp(batch=batch, epoch=epoch, epoch_length=length), max_duration)


def filled(value: float) -> nn.Linear:
    model = nn.Linear(2, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def value(model: nn.Module) -> float:
    values = {round(v, 6) for p in model.parameters() for v in p.flatten().tolist()}
    (only,) = values
    return only


# Arguments


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("half_life", "ten"),
        ("half_life", ""),
        ("half_life", True),
        ("half_life", 0.99),
        ("half_life", ["10ba"]),
        ("half_life", "-10ba"),
        ("half_life", nn.Linear(1, 1)),
        ("smoothing", ".9"),
        ("smoothing", "10ba"),
        ("smoothing", True),
        ("smoothing", [0.9]),
        ("smoothing", torch.tensor(0.9)),
        ("smoothing", 1.5),
        ("smoothing", math.nan),
        ("ema_start", "soon"),
        ("ema_start", 1.5),
        ("ema_start", None),
        ("ema_start", "-1ba"),
        ("update_interval", "often"),
        ("update_interval", 4.5),
        ("update_interval", "0ba"),
        ("update_interval", "1.5ba"),
        ("update_interval", "infba"),
        ("profile", "10ba"),
        ("profile", HalfLife),
        ("profile", 0.9),
        ("dtype", "float32"),
        ("dtype", float),
        ("policy", polyak.Policy.AVERAGE),
        ("policy", "average"),
        ("mesh", 2),
        ("offload", True),
        ("offload", "cpu"),
        ("offload", polyak.Offload),
    ],
)
def test_a_wrong_argument_of_an_ema_is_one_error_that_names_it(name, given):
    with pytest.raises(PolyakError, match=name) as raised:
        EMA(**{name: given})
    assert isinstance(raised.value, ValueError)
    assert "\n" not in str(raised.value) or "Linear" in str(raised.value)


def test_a_smoothing_of_another_numeric_type_becomes_a_plain_number():
    import numpy as np

    assert type(EMA(smoothing=np.float32(0.5)).smoothing) is float
    assert EMA(smoothing=1).smoothing == 1.0


@pytest.mark.parametrize(
    ("one", "other"), [(None, filled(1)), (filled(1), {"weight": torch.ones(1)}), (filled(1), None)]
)
def test_compute_ema_refuses_an_argument_that_is_not_a_module(one, other):
    with pytest.raises(ArgumentError, match=r"model must be a torch\.nn\.Module"):
        compute_ema(one, other)


# Attributes


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("smoothing", 0.5),
        ("half_life", "10ba"),
        ("update_interval", "2ba"),
        ("ema_start", "1ep"),
        ("profile", HalfLife("10ba")),
        ("ema_weights_active", True),
        ("training_model", nn.Linear(1, 1)),
        ("num_updates", 3),
        ("num_quarantined", 0),
        ("ema_started", True),
    ],
)
def test_a_read_only_attribute_is_not_assigned_and_the_error_names_it(name, given):
    ema = EMA("4ba")
    before = repr(ema), getattr(ema, name)
    with pytest.raises(FixedError, match=rf"^{name} .*must"):
        setattr(ema, name, given)
    assert (repr(ema), getattr(ema, name)) == before
    assert issubclass(FixedError, AttributeError)


def test_ema_started_may_be_set_to_what_it_is():
    ema = EMA()
    ema.ema_started = False
    ema.ema_model = filled(1)
    ema.ema_started = True
    with pytest.raises(FixedError, match="begin again"):
        ema.ema_started = False


# An average that the caller sets


@pytest.mark.parametrize(
    "arguments", [{"half_life": "10ba"}, {"half_life": "2ba", "update_interval": "2ba"}, {"smoothing": 0.9}]
)
@pytest.mark.parametrize("batch", [0, 2, 4])
def test_an_average_that_was_set_moves_by_one_interval_at_an_update_by_hand(arguments, batch):
    ema, average, model = EMA(**arguments), filled(1.0), filled(3.0)
    ema.ema_model = average
    ema.ema_started = True
    assert ema.ema_started
    assert ema.ema_model is average
    ema.apply(Event.BATCH_END, at(model, batch), NoLogger())
    assert value(ema.ema_model) == pytest.approx(ema.smoothing * 1 + (1 - ema.smoothing) * 3, abs=1e-5)
    assert value(model) == 3.0
    assert value(average) == 1.0  # it was copied
    moved = value(ema.ema_model)
    ema.apply(Event.EVAL_START, at(model, batch), NoLogger())
    assert value(model) == moved
    ema.apply(Event.EVAL_END, at(model, batch), NoLogger())
    assert (value(model), value(ema.ema_model)) == (3.0, moved)


def test_an_average_that_was_set_is_updated_at_the_ends_of_epochs():
    ema, model = EMA("1ep"), filled(3.0)
    ema.ema_model = filled(1.0)
    ema.apply(Event.EPOCH_END, at(model, 4, 1), NoLogger())
    assert value(ema.ema_model) == 2.0


def test_an_interval_in_another_unit_than_the_half_life_is_converted_or_the_error_says_what_is_missing():
    model = filled(3.0)
    ema = EMA("1ep", update_interval="2ba")
    ema.ema_model = filled(1.0)
    ema.apply(Event.BATCH_END, at(model, 2, length=2), NoLogger())
    assert value(ema.ema_model) == 2.0
    ema = EMA("1ep", update_interval="2ba")
    ema.ema_model = filled(1.0)
    with pytest.raises(TimeError, match="epoch_length"):
        ema.apply(Event.BATCH_END, at(model, 2), NoLogger())


def test_match_by_hand_says_where_an_average_that_was_set_is_updated():
    ema, model = EMA("4ba", update_interval="2ba"), filled(3.0)
    ema.ema_model = filled(1.0)
    assert [ema.match(Event.BATCH_END, at(model, batch)) for batch in (1, 2, 3, 4)] == [False, True, False, True]


def test_an_update_by_hand_without_time_says_why_it_does_not_move():
    ema, model = EMA("4ba"), filled(3.0)
    ema.ema_model = filled(1.0)
    ema.apply(Event.BATCH_END, at(model, 1), NoLogger())
    with pytest.raises(TimeError, match=r"time must have passed.*1ba.*to_next_batch"):
        ema.apply(Event.BATCH_END, at(model, 1), NoLogger())
    ema.apply(Event.BATCH_END, at(model, 2), NoLogger())
    assert ema.num_updates == 2


def test_an_average_that_was_set_in_the_middle_replaces_the_other():
    model = loops.perceptron()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = EMA("4ba")
    attached = attach(ema, model, optimizer)
    other = loops.perceptron(1)
    ema.ema_model = other
    assert loops.differences(loops.bits(other), loops.averaged(ema)) == []
    with attached.applied(), pytest.raises(LoanError):
        ema.ema_model = other


def test_an_average_of_another_model_is_refused_with_both_sides():
    ema = EMA("4ba")
    ema.ema_model = nn.Linear(2, 2, bias=False)
    with pytest.raises(MismatchError, match="missing: bias"):
        ema.apply(Event.BATCH_END, at(filled(1.0), 1), NoLogger())


@pytest.mark.parametrize("given", [None, 0.9, {"weight": torch.ones(1)}, nn.Linear, "model"])
def test_ema_model_refuses_an_object_without_parameters(given):
    with pytest.raises(ArgumentError, match=r"ema_model must be .*named_parameters"):
        EMA().ema_model = given


def test_an_average_that_was_set_is_copied_and_pickled_with_the_ema():
    ema = EMA("1ba")
    ema.ema_model = filled(1.0)
    again = copy.deepcopy(ema)
    again.apply(Event.BATCH_END, at(filled(3.0), 1), NoLogger())
    assert value(again.ema_model) == 2.0
    assert not ema.num_updates


def test_an_event_that_is_none_of_an_ema_changes_nothing():
    ema = EMA()
    ema.apply(Event.BATCH_START, at(filled(1.0), 1), NoLogger())
    assert not ema.ema_started


# Other trainers


@pytest.mark.parametrize("event", ["batch_end", SimpleNamespace(value="batch_end"), None])
def test_an_event_of_another_trainer_names_the_right_import(event):
    for call in (lambda: EMA().match(event, at(filled(1.0))), lambda: EMA().apply(event, at(filled(1.0)), NoLogger())):
        with pytest.raises(ArgumentError, match=r"from polyak\.hosts\.composer import EMA"):
            call()


def test_attach_refuses_an_object_that_is_not_an_algorithm_and_says_what_to_do():
    model = filled(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    composers = type("EMA", (), {"__module__": "composer.algorithms.ema.ema"})
    for given, says in [(composers(), "from polyak import EMA"), (EMA, "parentheses"), (object(), "derive from")]:
        for form in (given, [given]):
            with pytest.raises(ArgumentError, match=says):
                attach(form, model, optimizer)


# States


def state_of(model: nn.Module) -> dict:
    ema = EMA("4ba")
    attach(ema, model, torch.optim.SGD(model.parameters(), lr=0.1))
    ema.ema_model = model
    return copy.deepcopy(ema.state_dict())


def met(model: nn.Module) -> EMA:
    ema = EMA("4ba")
    attach(ema, model, torch.optim.SGD(model.parameters(), lr=0.1))
    return ema


@pytest.mark.parametrize("when", ["before it has met its model", "after"])
def test_without_strict_names_may_differ_and_one_warning_lists_them(when):
    saved = state_of(nn.ModuleDict({"kept": filled(5.0), "gone": filled(5.0)}))
    model = nn.ModuleDict({"kept": filled(1.0), "new": filled(2.0)})
    says = r"(?s)missing.*'new\.bias', 'new\.weight'.*unexpected.*'gone\.bias', 'gone\.weight'"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if when == "after":
            ema = met(model)
            ema.load_state_dict(saved, strict=False)
        else:
            ema = EMA("4ba")
            ema.load_state_dict(saved, strict=False)
            attach(ema, model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert len(caught) == 1
    assert re.search(says, str(caught[0].message))
    assert issubclass(caught[0].category, PlanWarning)
    assert (value(ema.ema_model["kept"]), value(ema.ema_model["new"])) == (5.0, 2.0)
    assert value(model["kept"]) == 1.0


def test_strict_is_the_default_and_names_that_match_do_not_warn():
    saved = state_of(nn.ModuleDict({"kept": filled(5.0)}))
    with pytest.raises(MismatchError, match="missing: new"):
        met(nn.ModuleDict({"kept": filled(1.0), "new": filled(1.0)})).load_state_dict(saved)
    ema = met(nn.ModuleDict({"kept": filled(1.0)}))
    ema.load_state_dict(saved, strict=False)
    assert value(ema.ema_model) == 5.0


def test_without_strict_a_wrong_shape_is_still_an_error():
    saved = state_of(nn.ModuleDict({"kept": nn.Linear(2, 3)}))
    with pytest.raises(MismatchError, match=r"kept\.weight: expected shape \(2, 2\), got \(3, 2\)"):
        met(nn.ModuleDict({"kept": filled(1.0)})).load_state_dict(saved, strict=False)


def test_without_strict_training_weights_that_are_missing_stay_and_the_others_come():
    model = nn.ModuleDict({"kept": filled(5.0), "gone": filled(5.0)})
    ema = met(model)
    ema.ema_model = nn.ModuleDict({"kept": filled(7.0), "gone": filled(7.0)})
    ema.get_ema_model(model)
    saved = copy.deepcopy(ema.state_dict())
    ema.get_training_model(model)
    other = nn.ModuleDict({"kept": filled(1.0), "new": filled(2.0)})
    again = met(other)
    with pytest.warns(PlanWarning, match="strict=False"):
        again.load_state_dict(saved, strict=False)
    assert (value(other["kept"]), value(other["new"])) == (5.0, 2.0)
    assert (value(again.ema_model["kept"]), value(again.ema_model["new"])) == (7.0, 2.0)


@pytest.mark.parametrize(
    "state", [None, 3, "ema.pt", [1], {"polyak": 1, "repr": "x", "ema_started": True}, {"ema_started": True}]
)
def test_a_state_that_is_incomplete_or_not_a_state_is_one_error(state):
    with pytest.raises(CheckpointError, match="state"):
        EMA().load_state_dict(state)


def test_states_of_equal_runs_are_equal_whatever_the_wall_clock():
    def state(seconds: float, **arguments) -> dict:
        ema, model = EMA(**arguments), filled(1.0)
        for batch in (1, 2):
            now = LoopState(model, Timestamp(batch=batch, total_wct=seconds * batch), Time.from_timestring("10ba"))
            ema.apply(Event.BATCH_END, now, NoLogger())
        saved = ema.state_dict()
        return {name: saved[name] for name in ("origin", "updated_at")}

    assert state(0.5, half_life="4ba", ema_start="1ba") == state(9.0, half_life="4ba", ema_start="1ba")
    assert state(0.5, half_life="4sec") != state(9.0, half_life="4sec")


# What waits


def test_a_run_with_nan_from_the_start_warns_once_with_a_count():
    model = filled(math.nan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with attach(EMA("4ba"), model, optimizer):
            step(model, optimizer, 100)
    assert [w.category for w in caught] == [PlanWarning]
    assert re.search(r"never started.*from 1ba on.*100 updates", str(caught[0].message))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, n: int) -> None:
    for _ in range(n):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()


def test_an_average_that_begins_after_nan_says_once_how_long_it_waited():
    model = filled(math.nan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = EMA("4ba")
    with attach(ema, model, optimizer):
        step(model, optimizer, 3)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(1.0)
        with pytest.warns(PlanWarning, match=r"begins at 4ba.*from 1ba on.*3 updates") as caught:
            step(model, optimizer, 5)
    assert len(caught) == 1
    assert value(ema.ema_model) == 1.0


def test_a_run_that_fails_while_averaging_waits_says_so_once():
    model = filled(math.nan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(KeyError), attach(EMA("4ba"), model, optimizer):
            step(model, optimizer, 7)
            raise KeyError
    assert sum("finite" in str(w.message) for w in caught) == 1
    assert "7 updates" in str(caught[0].message)


def test_a_state_that_waits_for_a_model_is_a_copy() -> None:
    first, model = EMA(decay=0.5), filled(1.0)
    attached = attach(first, model, None)
    attached.step()
    second = EMA(decay=0.5)
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        model.weight.fill_(3.0)
    attached.step()
    other = attach(second, filled(5.0), None)
    assert value(other.model) == 1.0
    for one in (attached, other):
        one.detach()


def test_an_average_of_a_later_clock_continues_where_it_is_loaded_in_mid_run() -> None:
    state = {}
    for steps in (50, 3):
        ema, model = EMA("10ba"), nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        attached = attach(ema, model, optimizer)
        for step in range(2 * steps):
            if steps == 3 and step == 3:
                ema.load_state_dict(state)
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
        state = copy.deepcopy(ema.state_dict())
        attached.detach()
    assert ema.num_updates == 99 + 2  # no time passes in the first of the three


def test_a_state_with_numbers_of_numpy_is_read() -> None:
    model, ema = filled(1.0), EMA(decay=0.5)
    attached = attach(ema, model, None)
    for _ in range(3):
        attached.step()
        with torch.no_grad():
            model.weight.add_(1)
            model.bias.add_(1)
    ema.load_state_dict({**ema.state_dict(), "num_updates": np.int64(2)})
    assert ema.num_updates == 2
    attached.detach()


def test_weights_without_values_are_refused_by_name_at_the_first_step() -> None:
    model = nn.Linear(2, 1, device="meta")
    attached = attach(EMA(decay=0.5), model, None)
    with pytest.raises(PolyakError, match="'weight' is on the meta device; load the weights"):
        attached.step()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_buffer_is_left_as_it_is() -> None:
    model = nn.Linear(2, 1)
    model.register_buffer("lengths", torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))
    attached = attach(EMA(decay=0.5), model, None)
    for _ in range(3):
        attached.step()
        with torch.no_grad():
            model.weight.add_(1)
    assert "a nested tensor" in str(attached.average.plan())
    with attached.applied():
        pass
    attached.model(torch.ones(1, 2))
    attached.detach()

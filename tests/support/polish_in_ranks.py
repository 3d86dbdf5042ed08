"""What the processes of ``ranks.Ranks`` do with ``polish`` and with a ``BEMA``."""

import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sharded import Reference, ema_of, evaluated, full, own_weights, spread, train, unequal, weights
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultSavePlanner

from polyak import BEMA, EMA, Event, HalfLife, Record, Recorder, attach, polish
from polyak.tensors.slots import slots, unwrap
from polyak.training.loop import Loop
from polyak.training.state import LoopState

STEPS = 8


def set_up(kind: str, *algorithms: Any) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    model = spread(kind)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    return model, optimizer, attach(list(algorithms), model, optimizer)


def moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]
    return {f"{i}.{name}": full(tensor) for i, state in enumerate(found) for name, tensor in state.items()}


def polishes(kind: str, source: str, folder: str) -> dict[str, Any]:
    """Polish after an evaluation, which leaves the outermost module of FSDP2 full; return what is not as it must be."""
    ema = ema_of(kind) if source == "ema" else Recorder(Path(folder) / "record", "1ba")
    model, optimizer, attached = set_up(kind, ema)
    train(model, optimizer, range(STEPS))
    buffers = [slot.name for slot in slots(unwrap(model)) if not slot.is_parameter]
    options: dict[str, Any] = {} if source == "ema" else {"profile": HalfLife("4ba", unbiased=True)}
    if source == "ema":
        with attached.applied():
            want = own_weights(model)
        average: Any = attached
    else:
        attached.detach()
        average = Record(Path(folder) / "record")
        want = average.average(options["profile"])
    evaluated(model)
    before = moments(optimizer)
    scheduler = polish(model, optimizer, average, steps=4, **options)
    found: dict[str, Any] = {"average": unequal(own_weights(model), want)}
    found["optimizer"] = unequal(moments(optimizer), before)
    rates = []
    for step in range(STEPS, STEPS + 5):
        rates.append(optimizer.param_groups[0]["lr"])
        train(model, optimizer, range(step, step + 1))
        scheduler.step()
    found["rates"] = rates
    ends = [None] * dist.get_world_size()
    dist.all_gather_object(ends, {n: t for n, t in own_weights(model).items() if n not in buffers})
    found["ranks"] = [name for other in ends for name in unequal(other, ends[0])]
    return found


def refuses_another(kind: str) -> list[str]:
    """Return the errors of a polish of another model, and whether the weights stay."""
    model, optimizer, attached = set_up(kind, EMA("2ba"))
    train(model, optimizer, range(3))
    other = nn.Sequential(nn.Linear(2, 2))
    said = []
    before = own_weights(model)
    for arguments in ((other, torch.optim.SGD(other.parameters()), attached), (model, optimizer, attached, 0)):
        try:
            polish(*arguments[:3], steps=arguments[3] if len(arguments) > 3 else 4)
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}".splitlines()[0])
    assert unequal(own_weights(model), before) == []
    return said


# BEMA


def bema() -> BEMA:
    return BEMA(0.5, 0.4, lag=2, update_interval="2ba")


def _averages(algorithm: BEMA) -> dict[str, Tensor]:
    algorithm._average.agree()  # rank 0's averages of buffers count
    return {name: full(tensor) for name, tensor in algorithm._shadow.averaged_tensors().items()}


def bema_follows_the_whole(kind: str) -> dict[str, Any]:
    """Train with a BEMA; compare it, a swap and training after it with a BEMA of a full copy of the model."""
    algorithm = bema()
    model, optimizer, attached = set_up(kind, algorithm)
    attached.loop.begin()  # with the weights before the first step
    theirs = bema()
    reference = Reference(unwrap(model), None)
    loop = Loop([theirs], LoopState(reference._model))
    loop.fire(Event.FIT_START)
    tensors = {slot.name: slot.tensor for slot in slots(reference._model)}
    for step in range(7):
        train(model, optimizer, range(step, step + 1))
        with torch.no_grad():
            for name, tensor in weights(model).items():  # the buffers of rank 0 count
                tensors[name].copy_(tensor)
        loop.end_batch()
    names = [slot.name for slot in slots(unwrap(model)) if slot.is_parameter]
    want = {name: theirs._shadow.averages[name] for name in names}
    got = {name: tensor for name, tensor in _averages(algorithm).items() if name in names}
    found: dict[str, Any] = {"averages": unequal(got, want), "updates": algorithm.num_updates}
    found["is a correction"] = max(
        float((want[name] - theirs._shadow._trailing.averages[name]).abs().max()) for name in names
    )
    before = own_weights(model)
    with attached.applied():
        inside = {name: tensor for name, tensor in own_weights(model).items() if name in names}
    found["swapped in"] = unequal(inside, want)
    found["restored"] = unequal(own_weights(model), before)
    return found


def _state(model: nn.Module, optimizer: torch.optim.Optimizer, attached: Any) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    of_model, of_optimizer = get_state_dict(model, optimizer)
    return {"model": of_model, "optimizer": of_optimizer, "bema": attached}


def bema_resumes(kind: str, folder: str) -> list[str]:
    """Save by DCP and train on; load into another process state and train on; return the differences."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_state_dict

    first = bema()
    model, optimizer, attached = set_up(kind, first)
    train(model, optimizer, range(5))
    planner = DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    dcp.save(_state(model, optimizer, attached), checkpoint_id=folder, planner=planner)
    dist.barrier()
    train(model, optimizer, range(5, 9))
    want = copy.deepcopy(_averages(first))

    second = bema()
    model, optimizer, attached = set_up(kind, second)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)  # other weights than those that are loaded
    state = _state(model, optimizer, attached)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    train(model, optimizer, range(5, 9))
    return unequal(_averages(second), want)

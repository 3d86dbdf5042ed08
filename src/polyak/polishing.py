"""``polish``: continue to train from the average for a short time, at a low rate that falls to 0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from polyak import sharding
from polyak.averaging.ema import EMA
from polyak.averaging.habits import kind_of
from polyak.averaging.schedule import AUTO_SHARE
from polyak.averaging.swap import refuse_merged, refuse_second_swap
from polyak.errors import ArgumentError, LoanError, MismatchError, RecordError
from polyak.profiles import HalfLife, Profile
from polyak.record import Record
from polyak.tensors.slots import all_slots, averaged_parameters, default_policy, unwrap
from polyak.time import Time, TimeUnit
from polyak.training.second import begun

if TYPE_CHECKING:
    from polyak.training.handle import Handle

# The first rate of a polish, as a share of the rate before.
FACTOR = 0.3


def polish(
    model: nn.Module,
    optimizer: Optimizer,
    average: Handle | EMA | Record,
    steps: int,
    *,
    factor: float = FACTOR,
    profile: Profile | None = None,
) -> LambdaLR:
    """Load the average into the model as the start of a new phase, and return the learning rates of that phase.

    An average otherwise never becomes the weights in training; here one asks for it. The optimizer keeps its state. The
    rates fall linearly from ``factor`` of what they are now to 0 after ``steps``: call the scheduler's ``step()`` after
    each of the optimizer's, and no other scheduler's any more. Then the raw weights are the result.

    Args:
        model: The model in training. Its averaged tensors are overwritten: save a checkpoint first.
        optimizer: The optimizer of the model.
        average: What ``attach`` returned, the EMA itself, or a record of the run.
        steps: How many optimizer steps follow, such as a twentieth of the run.
        factor: The first rate as a share of the rate now, above 0.
        profile: For a record: which average is loaded; None for an unbiased half-life of a sixteenth of the recorded
            run. It must be None otherwise.

    Raises:
        ArgumentError: If an argument is not one of these.
        LoanError: If averaging has not begun, or the model holds an average.
        MismatchError: If the record is one of another model.
        RecordError: If the record is empty, or a file of it is damaged.
        ProfileError: If the record does not resolve ``profile``.

    Example:
        >>> from polyak import attach
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> ema = attach(EMA("2 steps"), model, optimizer)
        >>> for _ in range(20):
        ...     model(torch.ones(4, 2)).square().mean().backward()
        ...     optimizer.step()
        >>> scheduler = polish(model, optimizer, ema, steps=3)
        >>> for _ in range(3):
        ...     print(f"{scheduler.get_last_lr()[0]:.3f}")
        ...     optimizer.step()
        ...     scheduler.step()
        0.030
        0.020
        0.010
    """
    _check(model, optimizer, steps, factor)
    refuse_second_swap(model, "polish()")
    refuse_merged(model)
    if isinstance(average, Record):
        _load(unwrap(model), average, profile)
    else:
        if profile is not None:
            raise ArgumentError(f"profile must be None unless a record is given (got {profile!r}); an EMA has its own")
        ema = average if isinstance(average, EMA) else getattr(average, "average", None)
        if not isinstance(ema, EMA):
            raise ArgumentError(
                f"average must be what attach returned, an EMA or a Record (got {kind_of(average)}); attach one, or "
                "open the record"
            )
        load_average(model, ema)
    for loop in begun(model):
        loop.weights_loaded()
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]  # else that of an earlier scheduler would count
    return LambdaLR(optimizer, lambda n: factor * max(0.0, 1 - n / steps))


def load_average(model: nn.Module, ema: EMA) -> None:
    """Copy an average into the model in training, as the start of a new phase.

    If several ranks train the model, all of them must call this.

    Args:
        model: The one that is averaged, wrapped or not.
        ema: Its average.

    Raises:
        LoanError: If averaging has not begun, or adapters are merged in the model.
        MismatchError: If it is the average of another model.
        ShardingError: If the ranks do not have the same average.
    """
    refuse_merged(model)
    averages = _averaged(ema)
    own = {slot.name: slot.tensor for slot in all_slots(unwrap(model))}
    misshaped = {n: (tuple(a.shape), tuple(own[n].shape)) for n, a in averages.items() if n in own}
    misshaped = {name: shapes for name, shapes in misshaped.items() if shapes[0] != shapes[1]}
    if misshaped or averages.keys() - own.keys():
        raise MismatchError(
            "the model to polish must be the one that was averaged:",
            missing=averages.keys() - own.keys(),
            unexpected=set(),
            misshaped=misshaped,
        )
    _copy(unwrap(model), averages)


def _check(model: nn.Module, optimizer: Optimizer, steps: int, factor: float) -> None:
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be the torch.nn.Module in training (got {kind_of(model)}); give it first")
    if not isinstance(optimizer, Optimizer):
        raise ArgumentError(f"optimizer must be one of torch.optim (got {kind_of(optimizer)}); unwrap it")
    sharding.reshard(model)  # after an evaluation the outermost modules of FSDP2 hold other parameters
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(one) in own for group in optimizer.param_groups for one in group["params"]):
        raise ArgumentError(
            "optimizer must move the model's parameters (got one that has none of them); give the one of this model"
        )
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ArgumentError(
            f"steps must be a whole number of at least 1 (got {steps!r}); a twentieth of the run is usual"
        )
    if not 0 < factor < float("inf"):
        raise ArgumentError(f"factor must be above 0 and finite (got {factor!r}); 0.3 of the rate is usual")


def _load(model: nn.Module, record: Record, profile: Profile | None) -> None:
    own = {slot.name: slot.tensor for slot in all_slots(model)}
    trained = {slot.name for slot in averaged_parameters(model, default_policy)}
    kept = {**record.tensors, **{alias: record.tensors[name] for alias, name in record.aliases.items()}}
    misshaped = {n: (kept[n].shape, tuple(own[n].shape)) for n in kept if n in own and kept[n].shape != own[n].shape}
    if misshaped or kept.keys() - own.keys() or trained - kept.keys():
        raise MismatchError(
            f"the model to polish must be that of the record in {record.folder}:",
            missing=kept.keys() - own.keys(),
            unexpected=trained - kept.keys(),
            misshaped=misshaped,
        )
    profile = profile or _sixteenth(record)
    if any(map(sharding.is_sharded, own.values())):
        record.average_into(model, profile)  # each rank reads its shards
    else:
        _copy(model, record.average(profile))


def _averaged(ema: EMA) -> dict[str, Tensor]:
    average = ema._average  # noqa: SLF001  not `ema_model`, which makes a module
    if average.shadow is None or not average.started:
        raise LoanError(
            f"averaging must have begun before there is an average to polish (it begins at {ema.ema_start}); train "
            "until then"
        )
    average.agree()  # the averages of buffers that rank 0 has are those of all
    return average.shadow.averaged_tensors()


@torch.no_grad()
def _copy(model: nn.Module, averages: Mapping[str, Tensor]) -> None:
    sharding.reshard(model)
    own = {slot.name: slot.tensor for slot in all_slots(model)}
    for name, average in averages.items():
        sharding.copy_(own[name].detach(), average.detach())


def _sixteenth(record: Record) -> HalfLife:
    if not record.segments:
        raise RecordError(f"a record must have a segment to have an average, and {record.folder} is empty; train first")
    first, last = record.segments[0].start, record.segments[-1].end
    batches = (last.timestamp.batch - first.timestamp.batch).value
    return HalfLife(Time(batches * AUTO_SHARE, TimeUnit.BATCH), unbiased=True)

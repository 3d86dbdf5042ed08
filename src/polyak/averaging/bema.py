"""``BEMA``: an average that is corrected for its lag behind the weights."""

import math
from functools import partial

import torch
from torch.nn.parameter import is_lazy

from polyak.algorithm import MetricLogger
from polyak.averaging.correction import CorrectedShadow, Correction
from polyak.averaging.ema import EMA
from polyak.averaging.habits import ARGUMENTS_OF_AN_EMA, explained
from polyak.averaging.online import OnlineAverage
from polyak.averaging.schedule import Schedule
from polyak.averaging.settings import Settings, check_options
from polyak.errors import ArgumentError, TimeError
from polyak.events import Event, State
from polyak.sharding import local
from polyak.tensors.slots import PolicyRule, averaged_parameters, default_policy
from polyak.time import Time, TimeUnit, as_span


class BEMA(EMA):
    """Keep a bias-corrected exponential moving average (BEMA) while training; evaluate and save with it as with an EMA.

    After step t it is ``average + (lag + multiplier * t) ** -bias_power * (weights - first)``. An update of ``average``
    at step t takes ``(lag + multiplier * t) ** -ema_power`` of the weights. ``first`` are the weights before the first
    step, or those at ``ema_start``, from where t is counted. Statistics of BatchNorm are averaged and not corrected:
    ``polyak.update_bn`` recomputes them.

    It needs three times the memory of the weights, and its update reads and writes about four times as much as that of
    an EMA. With a longer ``update_interval``, such as the authors' 100 to 400 steps, this does not matter.

    Args:
        ema_power: The authors' kappa, from 0 to 1; smaller values make the average shorter.
        bias_power: Their eta, from 0 to 1; larger values make the correction smaller. None for no correction.
        lag: Their rho, at least 1.
        multiplier: Their gamma, above 0.
        ema_start: How much training comes before averaging, in any unit; their tau.
        update_interval: Steps between updates; their phi.
        dtype: As for ``EMA``.
        policy: As for ``EMA``.

    Raises:
        ArgumentError: If a number is out of range.
        TimeError: If a time cannot be read, or ``update_interval`` is not a number of steps.
        CallError: If there is no argument of that name.

    Example:
        >>> from polyak import attach
        >>> model = torch.nn.Linear(1, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> ema = attach(BEMA(), model, optimizer)
        >>> model(torch.ones(1, 1)).square().sum().backward()
        >>> optimizer.step()
        >>> ema.average.num_updates
        1

    References:
        Block and Zhang, 2025, https://arxiv.org/abs/2508.00180
    """

    @explained("BEMA() or BEMA(bias_power=0.4)", ARGUMENTS_OF_AN_EMA)
    def __init__(
        self,
        ema_power: float = 0.5,
        bias_power: float | None = 0.2,
        lag: float = 10,
        multiplier: float = 1.0,
        *,
        ema_start: str | Time | int = "0ba",
        update_interval: str | Time | int = "1ba",
        dtype: torch.dtype | None = None,
        policy: PolicyRule = default_policy,
    ) -> None:
        _check("ema_power", ema_power, 0, 1)
        if bias_power is not None:
            _check("bias_power", bias_power, 0, 1)
        _check("lag", lag, 1, math.inf)
        _check("multiplier", multiplier, 0, math.inf)
        if not multiplier:
            raise ArgumentError("multiplier must be above 0 (got 0); give bias_power=None for no correction")
        interval = as_span("update_interval", update_interval, above=0, whole=True, steps=True)
        if interval.unit is not TimeUnit.BATCH or math.isinf(interval.value):
            raise TimeError(
                f"update_interval of a BEMA must be a number of steps (got {interval}); give such as '100ba'"
            )
        start = as_span("ema_start", ema_start, steps=True)
        check_options(dtype=dtype, policy=policy, mesh=None, offload=None)
        correction = Correction(ema_power, bias_power, lag, multiplier, int(interval.value))
        name = f"BEMA({ema_power}, {bias_power}, {lag}, {multiplier}, ema_start='{start}', update_interval='{interval}'"
        name += f", dtype={dtype})" if dtype else ")"
        self._average = OnlineAverage(
            Schedule(start, interval, correction),
            Settings(dtype, policy),
            name,
            partial(_shadow_of, correction),
        )

    def apply(self, event: Event, state: State, logger: MetricLogger) -> None:
        """Begin with the weights before the first step, or act as an ``EMA`` does."""
        super().apply(event, state, logger)
        average = self._average
        if event is not Event.FIT_START or average.started:
            return
        parameters = [slot.tensor for slot in averaged_parameters(state.model, average.settings.policy)]
        first = average.schedule.start.value == 0 and state.timestamp.batch.value == 0
        if first and not any(map(is_lazy, parameters)) and all(map(_is_finite, parameters)):
            average.shadow = average.new_shadow(state.model)
            average.progress.begin(average.schedule, state)


def _shadow_of(correction: Correction, model: torch.nn.Module, **settings: object) -> CorrectedShadow:
    return CorrectedShadow(correction, model, **{name: one for name, one in settings.items() if one is not None})


def _is_finite(tensor: torch.Tensor) -> bool:
    return bool(local(tensor.detach()).isfinite().all())


def _check(name: str, value: object, least: float, most: float) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not least <= value <= most or math.isinf(value):
        between = f"from {least:g} to {most:g}" if most < math.inf else f"finite and at least {least:g}"
        raise ArgumentError(f"{name} must be a number {between} (got {value!r}); leave it out for the authors' value")

"""The reference: averages in plain float64, written as in their definitions."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Decay = Callable[[float, float], float]


def half_life(span: float) -> Decay:
    return lambda before, now: 2 ** (-(now - before) / span)


def shares(profile_decay: Decay, moments: Sequence[float]) -> list[float]:
    """Return the share of the weights of each moment in the last average: the differences of the decay."""
    end = moments[-1]
    edges = [0.0, *moments]
    return [profile_decay(b, end) - profile_decay(a, end) for a, b in zip(edges[:-1], edges[1:], strict=True)]


def online(weights: Sequence[Tensor], decays: Sequence[float]) -> Tensor:
    """Return the average that begins with the first weights, and moves by ``1 - decay`` at each later one."""
    average = weights[0].double()
    for tensor, decay in zip(weights[1:], decays, strict=True):
        average = decay * average + (1 - decay) * tensor.double()
    return average


def weighted(weights: Sequence[Tensor], by: Sequence[float]) -> Tensor:
    """Return the sum of the weights times their shares."""
    return sum((share * tensor.double() for share, tensor in zip(by, weights, strict=True)), torch.zeros(()).double())


# The weight of the newest model at update t = 1, 2, ..., as each library computes it.


def newest_smoothing(s: float, t: int) -> float:
    return 1 - s if t > 1 else 1.0


def newest_debiased(s: float, t: int) -> float:
    return (1 - s) / (1 - s**t)


def newest_uniform(t: int) -> float:
    return 1 / t


def newest_power(gamma: float, t: int) -> float:
    return 1 - (1 - 1 / t) ** (gamma + 1)


def newest_diffusers(d: float, t: int) -> float:
    return max(1 - d, 9 / (10 + (t - 1)))


def newest_warmup(d: float, power: float, inv_gamma: float, t: int) -> float:
    return max(1 - d, (1 + (t - 1) / inv_gamma) ** -power)

"""Profiles: how much each moment of training counts in an average.

A profile is one function, ``decay(before, now)``: the share of the average at ``now`` that was already in it at
``before``. Both are readings of the profile's own clock, which starts at 0 when averaging starts. Three laws hold
for all of them: ``decay(t, t)`` is 1; ``decay`` lies in [0, 1] and falls as ``now`` grows; and, for those that one
buffer can follow (``recursive``), ``decay(a, c) == decay(a, b) * decay(b, c)``.

Online, the clock going from ``before`` to ``now`` is the update
``average += (1 - decay(before, now)) * (weights - average)``. Afterwards, a stored stretch ``[a, b)`` has the share
``decay(b, T) - decay(a, T)`` in the average at ``T``. No torch here.
"""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Protocol

from polyak.errors import ProfileError
from polyak.time import Time, TimeUnit, as_span


class Profile(Protocol):
    """What every profile has. To add one, write these three members."""

    @property
    def unit(self) -> TimeUnit | None:
        """The unit of the clock, or None for a clock that counts updates."""
        ...

    @property
    def recursive(self) -> bool:
        """Whether one buffer can follow it while training goes on."""
        ...

    def decay(self, before: float, now: float) -> float:
        """Return the share of the average at ``now`` that was in it at ``before``."""
        ...


def _in_order(before: float, now: float) -> None:
    if not 0 <= before <= now:
        raise ProfileError(f"a decay needs 0 <= before <= now (got before={before!r}, now={now!r})")


@dataclass(frozen=True, slots=True, init=False)
class HalfLife:
    """Forget half of the past every ``span``: the exponential moving average.

    Args:
        span: Half-life, as ``"1000ba"`` or ``"1.5ep"``; at 0 the average is the weights, at ``"infba"`` it never moves.
        unbiased: Whether the first weights count no more than what they span, so that the average of a short run is
            not dominated by where it began (Adam's debiasing).

    Raises:
        TimeError: If ``span`` is no time, or negative.

    Example:
        >>> HalfLife("10ba").decay(before=90, now=100)
        0.5

    References:
        Polyak and Juditsky, 1992, https://doi.org/10.1137/0330046; debiasing as in Kingma and Ba, 2015,
        https://arxiv.org/abs/1412.6980
    """

    span: Time
    unbiased: bool

    def __init__(self, span: Time | str, unbiased: bool = False) -> None:
        object.__setattr__(self, "span", as_span("the half-life", span))
        object.__setattr__(self, "unbiased", unbiased)

    @property
    def half_life(self) -> Time:
        """The half-life."""
        return self.span

    @property
    def unit(self) -> TimeUnit:
        return self.span.unit

    @property
    def recursive(self) -> bool:
        return True

    def constant_decay(self, interval: Time) -> float | None:
        """Return the decay of updates that are one interval apart; None if it is not always the same.

        Args:
            interval: The time between two updates.
        """
        if self.unbiased or interval.unit is not self.unit:
            return None
        return self.decay(0, float(interval))

    def decay(self, before: float, now: float) -> float:
        _in_order(before, now)
        half_life = float(self.span)
        if now == before:
            return 1.0
        if half_life == 0:
            return 0.0
        if math.isinf(half_life):
            return before / now if self.unbiased else 1.0
        kept = 2.0 ** (-(now - before) / half_life)
        if not self.unbiased:
            return kept
        # expm1(before * k) / expm1(now * k), written so that it cannot overflow.
        k = math.log(2) / half_life
        return kept * math.expm1(-before * k) / math.expm1(-now * k)


@dataclass(frozen=True, slots=True)
class Smoothing:
    """Keep ``value`` of the average at every update, whatever elapsed in between.

    Args:
        value: Share of the average kept by one update, from 0 to 1.

    Raises:
        ProfileError: If ``value`` is not in [0, 1].

    Example:
        >>> Smoothing(0.5).decay(before=3, now=5)
        0.25

    References:
        ``smoothing`` of MosaicML Composer's ``EMA``.
    """

    value: float

    def __post_init__(self) -> None:
        number = isinstance(self.value, Real) and not isinstance(self.value, bool)
        if not number or not 0 <= self.value <= 1:
            what = "in [0, 1]" if number else "a number in [0, 1]"
            raise ProfileError(f"smoothing must be {what} (got {self.value!r}); 0.99 keeps 99 % at every update")
        object.__setattr__(self, "value", float(self.value))  # states have no scalars of numpy's

    @property
    def unit(self) -> None:
        return None

    @property
    def recursive(self) -> bool:
        return True

    def constant_decay(self, interval: Time) -> float:
        """Return the decay of every update, whatever the interval.

        Args:
            interval: The time between two updates.
        """
        del interval
        return self.value

    def decay(self, before: float, now: float) -> float:
        _in_order(before, now)
        return self.value ** (now - before)


@dataclass(frozen=True, slots=True, init=False)
class Uniform:
    """Count every moment since ``since`` alike: Polyak-Ruppert averaging, SWA.

    Args:
        since: When to begin, counted from the start of averaging; until then the average is the weights.

    Raises:
        TimeError: If ``since`` is no time, or negative.

    Example:
        >>> Uniform().decay(before=3, now=4)
        0.75

    References:
        Polyak and Juditsky, 1992, https://doi.org/10.1137/0330046; Izmailov et al., 2018,
        https://arxiv.org/abs/1803.05407
    """

    since: Time

    def __init__(self, since: Time | str = "0ba") -> None:
        object.__setattr__(self, "since", as_span("since", since))

    @property
    def unit(self) -> TimeUnit:
        return self.since.unit

    @property
    def recursive(self) -> bool:
        return True

    def decay(self, before: float, now: float) -> float:
        _in_order(before, now)
        since = float(self.since)
        if now == before:
            return 1.0
        return max(0.0, before - since) / (now - since) if now > since else 0.0


@dataclass(frozen=True, slots=True)
class PowerFunction:
    """Weigh each moment by a power of its time, so that the average's width grows with the run.

    Args:
        sigma_rel: Width of the profile relative to the run, above 0 and at most 12 ** -0.5 (about 0.289).
        gamma: The exponent instead, above -1. Exactly one of the two.
        unit: Unit of the clock. The profile itself is the same in each unit that runs evenly.

    Raises:
        ProfileError: If both or neither are given, or one is out of range.

    Example:
        >>> round(PowerFunction(sigma_rel=0.10).exponent, 2)
        6.94
        >>> PowerFunction(gamma=1.0).decay(before=1, now=2)
        0.25

    References:
        Karras et al., 2024, https://arxiv.org/abs/2312.02696, equations 121 to 127.
    """

    sigma_rel: float | None = None
    gamma: float | None = None
    unit: TimeUnit = TimeUnit.BATCH

    def __post_init__(self) -> None:
        object.__setattr__(self, "unit", Time(0, self.unit).unit)
        if (self.sigma_rel is None) == (self.gamma is None):
            raise ProfileError(
                f"give exactly one of sigma_rel and gamma (got sigma_rel={self.sigma_rel!r}, gamma={self.gamma!r})"
            )
        # The widest profile of the family that does not favour the past over the present is the uniform one, gamma 0.
        if self.sigma_rel is not None and not 0 < self.sigma_rel <= 12**-0.5:
            raise ProfileError(f"sigma_rel must be above 0 and at most 12 ** -0.5 (got {self.sigma_rel!r})")
        if self.gamma is not None and not -1 < self.gamma < math.inf:
            raise ProfileError(f"gamma must be above -1 and finite (got {self.gamma!r})")

    @property
    def exponent(self) -> float:
        """The exponent ``gamma``, as given or as ``sigma_rel`` asks for it."""
        return _gamma(self.sigma_rel) if self.sigma_rel is not None else float(self.gamma or 0.0)

    @property
    def recursive(self) -> bool:
        return True

    def decay(self, before: float, now: float) -> float:
        _in_order(before, now)
        return 1.0 if now == before else (before / now) ** (self.exponent + 1)


def _gamma(sigma_rel: float) -> float:
    """Return the largest real root of ``g^3 + 7 g^2 + (16 - s^-2) g + (12 - s^-2)``."""
    s = sigma_rel**-2
    g = 1.0 / sigma_rel  # right of the largest root, from where Newton's method falls onto it
    for _ in range(100):
        value = ((g + 7) * g + 16 - s) * g + 12 - s
        slope = (3 * g + 14) * g + 16 - s
        step = value / slope
        g -= step
        if abs(step) <= 1e-15 * (1 + abs(g)):
            break
    return g


@dataclass(frozen=True, slots=True)
class Warmup:
    """Let an average of constant decay move faster in its first steps, as diffusers, timm and ema-pytorch do.

    The decay of step n (0, 1, ...) is the smaller of the profile's own and the rule's: ``(1 + n) / (10 + n)`` when
    ``power`` is None, which is diffusers' rule, else ``1 - (1 + n / inv_gamma) ** -power``, which is that of timm and
    ema-pytorch and of diffusers' ``use_ema_warmup``. Steps are units of the profile's clock.

    Args:
        profile: A ``HalfLife`` that is not ``unbiased``, or a ``Smoothing``.
        power: Exponent of the second rule, above 0; 2/3 suits runs of a million steps, 3/4 shorter ones.
        inv_gamma: Scale of the second rule in steps, above 0.

    Raises:
        ProfileError: If an argument is out of range, or ``profile`` is of another kind.

    Example:
        >>> Warmup(Smoothing(0.999)).decay(before=0, now=1)
        0.1
        >>> Warmup(Smoothing(0.999), power=2 / 3).decay(before=7, now=8)
        0.75

    References:
        diffusers ``EMAModel``, timm ``ModelEmaV3``, ema-pytorch ``EMA``.
    """

    profile: HalfLife | Smoothing
    power: float | None = None
    inv_gamma: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.profile, HalfLife | Smoothing) or getattr(self.profile, "unbiased", False):
            raise ProfileError(
                "a warm-up needs a HalfLife that is not unbiased, or a Smoothing: the other profiles already forget "
                f"the first weights (got {self.profile!r})"
            )
        if self.power is not None and not 0 < self.power < math.inf:
            raise ProfileError(f"power must be above 0 and finite (got {self.power!r})")
        if not 0 < self.inv_gamma < math.inf:
            raise ProfileError(f"inv_gamma must be above 0 and finite (got {self.inv_gamma!r})")

    @property
    def unit(self) -> TimeUnit | None:
        return self.profile.unit

    @property
    def recursive(self) -> bool:
        return True

    def _rule(self, n: int) -> float:
        if self.power is None:
            return (1 + n) / (10 + n)
        return 1 - (1 + n / self.inv_gamma) ** -self.power

    def decay(self, before: float, now: float) -> float:
        _in_order(before, now)
        constant = self.profile.decay(0, 1)
        kept = 1.0
        # A step that the clock has only partly gone counts by that part, as an exponent.
        n = math.floor(before)
        while before < now:
            rule = self._rule(n)
            if rule >= constant or kept == 0.0:
                return kept * self.profile.decay(before, now)
            until = min(now, n + 1.0)
            kept *= rule ** (until - before)
            before, n = until, n + 1
        return kept


@dataclass(frozen=True, slots=True, init=False)
class Window:
    """Count the last ``span`` alike and nothing before it: LAWA.

    One buffer cannot follow it, because it would have to forget what leaves the window: it is for records.

    Args:
        span: Width, above 0.

    Raises:
        TimeError: If ``span`` is no time, or not above 0.

    Example:
        >>> Window("10ba").decay(before=95, now=100)
        0.5

    References:
        Kaddour, 2022, https://arxiv.org/abs/2209.14981; Sanyal et al., 2023, https://arxiv.org/abs/2306.03241
    """

    span: Time

    def __init__(self, span: Time | str) -> None:
        object.__setattr__(self, "span", as_span("the window", span, above=0))

    @property
    def unit(self) -> TimeUnit:
        return self.span.unit

    @property
    def recursive(self) -> bool:
        return False

    def decay(self, before: float, now: float) -> float:
        _in_order(before, now)
        if now == before:
            return 1.0
        width = min(float(self.span), now)
        return min(1.0, max(0.0, (before - (now - width)) / width))

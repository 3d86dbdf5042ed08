"""Profiles: how much each moment of training counts in an average.

A profile is one function, ``decay(before, now)``: the share of the average at ``now`` that was already in it at
``before``. Both are readings of the profile's clock, which starts at 0 when averaging starts. Three laws hold for all
profiles: ``decay(t, t)`` is 1; ``decay`` lies in [0, 1] and falls as ``now`` grows; and, for those that one buffer can
follow (``recursive``), ``decay(a, c) == decay(a, b) * decay(b, c)``.

During training, the update from ``before`` to ``now`` is
``average += (1 - decay(before, now)) * (weights - average)``. Afterwards, a recorded segment ``[a, b)`` has the share
``decay(b, T) - decay(a, T)`` in the average at ``T``. This module does not import torch.

To add a profile, write one class below: derive it from ``NamedProfile`` and decorate it with ``register``. The command
line, the sweep and the report find it in the registry.
"""

import math
import sys
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar, Self

from polyak.errors import ProfileError
from polyak.profiles.base import (
    Form,
    NamedProfile,
    Profile,
    forms,
    in_order,
    named,
    options,
    parse,
    parse_words,
    register,
)
from polyak.time import Time, TimeUnit, as_span

__all__ = [
    "Cooldown",
    "Form",
    "HalfLife",
    "Momentum",
    "NamedProfile",
    "PowerFunction",
    "Profile",
    "Smoothing",
    "Uniform",
    "Warmup",
    "Window",
    "forms",
    "named",
    "options",
    "parse",
    "parse_words",
    "register",
]


@register
@dataclass(frozen=True, slots=True, init=False)
class HalfLife(NamedProfile):
    """Forget half of the past every ``span``: the exponential moving average.

    Args:
        span: Half-life, as ``"1000ba"`` or ``"1.5ep"``; at 0 the average is the weights, at ``"infba"`` it never moves.
        unbiased: Whether the first weights count no more than the time they stand for, so that they do not dominate
            the average of a short run (Adam's debiasing).

    Raises:
        TimeError: If ``span`` is not a time, or is negative.

    Example:
        >>> HalfLife("10ba").decay(before=90, now=100)
        0.5

    References:
        Polyak and Juditsky, 1992, https://doi.org/10.1137/0330046; debiasing as in Kingma and Ba, 2015,
        https://arxiv.org/abs/1412.6980
    """

    FORMS: ClassVar[tuple[Form, ...]] = (
        Form("half-life", "TIME", "an exponential moving average that forgets half within TIME", "500ba"),
        Form("unbiased", "TIME", "the same, without bias toward the first weights", "500ba"),
    )

    span: Time
    unbiased: bool

    def __init__(self, span: Time | str | int, unbiased: bool = False) -> None:
        object.__setattr__(self, "span", as_span("the half-life", span, steps=True))
        object.__setattr__(self, "unbiased", unbiased)

    @classmethod
    def parse(cls, form: str, text: str) -> Self:
        return cls(text, unbiased=form == "unbiased")

    @property
    def unit(self) -> TimeUnit:
        return self.span.unit

    def decay(self, before: float, now: float) -> float:
        in_order(before, now)
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
        if now * k < sys.float_info.min:  # where numbers lose their digits; both exponentials are linear there
            return before / now
        return kept * math.expm1(-before * k) / math.expm1(-now * k)

    @property
    def constant(self) -> bool:
        return not self.unbiased

    @property
    def forgets_nothing(self) -> bool:
        return math.isinf(self.span.value)

    @property
    def half_life(self) -> Time:
        return self.span

    @property
    def argument(self) -> str:
        return f"half_life='{self.span}'"

    @property
    def options(self) -> str:
        return f"--half-life {self.span}{' --unbiased' if self.unbiased else ''}"

    def describe(self) -> str:
        return f"half-life {self.span}"

    def debiased(self) -> "HalfLife":
        return HalfLife(self.span, unbiased=True)


@register
@dataclass(frozen=True, slots=True, init=False)
class Window(NamedProfile):
    """Give every moment of the last ``span`` the same weight, and none to earlier ones: LAWA.

    One buffer cannot follow a window, because it cannot forget what leaves the window. Use it with a record.

    Args:
        span: Width, above 0.

    Raises:
        TimeError: If ``span`` is not a time, or is not above 0.

    Example:
        >>> Window("10ba").decay(before=95, now=100)
        0.5

    References:
        Kaddour, 2022, https://arxiv.org/abs/2209.14981; Sanyal et al., 2023, https://arxiv.org/abs/2306.03241
    """

    FORMS: ClassVar[tuple[Form, ...]] = (Form("window", "TIME", "the plain mean over the last TIME", "10ep"),)

    span: Time

    def __init__(self, span: Time | str | int) -> None:
        object.__setattr__(self, "span", as_span("the window", span, above=0, steps=True))

    @classmethod
    def parse(cls, form: str, text: str) -> Self:
        return cls(text)

    @property
    def unit(self) -> TimeUnit:
        return self.span.unit

    @property
    def recursive(self) -> bool:
        return False

    def decay(self, before: float, now: float) -> float:
        in_order(before, now)
        if now == before:
            return 1.0
        width = min(float(self.span), now)
        return min(1.0, max(0.0, (before - (now - width)) / width))

    @property
    def options(self) -> str:
        return f"--window {self.span}"

    def describe(self) -> str:
        return f"window {self.span}"


@register
@dataclass(frozen=True, slots=True, init=False)
class Uniform(NamedProfile):
    """Give every moment after ``since`` the same weight: Polyak-Ruppert averaging, SWA.

    Args:
        since: When to begin, counted from the start of averaging; until then the average equals the weights.

    Raises:
        TimeError: If ``since`` is not a time, or is negative.

    Example:
        >>> Uniform().decay(before=3, now=4)
        0.75

    References:
        Polyak and Juditsky, 1992, https://doi.org/10.1137/0330046; Izmailov et al., 2018,
        https://arxiv.org/abs/1803.05407
    """

    FORMS: ClassVar[tuple[Form, ...]] = (
        Form("uniform-from", "TIME", "the plain mean over all since TIME after the record's start (SWA)", "50ep"),
    )

    since: Time

    def __init__(self, since: Time | str | int = "0ba") -> None:
        object.__setattr__(self, "since", as_span("since", since, steps=True))

    @classmethod
    def parse(cls, form: str, text: str) -> Self:
        return cls(text)

    @property
    def unit(self) -> TimeUnit:
        return self.since.unit

    def decay(self, before: float, now: float) -> float:
        in_order(before, now)
        since = float(self.since)
        if now == before:
            return 1.0
        return max(0.0, before - since) / (now - since) if now > since else 0.0

    @property
    def options(self) -> str:
        return f"--uniform-from {self.since}"

    def describe(self) -> str:
        return f"uniform from {self.since}"


@register
@dataclass(frozen=True, slots=True)
class PowerFunction(NamedProfile):
    """Weight each moment by a power of its time, so that the width of the average grows with the run.

    Args:
        sigma_rel: Width of the profile relative to the run, above 0 and at most 12 ** -0.5 (about 0.289).
        gamma: The exponent instead, above -1. Give exactly one of the three.
        unit: Unit of the clock. The profile is the same in each unit that advances evenly.
        half_life_fraction: The half-life as a share of the time so far instead, above 0: torchtitan's, whose default
            0.05 is ``gamma`` 12.86.

    Raises:
        ProfileError: If not exactly one is given, or it is out of range.

    Example:
        >>> round(PowerFunction(sigma_rel=0.10).exponent, 2)
        6.94
        >>> PowerFunction(gamma=1.0).decay(before=1, now=2)
        0.25

    References:
        Karras et al., 2024, https://arxiv.org/abs/2312.02696, equations 121 to 127; ``half_life_fraction`` of
        torchtitan's EMA.
    """

    FORMS: ClassVar[tuple[Form, ...]] = (
        Form("power", "SIGMA", "a power function of relative width SIGMA, such as EDM2's 0.1", "0.1"),
    )

    sigma_rel: float | None = None
    gamma: float | None = None
    unit: TimeUnit = TimeUnit.BATCH
    half_life_fraction: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "unit", Time(0, self.unit).unit)
        given = {name: getattr(self, name) for name in ("sigma_rel", "gamma", "half_life_fraction")}
        if sum(value is not None for value in given.values()) != 1:
            got = ", ".join(f"{name}={value!r}" for name, value in given.items())
            raise ProfileError(f"give exactly one of sigma_rel, gamma and half_life_fraction (got {got})")
        # The widest profile of the family that does not favour the past over the present is the uniform one, gamma 0.
        if self.sigma_rel is not None and not 0 < self.sigma_rel <= 12**-0.5:
            raise ProfileError(f"sigma_rel must be above 0 and at most 12 ** -0.5 (got {self.sigma_rel!r})")
        if self.gamma is not None and not -1 < self.gamma < math.inf:
            raise ProfileError(f"gamma must be above -1 and finite (got {self.gamma!r})")
        if self.half_life_fraction is not None and not 0 < self.half_life_fraction < math.inf:
            raise ProfileError(f"half_life_fraction must be above 0 and finite (got {self.half_life_fraction!r})")

    @classmethod
    def parse(cls, form: str, text: str) -> Self:
        return cls(float(text))

    @property
    def exponent(self) -> float:
        """The exponent ``gamma``, as given or computed."""
        if self.sigma_rel is not None:
            return _gamma(self.sigma_rel)
        if self.half_life_fraction is not None:
            return math.log(2) / self.half_life_fraction - 1
        return float(self.gamma or 0.0)

    def decay(self, before: float, now: float) -> float:
        in_order(before, now)
        return 1.0 if now == before else (before / now) ** (self.exponent + 1)

    @property
    def options(self) -> str | None:
        given = self.sigma_rel is not None and self.unit is TimeUnit.BATCH
        return f"--power {self.sigma_rel}" if given else None

    def describe(self) -> str:
        return str(self) if self.sigma_rel is None else f"power function {self.sigma_rel:g}"


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


@register
@dataclass(frozen=True, slots=True)
class Smoothing(NamedProfile):
    """Keep ``value`` of the average at every update, however much time has passed in between.

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

    FORMS: ClassVar[tuple[Form, ...]] = (
        Form(
            "smoothing",
            "S",
            "an exponential moving average that keeps S of itself at each recorded update, such as 0.999",
            "0.999",
        ),
    )

    value: float

    def __post_init__(self) -> None:
        number = isinstance(self.value, Real) and not isinstance(self.value, bool)
        if not number or not 0 <= self.value <= 1:
            what = "in [0, 1]" if number else "a number in [0, 1]"
            raise ProfileError(f"smoothing must be {what} (got {self.value!r}); 0.99 keeps 99 % at every update")
        object.__setattr__(self, "value", float(self.value))  # a state holds no NumPy scalars

    @classmethod
    def parse(cls, form: str, text: str) -> Self:
        return cls(float(text))

    @property
    def unit(self) -> None:
        return None

    def decay(self, before: float, now: float) -> float:
        in_order(before, now)
        return self.value ** (now - before)

    @property
    def constant(self) -> bool:
        return True

    @property
    def options(self) -> str:
        return f"--smoothing {self.value}"

    def describe(self) -> str:
        return f"smoothing {self.value:g}"


@register
@dataclass(frozen=True, slots=True)
class Warmup(NamedProfile):
    """Use a smaller decay than ``profile`` in the first steps, as diffusers, timm and ema-pytorch do.

    The decay of step n (0, 1, ...) is the smaller of the profile's decay and that of a rule. With ``power=None`` the
    rule is that of diffusers, ``(1 + n) / (10 + n)``. Otherwise it is ``1 - (1 + n / inv_gamma) ** -power``, as in
    timm, ema-pytorch and diffusers' ``use_ema_warmup``. A step is one unit of the profile's clock.

    Args:
        profile: A ``HalfLife`` that is not ``unbiased``, or a ``Smoothing``.
        power: Exponent of the second rule, above 0; 2/3 suits runs of a million steps, 3/4 shorter ones.
        inv_gamma: Scale of the second rule in steps, above 0.

    Raises:
        ProfileError: If an argument is out of range, or the decay of ``profile`` is not constant.

    Example:
        >>> Warmup(Smoothing(0.999)).decay(before=0, now=1)
        0.1
        >>> Warmup(Smoothing(0.999), power=2 / 3).decay(before=7, now=8)
        0.75

    References:
        diffusers ``EMAModel``, timm ``ModelEmaV3``, ema-pytorch ``EMA``.
    """

    profile: NamedProfile
    power: float | None = None
    inv_gamma: float = 1.0

    def __post_init__(self) -> None:
        if not (isinstance(self.profile, NamedProfile) and self.profile.constant):
            raise ProfileError(
                f"a warm-up needs a profile of constant decay (got {self.profile!r}); use a HalfLife that is not "
                "unbiased, or a Smoothing"
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
        in_order(before, now)
        constant = self.profile.decay(0, 1)
        kept = 1.0
        # A step of which the clock has covered a fraction counts by that fraction, as an exponent.
        n = math.floor(before)
        while before < now:
            rule = self._rule(n)
            if rule >= constant or kept == 0.0:
                return kept * self.profile.decay(before, now)
            until = min(now, n + 1.0)
            kept *= rule ** (until - before)
            before, n = until, n + 1
        return kept


# Last, so that the options of the command line come in the order of use.
from polyak.profiles.cooldown import Cooldown  # noqa: E402
from polyak.profiles.momentum import Momentum  # noqa: E402

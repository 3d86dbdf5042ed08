"""``Momentum``: the schedule by which the momentum of a teacher rises."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

from polyak.errors import ProfileError
from polyak.profiles.base import NamedProfile, in_order, register
from polyak.time import Time, TimeUnit, as_span

# How much of the way from the first momentum to the last is covered after a share of the schedule.
_SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda x: (1 - math.cos(math.pi * x)) / 2,
    "linear": lambda x: x,
}
_KNOWN = (TimeUnit.BATCH, TimeUnit.EPOCH, TimeUnit.DURATION)


@register
@dataclass(frozen=True, slots=True, init=False)
class Momentum(NamedProfile):
    """Keep ``first`` of the average at the first step, and more with each step until it is ``last``: for teachers.

    Step k of K (k = 0, 1, ...) keeps ``last - (last - first) * (cos(pi * k / K) + 1) / 2``, as in BYOL and DINO. An
    update that comes after several steps keeps the product of theirs. After ``over`` each step keeps ``last``.

    Args:
        first: Share of the average that the first step keeps, from 0 to 1.
        last: Share that the last one keeps, from ``first`` to 1.
        shape: ``"cosine"`` or ``"linear"`` (I-JEPA, V-JEPA).
        over: How long the momentum rises: ``"1dur"``, which needs the length of the run, or steps or epochs.

    Raises:
        TimeError: If ``over`` is not a time, or is not above 0.
        ProfileError: If another argument is out of range, or ``over`` is in a unit that is not counted in steps.

    Example:
        >>> Momentum(0.996, 1.0, over="1000 steps").decay(before=500, now=501)
        0.998

    References:
        Grill et al., 2020, https://arxiv.org/abs/2006.07733; Caron et al., 2021, https://arxiv.org/abs/2104.14294
    """

    first: float
    last: float
    shape: str
    over: Time

    def __init__(
        self, first: float = 0.996, last: float = 1.0, shape: str = "cosine", over: Time | str | int = "1dur"
    ) -> None:
        for name, value in (("first", first), ("last", last)):
            if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value <= 1:
                raise ProfileError(f"{name} must be a number from 0 to 1 (got {value!r}); 0.996 is usual for the first")
        if first > last:
            raise ProfileError(f"a momentum must rise (got {first!r}, then {last!r}); give the smaller one first")
        if shape not in _SHAPES:
            raise ProfileError(f"shape must be one of {', '.join(_SHAPES)} (got {shape!r})")
        span = as_span("over", over, above=0, steps=True)
        if span.unit not in _KNOWN or math.isinf(span.value):
            raise ProfileError(
                f"over must be a finite number of steps, epochs or dur (got {span}); a momentum is one of each step: "
                "for other clocks use HalfLife or PowerFunction"
            )
        for name, value in (("first", float(first)), ("last", float(last)), ("shape", shape), ("over", span)):
            object.__setattr__(self, name, value)

    @property
    def unit(self) -> TimeUnit:
        return TimeUnit.BATCH

    @property
    def forgets_nothing(self) -> bool:
        # A teacher that starts with the student's weights is meant to keep them for long.
        return True

    def decay(self, before: float, now: float) -> float:
        in_order(before, now)
        if self.over.unit is not TimeUnit.BATCH:
            raise ProfileError(
                f"a momentum must know how many steps {self.over} are (got {self!r}, and no length of the run or of an "
                "epoch); give max_duration to the loop, or over in steps: Momentum(over='10000 steps')"
            )
        kept, n = 1.0, math.floor(before)
        # A step of which the clock has covered a fraction counts by that fraction, as an exponent.
        while before < now and kept > 0:
            if n >= self.over.value:
                return kept * self.last ** (now - before)
            until = min(now, n + 1.0)
            share = _SHAPES[self.shape](n / float(self.over))
            kept *= (self.first + (self.last - self.first) * share) ** (until - before)
            before, n = until, n + 1
        return kept

    def in_steps(self, steps: float | None) -> "Momentum":
        """Return the same momentum with ``over`` in steps.

        Args:
            steps: How many ``over`` is; None if that is not known, which changes nothing.
        """
        if steps is None or self.over.unit is TimeUnit.BATCH:
            return self
        return Momentum(self.first, self.last, self.shape, Time(steps, TimeUnit.BATCH))

    def describe(self) -> str:
        return f"momentum {self.first:g} to {self.last:g}, {self.shape}, over {self.over}"

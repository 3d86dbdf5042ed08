"""``Cooldown``: the average that stands for a learning rate which falls at the end of the run."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from typing import ClassVar, Self

from polyak.errors import ProfileError
from polyak.profiles.base import Form, NamedProfile, in_order, register
from polyak.time import Time, TimeUnit, as_span

# The learning rate after a share of the cooldown, as a share of the rate before it.
SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "1-sqrt": lambda x: 1 - math.sqrt(x),
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "1-square": lambda x: 1 - x * x,
}
# The same average in one buffer, from a fixed start on; a cosine has none.
_ONLINE = {"linear": "Uniform()", "1-sqrt": "PowerFunction(gamma=-0.5)", "1-square": "PowerFunction(gamma=1.0)"}


@register
@dataclass(frozen=True, slots=True, init=False, repr=False)
class Cooldown(NamedProfile):
    """Weight the last ``span`` as if the learning rate had fallen over it: a virtual learning-rate decay.

    A run at a constant rate whose updates of the last ``span`` were scaled by a falling ``rate`` would end, to first
    order, at this average: the weights after each update count by how much the rate falls from that update to the next.
    No update is computed again, so it stands for short cooldowns better than for long ones.

    It needs the weights of the whole span, which one buffer cannot keep. Use it with a record or with checkpoints: they
    must not be shorter than the span.

    Args:
        span: How long the rate falls, above 0.
        shape: ``"linear"``, ``"1-sqrt"``, ``"cosine"``, ``"1-square"``, or a function of the share of the cooldown that
            is over: it returns the rate as a share of the rate before, falling from 1 at 0 to 0 at 1.
        floor: Where the rate ends, as a share of the rate before, from 0 to below 1. It is the share of the last raw
            weights in the average, which a record keeps once its run has ended.
        snap: Whether the cooldown begins at the nearest edge of a recorded segment, or at the nearest checkpoint. A
            linear one is then exact, and others have a smaller error.

    Raises:
        TimeError: If ``span`` is not a time, or is not above 0.
        ProfileError: If ``shape`` is not one of these, or ``floor`` is out of range.

    Example:
        >>> Cooldown("10ba").decay(before=95, now=100)  # as Window("10ba")
        0.5
        >>> Cooldown("10ba", "1-square").decay(before=95, now=100)
        0.25
        >>> Cooldown("10ba", floor=0.2).decay(before=95, now=100)
        0.4

    References:
        Tian et al., 2025, https://arxiv.org/abs/2507.17634; Sandler et al., 2023, https://arxiv.org/abs/2301.02312
    """

    FORMS: ClassVar[tuple[Form, ...]] = (
        Form(
            "cooldown",
            "TIME:SHAPE:floor=F:snap",
            f"as if the learning rate had fallen over the last TIME to 0, or to F of itself; SHAPE is "
            f"{', '.join(SHAPES)}; snap begins at the nearest edge; all but TIME may be left out",
            "10ep",
        ),
    )

    span: Time
    shape: str | Callable[[float], float]
    floor: float
    snap: bool

    def __init__(
        self,
        span: Time | str | int,
        shape: str | Callable[[float], float] = "linear",
        floor: float = 0.0,
        snap: bool = False,
    ) -> None:
        object.__setattr__(self, "span", as_span("the cooldown", span, above=0, steps=True))
        if isinstance(shape, str) and shape not in SHAPES:
            raise ProfileError(f"shape must be one of {', '.join(SHAPES)}, or a function (got {shape!r})")
        if not isinstance(shape, str):
            _check_falls(shape)
        if isinstance(floor, bool) or not isinstance(floor, Real) or not 0 <= floor < 1:
            raise ProfileError(
                f"floor must be a number from 0 to below 1 (got {floor!r}); it is where the learning rate ends, as a "
                "share of the rate before the cooldown"
            )
        if not isinstance(snap, bool):
            raise ProfileError(f"snap must be True or False (got {snap!r}); a time goes into span")
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "floor", float(floor))
        object.__setattr__(self, "snap", snap)

    @classmethod
    def parse(cls, form: str, text: str) -> Self:
        del form
        span, *words = re.split(r"[\s,:=]+", text.strip())
        shape, floor, snap = None, 0.0, False
        while words:
            word = words.pop(0)
            if word == "snap":
                snap = True
            elif word == "floor":
                floor = _number(words.pop(0) if words else "")
            elif shape is None:
                shape = word
            else:
                raise ProfileError(
                    f"a cooldown must have a time, a shape, 'floor F' and 'snap' at most (got {word!r} in {text!r})"
                )
        length = Time(_number(span[:-1]) / 100, TimeUnit.DURATION) if span.endswith("%") else span
        return cls(length, shape or "linear", floor, snap)

    @property
    def _shape_name(self) -> str:
        if isinstance(self.shape, str):
            return self.shape
        return getattr(self.shape, "__qualname__", type(self.shape).__name__)

    def __repr__(self) -> str:
        # The same in each process: results of a sweep are found by it.
        shape = repr(self.shape) if isinstance(self.shape, str) else self._shape_name
        floor = f", floor={self.floor!r}" if self.floor else ""
        return f"Cooldown(span={self.span!r}, shape={shape}{floor}{', snap=True' if self.snap else ''})"

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
        over = min(1.0, max(0.0, (before - (now - width)) / width))
        rate = SHAPES[self.shape] if isinstance(self.shape, str) else self.shape
        return (1 - self.floor) * min(1.0, max(0.0, 1 - rate(over)))

    def placed(self, edges: Sequence[float]) -> tuple["Cooldown", float]:
        length, span, now = edges[-1] - edges[0], float(self.span), edges[-1]
        if span > length * (1 + 1e-9):
            there = Time(length, self.unit)
            raise ProfileError(
                f"a cooldown must not be longer than what it is taken from (got {self.span} for {there} of training); "
                "ask for a shorter one, or record from an earlier step"
            )
        if self.snap:
            start = min(edges[:-1], key=lambda edge: abs(now - span - edge))
            span = now - start
        return Cooldown(Time(span, self.unit), self.shape), self.floor

    @property
    def online(self) -> str:
        recorded = "record the run and take this average from the record"
        if self.floor or self.shape not in _ONLINE:
            return recorded
        return f"{recorded}, or fix its start: EMA(profile={_ONLINE[self.shape]}, ema_start=...) is the same from there"

    @property
    def options(self) -> str | None:
        if not isinstance(self.shape, str):
            return None
        floor = f":floor={self.floor!r}" if self.floor else ""
        return f"--cooldown {self.span}:{self.shape}{floor}{':snap' if self.snap else ''}"

    def describe(self) -> str:
        floor = f", floor {self.floor:g}" if self.floor else ""
        return f"cooldown {self.span}, {self._shape_name}{floor}{', snap' if self.snap else ''}"


def _check_falls(shape: Callable[[float], float]) -> None:
    if not callable(shape):
        raise ProfileError(f"shape must be one of {', '.join(SHAPES)}, or a function (got {shape!r})")
    rates = [shape(i / 64) for i in range(65)]
    falls = all(a >= b for a, b in pairwise(rates))
    if not (falls and math.isclose(rates[0], 1.0) and math.isclose(rates[-1], 0.0, abs_tol=1e-9)):
        raise ProfileError(
            "shape must be a function that falls from 1 at 0 to 0 at 1 (got one that gives "
            f"{', '.join(f'{rate:g}' for rate in rates[::16])} at 0, 1/4, 1/2, 3/4, 1); it is the learning rate "
            "as a share of the rate before the cooldown"
        )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ProfileError(
            f"a cooldown must have numbers, such as 'cooldown 20%, 1-sqrt, floor 0.1' (got {text!r} for one)"
        ) from None

"""``Cooldown``: the average that stands for a learning rate which falls at the end of the run."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
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


@register
@dataclass(frozen=True, slots=True, init=False, repr=False)
class Cooldown(NamedProfile):
    """Weight the last ``span`` as if the learning rate had fallen to 0 over it: a virtual learning-rate decay.

    A run at a constant rate whose updates of the last ``span`` were scaled by a falling ``rate`` would end, to first
    order, at this average: the weights after each update count by how much the rate falls from that update to the next.
    No update is computed again, so it stands for short cooldowns better than for long ones.

    It needs the weights of the whole span, which one buffer cannot keep. Use it with a record.

    Args:
        span: How long the rate falls, above 0; the whole run if that is shorter.
        shape: ``"linear"``, ``"1-sqrt"``, ``"cosine"``, ``"1-square"``, or a function of the share of the cooldown that
            is over: it returns the rate as a share of the rate before, falling from 1 at 0 to 0 at 1.

    Raises:
        TimeError: If ``span`` is not a time, or is not above 0.
        ProfileError: If ``shape`` is none of these.

    Example:
        >>> Cooldown("10ba").decay(before=95, now=100)  # as Window("10ba")
        0.5
        >>> Cooldown("10ba", "1-square").decay(before=95, now=100)
        0.25

    References:
        Tian et al., 2025, https://arxiv.org/abs/2507.17634; Sandler et al., 2023, https://arxiv.org/abs/2301.02312
    """

    FORMS: ClassVar[tuple[Form, ...]] = (
        Form(
            "cooldown",
            "TIME[:SHAPE]",
            f"as if the learning rate had fallen to 0 over the last TIME; SHAPE is {', '.join(SHAPES)}",
            "10ep",
        ),
    )

    span: Time
    shape: str | Callable[[float], float]

    def __init__(self, span: Time | str | int, shape: str | Callable[[float], float] = "linear") -> None:
        object.__setattr__(self, "span", as_span("the cooldown", span, above=0, steps=True))
        if isinstance(shape, str) and shape not in SHAPES:
            raise ProfileError(f"shape must be one of {', '.join(SHAPES)}, or a function (got {shape!r})")
        object.__setattr__(self, "shape", shape)
        if not isinstance(shape, str):
            self._check_falls(shape)

    @staticmethod
    def _check_falls(shape: Callable[[float], float]) -> None:
        rates = [shape(i / 64) for i in range(65)]
        falls = all(a >= b for a, b in pairwise(rates))
        if not (falls and math.isclose(rates[0], 1.0) and math.isclose(rates[-1], 0.0, abs_tol=1e-9)):
            raise ProfileError(
                "shape must be a function that falls from 1 at 0 to 0 at 1 (got one that gives "
                f"{', '.join(f'{rate:g}' for rate in rates[::16])} at 0, 1/4, 1/2, 3/4, 1); it is the learning rate "
                "as a share of the rate before the cooldown"
            )

    @classmethod
    def parse(cls, form: str, text: str) -> Self:
        del form
        span, _, shape = re.sub(r"[\s,:]+", " ", text.strip()).partition(" ")
        if span.endswith("%"):
            return cls(Time(float(span[:-1]) / 100, TimeUnit.DURATION), shape or "linear")
        return cls(span, shape or "linear")

    @property
    def _shape_name(self) -> str:
        return (
            self.shape
            if isinstance(self.shape, str)
            else getattr(self.shape, "__qualname__", type(self.shape).__name__)
        )

    def __repr__(self) -> str:
        # The same in each process: results of a sweep are found by it.
        shape = repr(self.shape) if isinstance(self.shape, str) else self._shape_name
        return f"Cooldown(span={self.span!r}, shape={shape})"

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
        return min(1.0, max(0.0, 1 - rate(over)))

    @property
    def options(self) -> str | None:
        return f"--cooldown {self.span}:{self.shape}" if isinstance(self.shape, str) else None

    def describe(self) -> str:
        return f"cooldown {self.span}, {self._shape_name}"

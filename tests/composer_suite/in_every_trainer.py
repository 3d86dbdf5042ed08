"""A pytest plugin: adds the EMA that ``EMA_IN_EVERY_TRAINER`` names to every ``Trainer`` that a test makes."""

import functools
import os
from typing import Any

from composer import Trainer
from composer import algorithms as composers

from polyak.hosts import composer as polyaks

HALF_LIFE = "10ba"
CLASSES = {"Composer's EMA": composers.EMA, "polyak's EMA": polyaks.EMA}

make = CLASSES.get(os.environ.get("EMA_IN_EVERY_TRAINER", ""))
construct = Trainer.__init__


@functools.wraps(construct)
def construct_with_ema(self: Trainer, *args: Any, algorithms: Any = None, **options: Any) -> None:
    given = list(algorithms) if isinstance(algorithms, (list, tuple)) else [] if algorithms is None else [algorithms]
    if make is not None and not any(isinstance(algorithm, tuple(CLASSES.values())) for algorithm in given):
        given.append(make(half_life=HALF_LIFE))
    construct(self, *args, algorithms=given, **options)


if make is not None:
    Trainer.__init__ = construct_with_ema

"""Folders of ``PostHocEMA``, of ema-pytorch and nitrous-ema: ``0.1000.pt`` is average 0 after 1,000 steps.

The files say neither the profiles nor how many steps there are between two updates, so that the user does.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyak.checkpoints.opening import open_checkpoint
from polyak.checkpoints.series.averages import Average, Options, Series
from polyak.compat.words import shown
from polyak.errors import CheckpointError
from polyak.profiles import PowerFunction, Profile
from polyak.time import TimeUnit

KIND = "folder of PostHocEMA"
_NAME = re.compile(r"(\d+)\.(\d+)\.pt")
_PREFIX = "ema_model."


@dataclass(frozen=True, slots=True)
class Strided:
    """A power function that is updated every few steps, as in ``KarrasEMA``.

    The decay of update i, at step ``i * every``, is ``((s + 1) / (s + 2)) ** (gamma + 1)``, s being that step: as if
    one step had passed. With nitrous-ema's correction it is the geometric mean of two such decays, to the power of
    ``every``.

    Args:
        gamma: The exponent.
        every: The number of steps between two updates.
        corrected: Whether the correction was on.
    """

    gamma: float
    every: int
    corrected: bool = False

    @property
    def unit(self) -> TimeUnit:
        """The unit of the clock."""
        return TimeUnit.BATCH

    @property
    def recursive(self) -> bool:
        """Whether one buffer can follow the profile during training."""
        return True

    def decay(self, before: float, now: float) -> float:
        """Return the share of the average at ``now`` that was in it at ``before``.

        Between two updates, each counts from the middle of the steps that it stands for.

        Args:
            before: The earlier reading of the clock.
            now: The later reading.
        """
        if now == before:
            return 1.0
        if before < 1:  # the first update, after one step, takes everything
            return 0.0
        earlier, later = self._number(before), self._number(now)
        log = self._log(earlier, later)
        exponent = self.gamma + 1
        if self.corrected:
            log, exponent = log + self._log(earlier + 1, later + 1), exponent * self.every / 2
        return math.exp(exponent * log)

    def __str__(self) -> str:
        corrected = ", corrected" if self.corrected else ""
        return f"power function with gamma {self.gamma:.4g}, every {self.every} steps{corrected}"

    def _number(self, step: float) -> float:
        """Return the number of the last update before a step, with a fraction."""
        return max(0.0, (step - 1 - (self.every - 1) / 2) / self.every)

    def _log(self, earlier: float, later: float) -> float:
        """Return the logarithm of the product of (i + 1 / every) / (i + 2 / every) over the updates between."""
        a, b = 1 + 1 / self.every, 1 + 2 / self.every
        start, end = (math.lgamma(number + a) - math.lgamma(number + b) for number in (earlier, later))
        return min(0.0, end - start)


def accepts(path: Path, content: Mapping[Any, Any]) -> bool:
    """Return whether a checkpoint was saved by ``PostHocEMA``.

    Args:
        path: The path of the checkpoint.
        content: What is in it.
    """
    named = any(isinstance(name, str) and name.startswith(_PREFIX) for name in content)
    return _NAME.fullmatch(path.name) is not None and named


def read(paths: Sequence[Path], options: Options) -> Series:
    """Return the averages in a folder.

    Args:
        paths: The paths of the files.
        options: What the user says.

    Raises:
        CheckpointError: If the user does not say the profiles, or a file cannot be read or is missing.
    """
    numbered = {path: (int(match[1]), int(match[2])) for path in paths if (match := _NAME.fullmatch(path.name))}
    count = 1 + max(number for number, _ in numbered.values())
    if options.stored is None or options.update_every is None:
        raise CheckpointError(
            f"the profile of a snapshot must be known ({shown(paths[0])} does not say it): give the {count} sigma_rels "
            "or gammas of PostHocEMA in order, and its update_every, as stored=[PowerFunction(0.05), "
            "PowerFunction(0.28)], update_every=10, or --stored power=0.05,power=0.28 --update-every 10"
        )
    profiles = [_strided(one, options) for one in options.stored]
    if len(profiles) != count:
        raise CheckpointError(
            f"each average must have a profile ({shown(paths[0].parent)} has {count}, and {len(profiles)} are given); "
            "give them in the order of PostHocEMA"
        )
    present = set(numbered.values())
    steps = sorted({step for _, step in present})
    if missing := [f"{number}.{step}.pt" for step in steps for number in range(count) if (number, step) not in present]:
        raise CheckpointError(
            f"all averages of a step must be there ({shown(paths[0].parent / missing[0])} is missing); restore it, or "
            "leave out the others of its step by a pattern"
        )
    found = [
        Average(
            open_checkpoint(path, options.key, _PREFIX),
            path.name,
            step,
            {TimeUnit.BATCH: float(step)},
            profiles[number],
            last=_last(step, profiles[number].every),
        )
        for path, (number, step) in numbered.items()
    ]
    return Series(KIND, found)


def _strided(profile: Profile, options: Options) -> Strided:
    if not isinstance(profile, PowerFunction):
        raise CheckpointError(
            f"averages of PostHocEMA must be power functions (got {profile!r}); give their sigma_rels"
        )
    return Strided(profile.exponent, options.update_every or 1, options.corrected)


def _last(step: int, every: int) -> float:
    """Return the step from which the last update counts: the middle of the steps that it stands for, or the end."""
    return min(float(step), (step - 1) // every * every + 1 + (every - 1) / 2)

"""``CheckpointSweep``: what ``sweep_checkpoints`` returns."""

import math
from dataclasses import dataclass
from pathlib import Path

from polyak.checkpoints import Plan
from polyak.checkpoints.newest import Newest
from polyak.checkpoints.output import check_output, write_average
from polyak.storage.atomic import require_new
from polyak.sweeping.results import EvaluationError, Result, value_of
from polyak.time import Time


@dataclass(frozen=True, slots=True)
class Tried:
    """A mean of checkpoints, and its metrics.

    Args:
        which: How many of the newest checkpoints, and at which distance.
        plan: The checkpoints; averages them.
        result: The metrics.
    """

    which: Newest
    plan: Plan
    result: Result

    @property
    def since(self) -> str:
        """When the oldest of the checkpoints was saved, or its name."""
        oldest = self.plan.checkpoints[0]
        return next((str(Time(value, unit)) for unit, value in oldest.moment.items()), oldest.path.name)


@dataclass(frozen=True, slots=True)
class CheckpointSweep:
    """What `sweep_checkpoints` returns.

    Args:
        tried: All means, in the order of evaluation.
        metric: The metric that decides.
        maximize: Whether a higher value is better.
    """

    tried: tuple[Tried, ...]
    metric: str
    maximize: bool

    @property
    def best(self) -> Tried:
        """The mean with the best value; among equal ones, that of the fewest checkpoints.

        Raises:
            EvaluationError: If the metric is NaN for all.
        """
        known = [one for one in self.tried if not math.isnan(self.value(one))]
        if not known:
            raise EvaluationError(
                f"the metric must be a number for at least one mean (got NaN for all {len(self.tried)}); check the "
                "evaluation"
            )
        sign = -1 if self.maximize else 1
        return min(known, key=lambda one: (sign * self.value(one), one.which.count))

    def value(self, one: Tried) -> float:
        """Return the metric that decides.

        Args:
            one: One of the means.
        """
        return value_of(one.result, self.metric)

    def rows(self) -> list[tuple[str, str, str]]:
        """Return the lines of a table: the checkpoints, when the oldest was saved, and the value."""
        best = self.best
        return [
            (one.which.describe() + (" (best)" if one is best else ""), one.since, f"{self.value(one):.6g}")
            for one in self.tried
        ]

    def __str__(self) -> str:
        rows = [("checkpoints", "since", self.metric), *self.rows()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join(line.rstrip() for line in lines)

    def write(self, output: str | Path, *, overwrite: bool = False) -> None:
        """Write the best mean.

        Args:
            output: As for `polyak.checkpoints.average_checkpoints`.
            overwrite: Whether a file at ``output`` is replaced.

        Raises:
            ExistsError: If there is something at ``output`` already.
            CheckpointError: If a checkpoint cannot be read.
        """
        plan, path = self.best.plan, Path(output)
        check_output(path, plan)
        require_new(path, overwrite=overwrite)
        write_average(plan, path)

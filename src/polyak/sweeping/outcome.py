"""``SweepResult``: what ``sweep`` returns."""

import math
from collections.abc import Iterable
from pathlib import Path

from polyak.errors import ExistsError
from polyak.record import Record
from polyak.record.moments import ends
from polyak.sweeping.examples import is_worse
from polyak.sweeping.held import up_to
from polyak.sweeping.results import Result, best, value_of
from polyak.time import Time


class SweepResult(list[Result]):
    """The results of a sweep in the order of evaluation, which is a list, and what they say together.

    Args:
        results: The results.
        record: The record.
        metric: The metric that decides.
        maximize: Whether a higher value is better.
        batchnorm: Whether the statistics of BatchNorm layers were recomputed.

    Attributes:
        record: As given.
        metric: As given.
        maximize: As given.
        batchnorm: As given.
    """

    def __init__(
        self, results: Iterable[Result], record: Record, metric: str, *, maximize: bool, batchnorm: bool = False
    ) -> None:
        super().__init__(results)
        self.record = record
        self.metric = metric
        self.maximize = maximize
        self.batchnorm = batchnorm

    @property
    def best(self) -> Result:
        """The best average of the record, at whichever of the end moments.

        Raises:
            EvaluationError: If the metric is NaN for every average.
        """
        return best(self, self.metric, maximize=self.maximize)

    @property
    def has_best(self) -> bool:
        """Whether the metric is a number for at least one average."""
        return any(one.profile is not None and not math.isnan(value_of(one, self.metric)) for one in self)

    @property
    def moments(self) -> list[Time | None]:
        """The end moments, oldest first; None alone for the end of the record."""
        return list(dict.fromkeys(one.at for one in self if one.profile is not None))

    def at(self, moment: Time | None) -> "SweepResult":
        """Return the results of one end moment, with those of other weights.

        Args:
            moment: One of ``moments``.
        """
        found = [one for one in self if one.profile is None or one.at == moment]
        return SweepResult(found, self.record, self.metric, maximize=self.maximize, batchnorm=self.batchnorm)

    def record_at(self, moment: Time | None) -> Record:
        """Return the record as it was at one end moment.

        Args:
            moment: One of ``moments``.
        """
        return self.record if moment is None else up_to(self.record, ends(self.record, moment)[0])

    @property
    def as_good(self) -> list[Result]:
        """The half-lives around the best one that are as good as it, shortest first.

        None of them is worse by the paired difference over the examples, at 95 %. Only the best is in the list if the
        evaluation returns no values of single examples; the list is empty if the best profile is not a half-life.
        """
        chosen = self.best
        if chosen.half_life is None:
            return []
        line = [one for one in self.at(chosen.at) if one.half_life is not None and one.half_life.unit is _unit(chosen)]
        line.sort(key=lambda one: float(one.half_life or 0))
        at = low = high = next(i for i, one in enumerate(line) if one is chosen)
        while low > 0 and self._equals(line[low - 1], line[at]):
            low -= 1
        while high + 1 < len(line) and self._equals(line[high + 1], line[at]):
            high += 1
        return line[low : high + 1]

    def _equals(self, one: Result, chosen: Result) -> bool:
        values, of_best = (result.examples.get(self.metric, ()) for result in (one, chosen))
        return len(values) == len(of_best) > 1 and not is_worse(values, of_best, maximize=self.maximize)

    def table(self, width: int = 80) -> str:
        """Return a table of all results as text.

        Args:
            width: The width in characters.
        """
        from polyak.report.text import sweep_table  # noqa: PLC0415  the report is built on sweeps

        return sweep_table(self, width)

    def report(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the report as a page of HTML, and its figures; return the path of the page.

        It needs ``pip install 'polyak[report]'``.

        Args:
            folder: Where to write; it is made if it does not exist.
            overwrite: Whether to replace an earlier report.

        Raises:
            MissingExtraError: If plotly or matplotlib is missing.
            ExistsError: If there is a report and ``overwrite`` is not set.
        """
        from polyak.report.written import PAGE, require_pictures, write_report  # noqa: PLC0415

        require_pictures()
        page = Path(folder) / PAGE
        if page.exists() and not overwrite:
            raise ExistsError(
                f"a report must not replace another one ({page} exists); pass overwrite=True to replace it"
            )
        write_report(self, page.parent)
        return page

    def __repr__(self) -> str:
        chosen = self.best if self.has_best else None
        outcome = "none with a number" if chosen is None else f"best {chosen.name}"
        value = "" if chosen is None else f" with {self.metric} {chosen.metrics[self.metric]:.4g}"
        return f"<SweepResult of {self.record.folder.name}: {len(self)} results, {outcome}{value}>"


def _unit(result: Result) -> object:
    return None if result.half_life is None else result.half_life.unit

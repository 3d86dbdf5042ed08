"""The results of a sweep, the best of them, and the JSON Lines file that keeps them."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from polyak.errors import PolyakError
from polyak.printable import printable
from polyak.profiles import Profile, named
from polyak.storage.lines import Lines
from polyak.sweeping.examples import interval
from polyak.time import Time

# How far metrics of one average on several ranks may differ, relative to them.
_SAME = 1e-3


class EvaluationError(PolyakError, RuntimeError):
    """An evaluation failed, or returned a wrong type. Earlier results are kept."""


@dataclass(frozen=True, slots=True)
class Result:
    """The metrics of one set of weights.

    Args:
        name: A name for people.
        profile: The profile of the average; None for weights that do not come from the record.
        metrics: The metrics by name.
        error: Estimated error of the average, relative to |last weights - average|; None if unknown.
        distance: |average - newest mean of the record| / |newest mean|; None if unknown.
        seconds: The duration of the evaluation.
        at: The end moment of the average; None for the end of the record.
        examples: The values of single examples by metric, where the evaluation returns them.
    """

    name: str
    profile: Profile | None
    metrics: Mapping[str, float]
    error: float | None = None
    distance: float | None = None
    seconds: float = 0.0
    at: Time | None = None
    # Not in the repr: thousands of numbers.
    examples: Mapping[str, tuple[float, ...]] = field(default_factory=dict[str, tuple[float, ...]], repr=False)

    def interval(self, metric: str | None = None) -> tuple[float, float] | None:
        """Return the 95 % interval of a metric; None if the evaluation does not return it for single examples.

        Args:
            metric: The name of the metric; None for the first.
        """
        return interval(self.examples.get(next(iter(self.metrics)) if metric is None else metric, ()))

    @property
    def half_life(self) -> Time | None:
        """The half-life of the average, or None for other profiles and other weights."""
        return None if self.profile is None else named(self.profile).half_life


def value_of(result: Result, metric: str | None = None) -> float:
    """Return one metric of a result.

    Args:
        result: A result of a sweep.
        metric: The name of the metric; None for the first.

    Raises:
        EvaluationError: If the result has no metric of that name.
    """
    name = next(iter(result.metrics)) if metric is None else metric
    if name not in result.metrics:
        raise EvaluationError(
            f"the metric must be one that the evaluation returns (got {name}); use {_either(result.metrics)}"
        )
    return result.metrics[name]


def best(results: Sequence[Result], metric: str | None = None, *, maximize: bool = False) -> Result:
    """Return the best average of the record.

    Args:
        results: The results of a sweep.
        metric: The metric to compare; None for the first.
        maximize: Whether a higher value is better.

    Raises:
        EvaluationError: If the metric is NaN for every average.
    """
    found = [one for one in results if one.profile is not None and not math.isnan(value_of(one, metric))]
    if not found:
        raise EvaluationError("the metric must be a number for at least one average (got none); check the evaluation")
    return (max if maximize else min)(found, key=lambda one: value_of(one, metric))


def _shown(line: bytes) -> str:
    return printable(line[:60].decode(errors="replace").rstrip())


def _either(names: Iterable[str]) -> str:
    return " or ".join(", ".join(names).rsplit(", ", 1))


@dataclass(slots=True)
class Kept:
    """A file of results, open inside a ``with`` block: one JSON object per line, written after each evaluation.

    Args:
        path: The file; None keeps the results in memory only.

    Attributes:
        lines: The results as the file has them.

    Raises:
        EvaluationError: If the file is not such a file, or another sweep is writing it.
    """

    path: Path | None
    lines: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]], init=False)
    _file: Lines | None = field(default=None, init=False)

    def __enter__(self) -> Self:
        if (path := self.path) is not None:
            self._file = Lines(path, lambda owner: EvaluationError(_busy(path, owner)))
            try:
                self._read(path, self._file.found)
            except BaseException:
                self.__exit__()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def _read(self, path: Path, lines: Iterable[bytes]) -> None:
        for number, line in enumerate(lines, start=1):
            try:
                plain = json.loads(line)
                _from_plain(plain, None)
                self.lines.append({"key": plain["key"], **plain})
            except (ValueError, KeyError, TypeError, AttributeError):
                raise EvaluationError(
                    f"line {number} of {path} must be a result of a sweep (got {_shown(line)}); remove the line"
                ) from None

    def find(self, key: Mapping[str, Any], profile: Profile | None) -> tuple[Result, str | None] | None:
        """Return the latest result with this key and the hash of the source that measured it; None if there is none.

        Args:
            key: Identifies the result.
            profile: The profile of the result.
        """
        for line in reversed(self.lines):
            if line["key"] == key:
                return _from_plain(line, profile), line.get("code")
        return None

    def add(self, key: Mapping[str, Any], result: Result, code: str | None, record: Path) -> None:
        """Append a result to the file.

        Args:
            key: Identifies the result.
            result: The result.
            code: The hash of the source that measured it.
            record: The folder of the record.
        """
        line: dict[str, Any] = {
            "name": result.name,
            "metrics": {name: _plain(value) for name, value in result.metrics.items()},
            "error": _plain(result.error),
            "distance": _plain(result.distance),
            "seconds": round(result.seconds, 3),
            "key": dict(key),
            "code": code,
            "record": str(record.resolve()),
        }
        if result.at is not None:
            line["at"] = str(result.at)
        if result.examples:
            line["examples"] = {name: [float(f"{v:.7g}") for v in values] for name, values in result.examples.items()}
        self.lines.append(line)
        if self._file is not None:
            self._file.add(line)


def require_equal(results: Sequence[Result]) -> None:
    """Check that all ranks got the same values for the same weights, up to the rounding of their devices.

    Args:
        results: The results of each rank.

    Raises:
        EvaluationError: If they did not.
    """
    first = results[0].metrics
    for rank, other in enumerate(results):
        for metric, value in first.items():
            found = other.metrics.get(metric, math.nan)
            if math.isnan(value) != math.isnan(found) or abs(value - found) > _SAME * abs(value):
                raise EvaluationError(
                    f"all ranks that evaluate an average together must get the same {metric} (got {value:.6g} on rank "
                    f"0 and {found:.6g} on rank {rank} for {other.name}); reduce it over the ranks in the function"
                )


def records_in(path: Path, known: Iterable[str]) -> list[str]:
    """Return the folders of the records that a file has results of.

    Args:
        path: The file. One that does not exist has no results.
        known: The files of a record, whose results are left out wherever its folder was.

    Raises:
        OSError: If the file cannot be read.
    """
    found, files = dict[str, None](), set(known)
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            plain = json.loads(line)
            folder, of = plain["record"], plain["key"]["of"]
        except (ValueError, KeyError, TypeError):
            continue  # of an earlier version, or what ``Kept`` will refuse
        if of not in files:
            found[str(folder)] = None
    return list(found)


def _busy(path: Path, owner: str) -> str:
    return (
        f"another sweep is writing {path}, which must have one writer at a time ({owner}); wait until it has ended, or "
        "choose another folder"
    )


def _plain(value: float | None) -> float | None:
    """Return the value in a form that JSON can hold: infinity and NaN become null."""
    return value if value is not None and math.isfinite(value) else None


def _from_plain(plain: Mapping[str, Any], profile: Profile | None) -> Result:
    return Result(
        plain["name"],
        profile,
        {name: math.nan if value is None else float(value) for name, value in plain["metrics"].items()},
        plain["error"],
        plain["distance"],
        float(plain["seconds"]),
        examples={name: tuple(map(float, values)) for name, values in plain.get("examples", {}).items()},
    )

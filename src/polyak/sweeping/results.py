"""What a sweep has measured: results, the best of them, and their file of JSON lines."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self

from polyak.errors import PolyakError
from polyak.profiles import Profile
from polyak.storage.atomic import flush
from polyak.storage.lock import Lock


class EvaluationError(PolyakError, RuntimeError):
    """An evaluation that failed, or did not return what it must. What was measured before is kept."""


@dataclass(frozen=True, slots=True)
class Result:
    """The metrics of one set of weights.

    Args:
        name: What it is, for people.
        profile: Of the average; None for weights that do not come from the record.
        metrics: By name.
        error: Estimate of how far off the average is, in units of |last weights - average|; None where not known.
        distance: |average - newest mean of the record| / |newest mean|; None where not known.
        seconds: How long the evaluation took.
    """

    name: str
    profile: Profile | None
    metrics: Mapping[str, float]
    error: float | None = None
    distance: float | None = None
    seconds: float = 0.0


def value_of(result: Result, metric: str | None = None) -> float:
    """Return a metric.

    Args:
        result: Of a sweep.
        metric: Its name; None for the first.

    Raises:
        EvaluationError: If there is none of that name.
    """
    name = next(iter(result.metrics)) if metric is None else metric
    if name not in result.metrics:
        raise EvaluationError(f"the metric must be one that was returned (got {name!r}): {', '.join(result.metrics)}")
    return result.metrics[name]


def best(results: Sequence[Result], metric: str | None = None, *, maximize: bool = False) -> Result:
    """Return the best average of the record.

    Args:
        results: Of a sweep.
        metric: Which counts; None for the first.
        maximize: Whether more is better.

    Raises:
        EvaluationError: If no average has a number for it.
    """
    found = [one for one in results if one.profile is not None and not math.isnan(value_of(one, metric))]
    if not found:
        raise EvaluationError("at least one average must have a metric that is a number (got none)")
    return (max if maximize else min)(found, key=lambda one: value_of(one, metric))


@dataclass(slots=True)
class Kept:
    """Results on disk, for a ``with`` block: one JSON object in each line, added as soon as it is known.

    Args:
        path: The file; None keeps nothing.

    Raises:
        EvaluationError: If it is no such file, or another sweep is writing it.
    """

    path: Path | None
    _lines: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]], init=False)
    _file: BinaryIO | None = field(default=None, init=False)
    _lock: Lock | None = field(default=None, init=False)

    def __enter__(self) -> Self:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b")
            try:
                self._open(self.path, self._file)
            except BaseException:
                self.__exit__()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        if self._lock is not None:
            self._lock.release()

    def _open(self, path: Path, file: BinaryIO) -> None:
        self._lock = Lock(path, lambda owner: EvaluationError(_busy(path, owner)))
        file.seek(0)
        content = file.read()
        complete = content[: content.rfind(b"\n") + 1]
        file.truncate(len(complete))  # what a killed sweep was writing
        for number, line in enumerate(complete.splitlines(), start=1):
            try:
                plain = json.loads(line)
                _from_plain(plain, None)
                self._lines.append({"key": plain["key"], **plain})
            except (ValueError, KeyError, TypeError, AttributeError):
                raise EvaluationError(f"line {number} of {path} must be a result of a sweep; remove it") from None

    def find(self, key: Mapping[str, Any], profile: Profile | None) -> tuple[Result, str | None] | None:
        """Return a result and the hash of the code that measured it, if it is there.

        Args:
            key: What identifies it.
            profile: Of the result.
        """
        for line in reversed(self._lines):
            if line["key"] == key:
                return _from_plain(line, profile), line.get("code")
        return None

    def add(self, key: Mapping[str, Any], result: Result, code: str | None) -> None:
        """Keep a result.

        Args:
            key: What identifies it.
            result: What was measured.
            code: The hash of the code that measured it.
        """
        line = {
            "name": result.name,
            "metrics": {name: _plain(value) for name, value in result.metrics.items()},
            "error": _plain(result.error),
            "distance": _plain(result.distance),
            "seconds": round(result.seconds, 3),
            "key": dict(key),
            "code": code,
        }
        self._lines.append(line)
        if self._file is not None:
            self._file.write(json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n")
            flush(self._file)


def _busy(path: Path, owner: str) -> str:
    return (
        f"another sweep is writing {path}, which must have one writer at a time ({owner}); wait until it has ended, or "
        "choose another folder"
    )


def _plain(value: float | None) -> float | None:
    """Return what JSON can hold: infinity and NaN become null."""
    return value if value is not None and math.isfinite(value) else None


def _from_plain(plain: Mapping[str, Any], profile: Profile | None) -> Result:
    metrics = {name: math.nan if value is None else float(value) for name, value in plain["metrics"].items()}
    return Result(plain["name"], profile, metrics, plain["error"], plain["distance"], float(plain["seconds"]))

"""Metrics of checkpoints: from the checkpoints themselves, from their names, or from a log."""

import json
import re
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

from polyak.checkpoints.moments import at, counters_in, is_counter, number
from polyak.compat.files import opened
from polyak.compat.pickles import StandIn
from polyak.compat.words import listed, shown
from polyak.errors import ArgumentError, CheckpointError
from polyak.time import TimeUnit

_IN_NAME = re.compile(r"([A-Za-z][\w/.]*)=(-?(?:\d+(?:\.\d+)?(?:e[-+]?\d+)?|inf(?![a-z])|nan(?![a-z])))")
_SUFFIXES = (".ckpt", ".nemo", ".pt", ".pth", ".bin", ".safetensors")
# Where Ultralytics and fairseq keep metrics; many scripts keep them next to the model.
_PLACES = ((), ("extra_state",), ("metrics",), ("train_metrics",))
_UNITS = (TimeUnit.BATCH, TimeUnit.EPOCH)
_MOST_LINE_BYTES = 1 << 20


def metrics_of(path: Path, content: Mapping[Any, Any], clock: Mapping[str, Any]) -> dict[str, float]:
    """Return what was measured when a checkpoint was saved.

    What a callback or a trainer's log says counts more than what is in the name, which is rounded.

    Args:
        path: The path of the checkpoint.
        content: What is in it.
        clock: What files next to the weights say, as Transformers' ``trainer_state.json``.
    """
    found = {name: float(value) for name, value in _IN_NAME.findall(_stem(path)) if not is_counter(name)}
    for place in _PLACES:
        found |= _numbers(at(content, place))
    return found | dict(_of_lightning(path, content)) | _of_transformers(clock)


def _stem(path: Path) -> str:
    return path.name.removesuffix(path.suffix) if path.suffix in _SUFFIXES else path.name


def _numbers(value: object) -> dict[str, float]:
    pairs = value.items() if isinstance(value, Mapping) else ()
    named = {name: one for name, one in pairs if isinstance(name, str) and isinstance(one, (int, float, StandIn))}
    return {
        name: one
        for name, raw in named.items()
        if not is_counter(name) and (one := number(raw, finite=False)) is not None
    }


def _of_lightning(path: Path, content: Mapping[Any, Any]) -> Iterator[tuple[str, float]]:
    """Yield the metrics that the state of a ``ModelCheckpoint`` has for the file that it wrote."""
    callbacks = content.get("callbacks")
    for state in callbacks.values() if isinstance(callbacks, Mapping) else ():
        saved, monitor = at(state, ("best_k_models",)), at(state, ("monitor",))
        for name, score in saved.items() if isinstance(saved, Mapping) else ():
            value = number(score, finite=False)
            if isinstance(monitor, str) and PureWindowsPath(str(name)).name == path.name and value is not None:
                yield monitor, value


def _of_transformers(clock: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics that a ``trainer_state.json`` has for the step of its checkpoint."""
    history, step = clock.get("log_history"), clock.get("global_step")
    lines = [one for one in history if at(one, ("step",)) == step] if isinstance(history, list) else []
    return dict(ChainMap(*map(_numbers, reversed(lines))))


class Log:
    """A log with a JSON object on each line: a counter, such as ``step`` or ``epoch``, and metrics.

    Args:
        path: The path of the file.

    Raises:
        CheckpointError: If it is not such a file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found = dict[tuple[TimeUnit, float], dict[str, float]]()
        for at_line, line in enumerate(bytes(opened(path)).splitlines(), 1):
            if not line.strip():
                continue
            entry = _entry(path, at_line, line)
            for unit, moment in counters_in(entry):
                self._found.setdefault((unit, moment), {}).update(_numbers(entry))

    def metrics_at(self, moment: Mapping[TimeUnit, float]) -> dict[str, float]:
        """Return the metrics at the time of a checkpoint, the last of each name; what a step has counts most.

        Args:
            moment: When the checkpoint was saved.
        """
        found = [self._found.get((unit, moment[unit]), {}) for unit in _UNITS if unit in moment]
        return dict(ChainMap(*found)) if found else {}


def _entry(path: Path, at_line: int, line: bytes) -> Mapping[str, Any]:
    try:
        entry = json.loads(line) if len(line) <= _MOST_LINE_BYTES else None
    except (ValueError, RecursionError):
        entry = None
    if not isinstance(entry, dict):
        raise CheckpointError(
            f"a log must have a JSON object on each line ({shown(path)} has something else on line {at_line}); "
            "convert it"
        )
    return {name: _as_number(value) for name, value in entry.items()}


def _as_number(value: object) -> object:
    """Return a number that may be text, as fairseq writes it, as a number."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def values_of(
    metric: str,
    paths: Sequence[Path],
    moments: Sequence[Mapping[TimeUnit, float]],
    metrics: Sequence[Mapping[str, float]],
    log: Path | None,
) -> list[float]:
    """Return a metric of each checkpoint.

    Args:
        metric: Its name.
        paths: The paths of the checkpoints.
        moments: When each was saved.
        metrics: What each says of itself.
        log: A log that says it instead.

    Raises:
        ArgumentError: If a checkpoint has no such metric.
        CheckpointError: If the log cannot be read.
    """
    if log is not None:
        read = Log(log)
        metrics = [read.metrics_at(moment) for moment in moments]
    for path, moment, known in zip(paths, moments, metrics, strict=True):
        if metric not in known:
            where = f"{shown(path)} has {listed(known) or 'no metric'}"
            if log is not None:
                when = ", ".join(f"{unit} {value:g}" for unit, value in moment.items()) or "an unknown time"
                where = f"{shown(log)} has {listed(known) or 'nothing'} at {when}, that of {shown(path)}"
            raise ArgumentError(
                f"each checkpoint must have the metric {shown(metric)} ({where}); name another by --metric, or give a "
                "log by --log"
            )
    return [known[metric] for known in metrics]

"""The weights that a sweep evaluates: averages of a record, its raw weights, and weights from files."""

import hashlib
import json
import math
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from polyak.averaging.batchnorm import update_bn
from polyak.errors import RecordError
from polyak.profiles import Profile
from polyak.record import Record
from polyak.record.stored import all_stored
from polyak.sweeping.averages import Averages
from polyak.sweeping.results import EvaluationError
from polyak.time import Time

Batchnorm = tuple[nn.Module, Iterable[Any]]

# Weights, the error of an average, and its distance from the newest mean.
Weights = tuple[dict[str, Tensor], float | None, float | None]


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """Weights to evaluate.

    Args:
        name: The name for people.
        weights: Returns them.
        source: What they are made of: the newest file of the record, or the hash of another file.
        record: The record, up to the moment.
        profile: The profile of an average; None for other weights.
        at: The moment of an average; None for the end of the whole record.
        averages: Those at the same moment, computed together; None for other weights.
    """

    name: str
    weights: Callable[[], Weights]
    source: str
    record: Record
    profile: Profile | None = None
    at: Time | None = None
    averages: Averages | None = None


def average(
    averages: Averages, name: str, profile: Profile, at: Time | None, batchnorm: Batchnorm | None = None
) -> Candidate:
    """Return an average at the end of a record.

    Args:
        averages: Those at this moment.
        name: The name for people.
        profile: The profile of the average.
        at: The moment; None for the end of the whole record.
        batchnorm: As for ``sweep``.
    """
    record = averages.record

    def weights() -> Weights:
        state, error = averages.take(profile)
        distance = None if all_stored(record.segments) else _distance(record, state)  # which have no newest mean
        if batchnorm is not None:
            try:
                state = recomputed(state, batchnorm)
            except Exception as problem:
                raise EvaluationError(failed(f"recomputing BatchNorm for {name}", problem)) from problem
        return state, error, distance

    return Candidate(name, weights, record.segments[-1].file, record, profile, at, averages)


def raw(record: Any) -> Candidate:
    """Return the raw weights at the end of a record.

    Args:
        record: A record that keeps them.
    """
    return Candidate("raw", lambda: (record.raw_weights(), None, None), record.raw.file, record)


def given(record: Record, name: str, path: Path) -> Candidate:
    """Return weights from a file.

    Args:
        record: The record that they are compared with.
        name: The name for people.
        path: The safetensors file.

    Raises:
        RecordError: If the file cannot be read.
    """

    def weights() -> Weights:
        with _reading(name, path):
            return load_file(path), None, None

    with _reading(name, path), path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Candidate(name, weights, digest, record)


@contextmanager
def _reading(name: str, path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RecordError(
            f"the {name} weights must be a safetensors file ({path}: {reason}); give another file"
        ) from error


def failed(doing: str, error: Exception) -> str:
    """Return what failed in a function of the user, and where, as a sentence.

    Args:
        doing: What it was called for.
        error: What it raised.
    """
    frame = traceback.extract_tb(error.__traceback__)[-1]
    last = traceback.format_exception_only(error)[-1].strip()
    return f"{doing} failed: {last} ({frame.filename}, line {frame.lineno}); earlier results are kept"


def as_text(key: Mapping[str, Any]) -> str:
    """Return the key of a result as a key of dicts.

    Args:
        key: As of a line of the results.
    """
    return json.dumps(key, sort_keys=True)


def recomputed(state: Mapping[str, Tensor], batchnorm: Batchnorm) -> dict[str, Tensor]:
    """Return a state with the statistics of BatchNorm layers recomputed for its weights.

    Args:
        state: The state.
        batchnorm: As for ``sweep``.
    """
    model, loader = batchnorm
    model.load_state_dict(state)
    parameter = next(model.parameters(), None)
    update_bn(model, loader, None if parameter is None else parameter.device)
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def _distance(record: Record, average: Mapping[str, Tensor]) -> float:
    """Return |average - newest mean| / |newest mean|."""
    difference = size = 0.0
    with record.open(record.stretches[-1]) as file:
        for name, info in record.tensors.items():
            if info.averaged:
                mean = file.read(name).to(average[name].dtype)
                difference += float(torch.linalg.vector_norm(average[name] - mean)) ** 2
                size += float(torch.linalg.vector_norm(mean)) ** 2
    return math.sqrt(difference / size) if size else math.nan

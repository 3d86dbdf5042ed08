"""Checks the trainer's arguments before anything changes. Each wrong argument gives one error that names it."""

import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from polyak.errors import ArgumentError
from polyak.tensors.slots import unwrap
from polyak.time import Time, TimeUnit, as_span
from polyak.trainer.forward import PRECISIONS
from polyak.trainer.intervals import countable
from polyak.trainer.parallel import KINDS


def _one_of(*words: str) -> Callable[[Any], bool]:
    return lambda given: isinstance(given, str) and given in words


def _whole(least: int, below: float = math.inf) -> Callable[[Any], bool]:
    return lambda given: isinstance(given, int) and not isinstance(given, bool) and least <= given < below


def _or_none(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda given: given is None or holds(given)


def _is_text(given: Any) -> bool:
    return isinstance(given, str) and given != ""


def _is_path(given: Any) -> bool:
    return isinstance(given, (str, os.PathLike)) and str(given) != ""


def _is_switch(given: Any) -> bool:
    return isinstance(given, bool)


def _is_function(given: Any) -> bool:
    return callable(given) and not isinstance(given, type)


def _are_names(given: Any) -> bool:
    return isinstance(given, Sequence) and not isinstance(given, str) and all(isinstance(key, str) for key in given)


# For each argument that can be checked alone: the condition, and the condition in words.
PLAIN: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "precision": (_one_of(*PRECISIONS), f"one of {', '.join(PRECISIONS)}"),
    "parallelism": (_or_none(_one_of(*KINDS)), f"None or one of {', '.join(KINDS)}"),
    "grad_accum": (_whole(1), "a whole number of at least 1"),
    "seed": (_or_none(_whole(0, 2**32)), "a whole number of at least 0 and below 2 ** 32"),
    "run_name": (_or_none(_is_text), "a string"),
    "step_schedulers_every_batch": (_is_switch, "True or False"),
    "deterministic_mode": (_is_switch, "True or False"),
    "load_weights_only": (_is_switch, "True or False"),
    "autoresume": (_is_switch, "True or False"),
    "progress_bar": (_or_none(_is_switch), "True or False"),
    "num_samples": (_is_function, "a function of a batch"),
    "num_tokens": (_or_none(_is_function), "a function of a batch"),
    "load_path": (_or_none(_is_path), "a path, and not empty"),
    "load_ignore_keys": (_are_names, "a list of strings"),
    "save_folder": (_or_none(_is_path), "a path, and not empty"),
    "save_num_checkpoints_to_keep": (
        _or_none(lambda given: _whole(1)(given) or _whole(-1, 0)(given)),
        "-1 for all, or at least 1",
    ),
}


def described(given: object) -> str:
    """Describe a value in a few words, for an error.

    Args:
        given: Anything.
    """
    if isinstance(given, type):
        return f"the class {given.__name__}"
    if inspect.isgenerator(given):
        return "a generator"
    if inspect.isroutine(given):
        return f"the function {given.__name__}"
    kind = f"{'an' if type(given).__name__[0] in 'aeiouAEIOU' else 'a'} {type(given).__name__}"
    if given is None or isinstance(given, bool):
        return repr(given)
    return f"{given!r}, {kind}" if isinstance(given, (str, int, float, Path)) else kind


def require(holds: object, name: str, must: str, given: object, advice: str = "") -> None:
    """Raise an error about an argument unless a condition holds.

    Args:
        holds: The condition.
        name: The name of the argument.
        must: What the argument must be.
        given: What was given.
        advice: What to do instead.

    Raises:
        ArgumentError: If the condition does not hold.
    """
    if not holds:
        raise ArgumentError(f"{name} must be {must} (got {described(given)}){'; ' if advice else ''}{advice}")


def instance_of(given: object) -> str:
    """Return the advice for a class that was given instead of an instance; an empty string for anything else.

    Args:
        given: Anything.
    """
    return f"create an instance with parentheses: {given.__name__}(...)" if isinstance(given, type) else ""


def check_model(model: object, loss: object) -> None:
    """Check that the model is a module, and that there is one loss: an argument, or a method of the model.

    Args:
        model: As given.
        loss: As given.

    Raises:
        ArgumentError: If not.
    """
    advice = instance_of(model) or ("wrap it in one" if callable(model) else "build the model first")
    require(isinstance(model, nn.Module), "model", "a torch.nn.Module", model, advice)
    assert isinstance(model, nn.Module)
    own = getattr(unwrap(model), "loss", None)
    uses_own = loss is None and own is not None
    uses_given = loss is not None and (own is None or isinstance(own, nn.Module))  # may be a part of the model
    if not uses_own and not uses_given:
        raise ArgumentError(
            "the trainer must have one loss: give loss=, a function of (outputs, targets), or a model with a method "
            f"loss(outputs, batch), which needs none (got loss={described(loss)}; the loss of the "
            f"{type(model).__name__} is {described(own)})"
        )
    fits = loss is None or (callable(loss) and not isinstance(loss, type))
    require(fits, "loss", "a function of (outputs, targets)", loss, instance_of(loss))
    require(not uses_own or callable(own), "the model's loss", "a method loss(outputs, batch)", own)


def check_loader(name: str, given: Any) -> Any:
    """Return the iterable that batches are drawn from, epoch after epoch.

    Args:
        name: The name of the argument.
        given: As given.

    Raises:
        ArgumentError: If it has no batches, or yields them only once.
    """
    must = "an iterable of batches, such as a DataLoader"
    if isinstance(given, Dataset) and not isinstance(given, IterableDataset):
        require(False, name, must, given, "wrap the data set in torch.utils.data.DataLoader")
    if hasattr(given, "__next__"):
        require(False, name, must, given, "it gives its batches only once; use a list, or a class with __iter__")
    odd = isinstance(given, (str, bytes, Path, torch.Tensor, Mapping, nn.Module, type))
    fits = not odd and (hasattr(given, "__iter__") or hasattr(given, "__getitem__"))
    require(fits, name, must, given, instance_of(given))
    return given


def check_metrics(metrics: Any, name: str) -> dict[str, Any]:
    """Return metrics by name.

    Args:
        metrics: As given; None for none.
        name: The name of the argument.

    Raises:
        ArgumentError: If they are not a mapping of names to metrics.
    """
    if metrics is None:
        return {}
    must = "a mapping of names to metrics"
    require(hasattr(metrics, "items") and not isinstance(metrics, type), name, must, metrics)
    found = dict(metrics.items())
    for key, one in found.items():
        require(isinstance(key, str), name, "named by strings", key)
        fits = all(callable(getattr(one, method, None)) for method in ("update", "compute", "reset"))
        must = "an object with update(outputs, targets), compute() and reset()"
        require(fits and not isinstance(one, type), f"the metric {key!r}", must, one, instance_of(one))
    return found


def metrics_of(model: nn.Module, evaluation: Any, training: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the metrics of training and those of evaluation.

    Args:
        model: Its ``get_metrics(is_train)`` is used where none are given.
        evaluation: As given.
        training: As given.

    Raises:
        ArgumentError: If they are something else than mappings of names to metrics.
    """
    own = getattr(unwrap(model), "get_metrics", None)

    def chosen(name: str, given: Any, *, is_train: bool) -> dict[str, Any]:
        if given is None and callable(own):
            return check_metrics(own(is_train=is_train), f"get_metrics(is_train={is_train})")
        return check_metrics(given, name)

    return chosen("train_metrics", training, is_train=True), chosen("metrics", evaluation, is_train=False)


def counted_units(num_tokens: object) -> frozenset[TimeUnit]:
    """Return the units of time that a trainer counts.

    Args:
        num_tokens: As given; None if tokens are not counted.
    """
    units = {TimeUnit.EPOCH, TimeUnit.BATCH, TimeUnit.SAMPLE, TimeUnit.SECOND, TimeUnit.DURATION}
    return frozenset(units if num_tokens is None else units | {TimeUnit.TOKEN})


def duration_of(name: str, given: str | Time | float, counted: frozenset[TimeUnit]) -> Time:
    """Return how long to train; a number is one of epochs.

    Args:
        name: The name of the argument.
        given: As given.
        counted: The units that are counted.

    Raises:
        TimeError: If it is not a time, or one whose unit is not counted.
        ArgumentError: If it is infinite, or in ``dur``.
    """
    span = as_span(name, given, above=0, whole=True, unit=TimeUnit.EPOCH)
    duration = countable(name, span, tokens=TimeUnit.TOKEN in counted)
    if math.isinf(duration.value) or duration.unit is TimeUnit.DURATION:
        raise ArgumentError(f"{name} must be finite, and in another unit than dur (got {duration})")
    return duration


def check_device(given: Any) -> None:
    """Check that this machine has a device.

    Args:
        given: As given; None for the default.

    Raises:
        ArgumentError: If it does not, or the argument is not a device.
    """
    if given is None:
        return
    try:
        torch.empty(0, device=torch.device(given))
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        raise ArgumentError(
            f"device must be a device of this machine (got {described(given)}); leave it out for the default"
        ) from error

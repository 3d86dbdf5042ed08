"""What is given to the trainer, checked once, before anything is changed: each wrong argument is one error by name."""

import inspect
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import Dataset, IterableDataset

from polyak.algorithm import Algorithm
from polyak.errors import ArgumentError
from polyak.tensors.slots import unwrap
from polyak.time import Time, TimeUnit, as_span
from polyak.trainer.callback import Callback
from polyak.trainer.checkpoint import CheckpointSaver
from polyak.trainer.forward import PRECISIONS
from polyak.trainer.loggers import Destination
from polyak.trainer.parallel import KINDS
from polyak.trainer.state import Scheduler, countable

T = TypeVar("T")

_EVAL_WEIGHTS = ("averaged", "both")
_OPTIMIZER = "a torch.optim.Optimizer"
_SCHEDULER = "a scheduler of torch.optim.lr_scheduler"


def described(given: object) -> str:
    """Return a few words for something that was given in the place of something else.

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
    """Raise an error unless something holds.

    Args:
        holds: What.
        name: Of the argument.
        must: What the argument must be.
        given: What came.
        advice: What to do.

    Raises:
        ArgumentError: If it does not hold.
    """
    if not holds:
        raise ArgumentError(f"{name} must be {must} (got {described(given)}){'; ' if advice else ''}{advice}")


def instance_of(given: object) -> str:
    """Return the advice for a class that was given in the place of an instance; nothing for anything else.

    Args:
        given: Anything.
    """
    return f"create an instance with parentheses: {given.__name__}(...)" if isinstance(given, type) else ""


def listed(name: str, kind: str, given: T | Sequence[T] | None) -> list[T]:
    """Return one or several as a list.

    Args:
        name: Of the argument.
        kind: What one is, for errors.
        given: One, a sequence of several, or None.

    Raises:
        ArgumentError: If it is a string, a generator, a set or a mapping.
    """
    if given is None:
        return []
    several = not isinstance(given, (str, bytes)) and isinstance(given, Sequence)
    if not several:
        unordered = isinstance(given, (str, bytes, set, frozenset, dict)) or hasattr(given, "__next__")
        advice = "make a list of it with list(...)" if hasattr(given, "__next__") else ""
        require(not unordered, name, f"{kind} or a list of them", given, advice)
    return list(given) if several else [given]


@dataclass
class Workers:
    """What works on the model and what follows it.

    Args:
        algorithms: Checked.
        optimizers: Checked.
        schedulers: Checked.
        callbacks: Checked.
        loggers: Checked.
    """

    algorithms: list[Algorithm]
    optimizers: list[Optimizer]
    schedulers: list[Scheduler]
    callbacks: list[Callback]
    loggers: list[Destination]

    @classmethod
    def of(
        cls, model: nn.Module, *, algorithms: Any, optimizers: Any, schedulers: Any, callbacks: Any, loggers: Any
    ) -> "Workers":
        """Return them checked, each one or several.

        Args:
            model: As given.
            algorithms: As given.
            optimizers: As given.
            schedulers: As given.
            callbacks: As given.
            loggers: As given.

        Raises:
            ArgumentError: If one is not what it must be.
        """
        workers = cls(
            listed("algorithms", "a polyak.Algorithm", algorithms),
            listed("optimizers", _OPTIMIZER, optimizers),
            listed("schedulers", _SCHEDULER, schedulers),
            listed("callbacks", "a polyak.Callback", callbacks),
            listed("loggers", "a polyak.Destination", loggers),
        )
        check_algorithms(workers.algorithms)
        check_optimizers(workers.optimizers, model)
        check_schedulers(workers.schedulers, workers.optimizers)
        check_followers(workers.callbacks, workers.loggers)
        return workers


def check_model(model: object, loss: object) -> None:
    """Check that a model can be trained with a loss, or has its own.

    Args:
        model: As given.
        loss: As given.

    Raises:
        ArgumentError: If it cannot.
    """
    advice = instance_of(model) or ("wrap it in one" if callable(model) else "build the model first")
    require(isinstance(model, nn.Module), "model", "a torch.nn.Module", model, advice)
    assert isinstance(model, nn.Module)
    own = getattr(unwrap(model), "loss", None)
    uses_own = loss is None and own is not None
    uses_given = loss is not None and (own is None or isinstance(own, nn.Module))  # which may be only its parts
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
    """Return what batches are drawn from, epoch after epoch.

    Args:
        name: Of the argument.
        given: As given.

    Raises:
        ArgumentError: If it gives no batches, or only once.
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


def check_algorithms(algorithms: list[Any]) -> None:
    """Check that algorithms can work in this trainer, together.

    Args:
        algorithms: As given.

    Raises:
        ArgumentError: If they cannot.
    """
    for one in algorithms:
        composers = any(cls.__module__.partition(".")[0] == "composer" for cls in type(one).__mro__)
        advice = instance_of(one) or "derive its class from polyak.Algorithm"
        if composers:
            name = type(one).__name__
            advice = f"this {name} is for Composer's trainer: `from polyak import {name}` for this one"
        require(isinstance(one, Algorithm), "algorithms", "instances of polyak.Algorithm", one, advice)
    if sum(algorithm.lends for algorithm in algorithms) > 1:
        raise ArgumentError(
            "algorithms must swap in at most one average: a model can hold one at a time, so there can be one such "
            f"algorithm (got {[algorithm for algorithm in algorithms if algorithm.lends]}); train once for each, or "
            "use a Recorder and choose afterwards"
        )


def check_optimizers(optimizers: list[Any], model: nn.Module) -> None:
    """Check that optimizers move the weights of a model.

    Args:
        optimizers: As given.
        model: As given, before it is moved or sharded.

    Raises:
        ArgumentError: If one does not.
    """
    advice = "make one over model.parameters()"
    own = {id(parameter) for parameter in model.parameters()}
    for one in optimizers:
        whole = all(callable(getattr(one, name, None)) for name in ("step", "zero_grad", "state_dict"))
        fits = whole and hasattr(one, "param_groups") and not isinstance(one, type)
        require(fits, "optimizers", f"{_OPTIMIZER} or a list of them", one, advice)
        held = [parameter for group in one.param_groups for parameter in group["params"]]
        if own and held and not any(id(parameter) in own for parameter in held):
            raise ArgumentError(
                f"optimizers must be over the parameters of the model (got a {type(one).__name__} over "
                f"{len(held)} parameters of which the {type(model).__name__} has none); {advice} of this model"
            )
    require(len({id(one) for one in optimizers}) == len(optimizers), "optimizers", "different ones", optimizers)


def check_schedulers(schedulers: list[Any], optimizers: Sequence[Optimizer]) -> None:
    """Check that schedulers set the learning rates of the trainer's optimizers.

    Args:
        schedulers: As given.
        optimizers: As given.

    Raises:
        ArgumentError: If one does not.
    """
    for one in schedulers:
        fits = all(callable(getattr(one, name, None)) for name in ("step", "state_dict", "load_state_dict"))
        must = f"{_SCHEDULER} or a list of them"
        require(fits and not isinstance(one, (type, Optimizer)), "schedulers", must, one, instance_of(one))
        if isinstance(one, torch.optim.lr_scheduler.ReduceLROnPlateau):
            require(False, "schedulers", "ones that need no metric", one, "step it in a callback's eval_end instead")
        theirs = getattr(one, "optimizer", None)
        if theirs is not None and not any(theirs is optimizer for optimizer in optimizers):
            raise ArgumentError(
                f"schedulers must be over the trainer's optimizers (got a {type(one).__name__} over another "
                f"{type(theirs).__name__}); make it over the optimizer that optimizers= gets"
            )


def check_followers(callbacks: list[Any], loggers: list[Any]) -> None:
    """Check callbacks and loggers.

    Args:
        callbacks: As given.
        loggers: As given.

    Raises:
        ArgumentError: If one is not what it must be.
    """
    parts = (("callbacks", callbacks, Callback), ("loggers", loggers, Destination))
    for name, given, kind in parts:
        for one in given:
            advice = instance_of(one) or f"derive its class from polyak.{kind.__name__}"
            if isinstance(one, Algorithm):
                advice = "give it in algorithms="
            elif isinstance(one, Callback):
                advice = "give it in callbacks="
            require(isinstance(one, kind), name, f"instances of polyak.{kind.__name__}", one, advice)


def check_metrics(metrics: Any, name: str = "metrics") -> dict[str, Any]:
    """Return metrics by name.

    Args:
        metrics: As given; None for none.
        name: Of the argument.

    Raises:
        ArgumentError: If they are no mapping of names to metrics.
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
        model: Whose ``get_metrics(is_train)`` counts where none are given.
        evaluation: As given.
        training: As given.

    Raises:
        ArgumentError: If they are no mappings of names to metrics.
    """
    own = getattr(unwrap(model), "get_metrics", None)

    def chosen(name: str, given: Any, *, is_train: bool) -> dict[str, Any]:
        if given is None and callable(own):
            return check_metrics(own(is_train=is_train), f"get_metrics(is_train={is_train})")
        return check_metrics(given, name)

    return chosen("train_metrics", training, is_train=True), chosen("metrics", evaluation, is_train=False)


def counted_units(num_tokens: object) -> frozenset[TimeUnit]:
    """Return the units in which this trainer counts.

    Args:
        num_tokens: As given: without it, tokens are not counted.
    """
    units = {TimeUnit.EPOCH, TimeUnit.BATCH, TimeUnit.SAMPLE, TimeUnit.SECOND, TimeUnit.DURATION}
    return frozenset(units if num_tokens is None else units | {TimeUnit.TOKEN})


def duration_of(name: str, given: str | Time | float, counted: frozenset[TimeUnit]) -> Time:
    """Return how long to train; a number counts epochs.

    Args:
        name: Of the argument.
        given: As given.
        counted: The units that are counted.

    Raises:
        TimeError: If it is no time that can be counted up to.
        ArgumentError: If it has no end.
    """
    span = as_span(name, given, above=0, whole=True, unit=TimeUnit.EPOCH)
    duration = countable(name, span, tokens=TimeUnit.TOKEN in counted)
    if math.isinf(duration.value) or duration.unit is TimeUnit.DURATION:
        raise ArgumentError(f"{name} must be finite, and in another unit than dur (got {duration})")
    return duration


def savers_of(folder: Any, interval: Any, keep: Any) -> Callable[[str], list[Callback]]:
    """Return what makes the callback that saves checkpoints, if there is to be one, given the name of the run.

    Args:
        folder: As given; the name takes the place of ``{run_name}`` in it.
        interval: As given.
        keep: As given.

    Raises:
        ArgumentError: If an argument is not what it must be.
        TimeError: If the interval is no time.
    """
    check_path("save_folder", folder)
    if folder is None:
        for name, given in (("save_interval", interval), ("save_num_checkpoints_to_keep", keep)):
            require(given is None, name, "given together with save_folder", given, "give save_folder")
        return lambda run_name: []
    fits = keep is None or (_is_whole(keep) and (keep == -1 or keep >= 1))
    require(fits, "save_num_checkpoints_to_keep", "-1 for all, or at least 1", keep)

    def make(run_name: str) -> list[Callback]:
        where = str(folder).replace("{run_name}", run_name)
        return [CheckpointSaver(where, "1ep" if interval is None else interval, keep=None if keep == -1 else keep)]

    make("")
    return make


def check_device(given: Any) -> None:
    """Check that a device is there.

    Args:
        given: As given; None for the default.

    Raises:
        ArgumentError: If it is not, or is no device.
    """
    if given is None:
        return
    try:
        torch.empty(0, device=torch.device(given))
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        raise ArgumentError(
            f"device must be a device of this machine (got {described(given)}); leave it out for the default"
        ) from error


def check_path(name: str, given: Any) -> None:
    """Check that a path is one.

    Args:
        name: Of the argument.
        given: As given; None for none.

    Raises:
        ArgumentError: If it is not.
    """
    fits = given is None or (isinstance(given, (str, os.PathLike)) and str(given))
    require(fits, name, "a path, and not empty", given)


def check_ignored_keys(given: Any) -> None:
    """Check what is not to be loaded.

    Args:
        given: As given.

    Raises:
        ArgumentError: If it is no list of strings.
    """
    fits = isinstance(given, Sequence) and not isinstance(given, str) and all(isinstance(key, str) for key in given)
    require(fits, "load_ignore_keys", "a list of strings", given)


def check_options(
    *,
    precision: Any,
    eval_weights: Any,
    parallelism: Any,
    grad_accum: Any,
    seed: Any,
    run_name: Any,
    switches: Mapping[str, Any],
    functions: Mapping[str, Callable[[Any], int] | None],
) -> None:
    """Check what is one of a few words, a number, true or false, or a function.

    Args:
        precision: As given.
        eval_weights: As given.
        parallelism: As given.
        grad_accum: As given.
        seed: As given.
        run_name: As given.
        switches: Those that are true or false, by name.
        functions: Those of a batch, by name.

    Raises:
        ArgumentError: If one is not what it must be.
    """
    known = isinstance(precision, str) and precision in PRECISIONS
    require(known, "precision", f"one of {', '.join(PRECISIONS)}", precision)
    known = isinstance(eval_weights, str) and eval_weights in _EVAL_WEIGHTS
    require(known, "eval_weights", "'averaged' or 'both'", eval_weights)
    known = parallelism is None or (isinstance(parallelism, str) and parallelism in KINDS)
    require(known, "parallelism", f"None or one of {', '.join(KINDS)}", parallelism)
    require(_is_whole(grad_accum) and grad_accum >= 1, "grad_accum", "a whole number of at least 1", grad_accum)
    fits = seed is None or (_is_whole(seed) and 0 <= seed < 2**32)
    require(fits, "seed", "a whole number of at least 0 and below 2 ** 32", seed)
    require(run_name is None or (isinstance(run_name, str) and run_name), "run_name", "a string", run_name)
    for name, given in switches.items():
        require(isinstance(given, bool), name, "True or False", given)
    for name, function in functions.items():
        fits = function is None or (callable(function) and not isinstance(function, type))
        require(fits, name, "a function of a batch", function)


def check_batch_source(train_dataloader: Iterable[Any] | None) -> None:
    """Check the loader of training, if there is one.

    Args:
        train_dataloader: As given.

    Raises:
        ArgumentError: If it gives no batches, or only once.
    """
    if train_dataloader is not None:
        check_loader("train_dataloader", train_dataloader)


def _is_whole(given: Any) -> bool:
    return isinstance(given, int) and not isinstance(given, bool)

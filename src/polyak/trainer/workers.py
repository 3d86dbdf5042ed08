"""``Workers``: the algorithms, optimizers, schedulers, callbacks and loggers of a trainer, checked."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from polyak.algorithm import Algorithm, check_one_swaps
from polyak.errors import ArgumentError
from polyak.trainer.callback import Callback
from polyak.trainer.inputs import instance_of, require
from polyak.trainer.loggers import Destination
from polyak.trainer.state import Scheduler
from polyak.training.unregistered import warn_of_unregistered

T = TypeVar("T")

_OPTIMIZER = "a torch.optim.Optimizer"
_SCHEDULER = "a scheduler of torch.optim.lr_scheduler"


@dataclass
class Workers:
    """The objects that take part in training, in lists, checked.

    Args:
        algorithms: At most one of them swaps an average in.
        optimizers: Over parameters of the model.
        schedulers: Over these optimizers.
        callbacks: The callbacks, in order.
        loggers: The loggers, in order.
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
        """Return one or several of each, as given to the trainer, as checked lists.

        Args:
            model: The model to be trained.
            algorithms: One or several.
            optimizers: One or several.
            schedulers: One or several.
            callbacks: One or several.
            loggers: One or several.

        Raises:
            ArgumentError: If one of them is something else.
        """
        workers = cls(
            _listed("algorithms", "a polyak.Algorithm", algorithms),
            _listed("optimizers", _OPTIMIZER, optimizers),
            _listed("schedulers", _SCHEDULER, schedulers),
            _listed("callbacks", "a polyak.Callback", callbacks),
            _listed("loggers", "a polyak.Destination", loggers),
        )
        _check_algorithms(workers.algorithms)
        _check_optimizers(workers.optimizers, model)
        _check_schedulers(workers.schedulers, workers.optimizers)
        _check_followers(workers.callbacks, workers.loggers)
        return workers


def _listed(name: str, kind: str, given: T | Sequence[T] | None) -> list[T]:
    """Return one or several as a list; refuse a string, a generator, a set and a mapping."""
    if given is None:
        return []
    several = not isinstance(given, (str, bytes)) and isinstance(given, Sequence)
    if not several:
        unordered = isinstance(given, (str, bytes, set, frozenset, dict)) or hasattr(given, "__next__")
        advice = "make a list of it with list(...)" if hasattr(given, "__next__") else ""
        require(not unordered, name, f"{kind} or a list of them", given, advice)
    return list(given) if several else [given]


def _check_algorithms(algorithms: list[Any]) -> None:
    """Check that they are algorithms for this trainer, and that at most one swaps an average in."""
    for one in algorithms:
        composers = any(cls.__module__.partition(".")[0] == "composer" for cls in type(one).__mro__)
        advice = instance_of(one) or "derive its class from polyak.Algorithm"
        if composers:
            name = type(one).__name__
            advice = f"this {name} is for Composer's trainer: `from polyak import {name}` for this one"
        require(isinstance(one, Algorithm), "algorithms", "instances of polyak.Algorithm", one, advice)
    check_one_swaps([algorithm for algorithm in algorithms if algorithm.swaps])


def _check_optimizers(optimizers: list[Any], model: nn.Module) -> None:
    """Check that they are different optimizers, and that each moves weights of the model."""
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
        advice_for_closure = "train in your own loop, with polyak.attach"
        require(not _needs_closure(one), "optimizers", "ones that step without a closure", one, advice_for_closure)
        warn_of_unregistered(one, model)
    require(len({id(one) for one in optimizers}) == len(optimizers), "optimizers", "different ones", optimizers)


def _needs_closure(optimizer: Any) -> bool:
    try:
        closure = inspect.signature(optimizer.step).parameters.get("closure")
    except (TypeError, ValueError):
        return False
    return closure is not None and closure.default is inspect.Parameter.empty


def _check_schedulers(schedulers: list[Any], optimizers: Sequence[Optimizer]) -> None:
    """Check that they are schedulers of the trainer's optimizers, and need no metric."""
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


def _check_followers(callbacks: list[Any], loggers: list[Any]) -> None:
    """Check that callbacks are callbacks, and that loggers are destinations."""
    parts = (("callbacks", callbacks, Callback), ("loggers", loggers, Destination))
    for name, given, kind in parts:
        for one in given:
            advice = instance_of(one) or f"derive its class from polyak.{kind.__name__}"
            if isinstance(one, Algorithm):
                advice = "give it in algorithms="
            elif isinstance(one, Callback):
                advice = "give it in callbacks="
            require(isinstance(one, kind), name, f"instances of polyak.{kind.__name__}", one, advice)

"""Checks the arguments of ``attach``: an algorithm, a model and an optimizer, in this order."""

from collections.abc import Iterable, Mapping

from torch import nn
from torch.optim import Optimizer

from polyak.algorithm import Algorithm, is_composers
from polyak.averaging.habits import kind_of
from polyak.errors import ArgumentError
from polyak.training.handle import Handle

EXAMPLE = "attach(EMA(decay=0.999), model, optimizer)"


def check_order(algorithms: object, model: object, optimizer: object) -> None:
    """Check that each argument is in its place.

    Args:
        algorithms: As given to ``attach``.
        model: As given to ``attach``.
        optimizer: As given to ``attach``.

    Raises:
        ArgumentError: If not. The message has the right order, and what was given.
    """
    given = (algorithms, model, optimizer)
    if isinstance(algorithms, Handle) and not is_composers(algorithms):
        raise ArgumentError(
            "algorithms must be an EMA, a Recorder or a list of them (got what attach returned): it is attached "
            "already, and follows the optimizer by itself"
        )
    misplaced = isinstance(algorithms, nn.Module | Optimizer) or any(isinstance(one, Algorithm) for one in given[1:])
    if misplaced or isinstance(model, Optimizer):
        raise ArgumentError(
            f"the order must be {EXAMPLE} (got attach({', '.join(kind_of(one) for one in given)})); give the "
            "algorithm first"
        )
    if algorithms is None or isinstance(algorithms, (str, Mapping, float, int)):
        raise ArgumentError(f"algorithms must be an EMA, a Recorder or a list of them (got {kind_of(algorithms)})")
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module (got {kind_of(model)}); {_instead(model)}")


def _instead(model: object) -> str:
    if isinstance(model, type):
        return f"build it, with parentheses: {model.__name__}(...)"
    if isinstance(model, Mapping):
        return "give the model itself, not its state dict"
    if isinstance(model, Iterable):
        return "give the model itself, not its parameters"
    return f"the order is {EXAMPLE}"

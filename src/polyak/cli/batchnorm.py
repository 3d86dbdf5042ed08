"""Recomputes the statistics of BatchNorm layers for an average of checkpoints."""

from typing import TYPE_CHECKING

from polyak.cli.command import UsageError, UserCodeError
from polyak.cli.functions import last_line, load_function

if TYPE_CHECKING:
    from torch import Tensor

    from polyak.checkpoints import Plan

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def recomputed_statistics(plan: "Plan", spec: str) -> "dict[str, Tensor]":
    """Return the statistics of BatchNorm layers for the averaged weights, by name.

    Args:
        plan: What is averaged.
        spec: Of the function that returns a model and batches.

    Raises:
        UsageError: If the function fails or returns something else, or the model has other tensors.
        CheckpointError: If a file is damaged.
    """
    from polyak.checkpoints.averaging import average
    from polyak.sweeping.candidates import recomputed

    try:
        returned = load_function(spec, "--update-bn")()
    except UsageError:
        raise
    except Exception as error:  # the function can raise anything
        raise UserCodeError(f"--update-bn: {spec} failed: {last_line(error)}; correct it") from error
    if not (isinstance(returned, tuple) and len(returned) == 2):
        raise UsageError(f"--update-bn: {spec} must return a model and batches (got {returned!r:.60}); change it")
    averaged = {name: average(plan, name) for name in plan.names}
    try:
        state = recomputed(averaged, returned)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise UserCodeError(
            f"--update-bn: the model must take the averaged weights and the batches ({last_line(error)}); correct "
            f"{spec}"
        ) from error
    statistics = {name: one for name, one in state.items() if name.rpartition(".")[2] in _STATISTICS}
    return {name: one.to("cpu", plan.tensors[name].dtype) for name, one in statistics.items() if name in plan.tensors}

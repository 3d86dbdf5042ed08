"""Warns if there is nothing to average: all parameters are frozen, or the policy leaves them."""

import warnings

from torch import nn

from polyak.errors import PlanWarning
from polyak.tensors.slots import all_slots


def warn_of_nothing(model: nn.Module, who: str) -> None:
    """Warn that none of a model's parameters is averaged.

    Args:
        model: Unwrapped.
        who: The average or the recorder, for the warning.
    """
    count = sum(slot.is_parameter for slot in all_slots(model))
    warnings.warn(
        f"{who} has nothing to average: of the {count} parameters of {type(model).__name__} none is trained (all are "
        "frozen, or the policy leaves them). If they move without gradients, as by an evolution strategy, give "
        "policy=lambda slot: Policy.AVERAGE; if they are unfrozen later, nothing is wrong",
        PlanWarning,
        stacklevel=5,
    )

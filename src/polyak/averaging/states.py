"""The states of averages: checked, copied, and fitted to a model with other names."""

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from polyak.errors import CheckpointError, PlanWarning
from polyak.tensors.slots import slots


def check_state(state: Any) -> None:
    """Check that a state is that of an EMA, of polyak or Composer.

    Args:
        state: Any object.

    Raises:
        CheckpointError: If it is not, or not complete.
    """
    if not isinstance(state, Mapping):
        raise CheckpointError(
            f"the state must be what state_dict() of an EMA returned (got {type(state).__name__}); load the file first"
        )
    if "ema_started" not in state:
        raise CheckpointError(
            f"the state must be that of an EMA, of polyak or Composer (got the keys {sorted(map(str, state))})"
        )
    needed = {"repr"} if "polyak" in state else {"ema_weights_active", "ema_model"}
    if "polyak" in state and state["ema_started"]:
        needed |= {"ema_model", "num_updates", "num_quarantined", "origin", "updated", "updated_at", "decay"}
    if missing := needed - state.keys():
        raise CheckpointError(
            f"the state of an EMA must be complete (it has no {', '.join(sorted(missing))}); save what state_dict() "
            "returns as it is"
        )


def cloned(state: Mapping[str, Any], device: str | None = None) -> dict[str, Any]:
    """Return a state whose tensors have memory of their own.

    Args:
        state: Tensors, mappings of tensors, and plain values.
        device: Of the copies; None stands for each tensor's own.
    """
    copies = dict[str, Any]()
    for name, value in state.items():
        if isinstance(value, Tensor):
            copies[name] = value.detach().to(device or value.device, copy=True)
        else:
            copies[name] = cloned(value, device) if isinstance(value, Mapping) else value
    return copies


def fitted(
    model: nn.Module,
    held: Mapping[str, Tensor],
    averages: Mapping[str, Tensor],
    training: Mapping[str, Tensor] | None,
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Return saved averages and training weights under the names of a model, with a warning that lists what differs.

    Args:
        model: The model in training.
        held: The averages that it has so far, which stand for what is missing.
        averages: As saved.
        training: As saved, if they were.
    """
    own = {slot.name: slot.tensor.detach() for slot in slots(model)}
    missing, unexpected = held.keys() - averages.keys(), averages.keys() - own.keys() - held.keys()
    if missing or unexpected:
        warnings.warn(
            "the saved average does not have the names of the model, and was loaded with strict=False: missing, and "
            f"left as it was: {sorted(missing)}; unexpected, and left out: {sorted(unexpected)}",
            PlanWarning,
            stacklevel=3,
        )
    fitting = {name: tensor for name, tensor in averages.items() if name not in unexpected}
    fitting |= {name: held[name] for name in missing}
    return fitting, {name: training.get(name, own[name]) for name in fitting} if training else None

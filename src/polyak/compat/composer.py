"""The states of MosaicML Composer's ``EMA``, of releases up to 0.12 and since."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from polyak.errors import ArgumentError
from polyak.tensors.slots import Policy, PolicyRule, decided, named_tensors, slots
from polyak.time import Timestamp


def as_started(average: Any) -> dict[str, Any]:
    """Return the state that Composer's ``EMA`` would have if an average was assigned to it.

    Args:
        average: A module, ``EMAParameters`` of Composer or polyak, or anything with their two methods.

    Raises:
        ArgumentError: If it is nothing of the kind.
    """
    methods = [getattr(average, name, None) for name in ("named_parameters", "named_buffers")]
    if isinstance(average, type) or not all(map(callable, methods)):
        raise ArgumentError(
            f"ema_model must be a module, or have named_parameters() and named_buffers() (got {average!r}); "
            "load_state_dict takes states"
        )
    held = {
        "named_parameters_dict": dict(average.named_parameters()),
        "named_buffers_dict": dict(average.named_buffers()),
    }
    return {"repr": "EMA()", "ema_model": held, "ema_weights_active": False, "ema_started": True}


def from_composer(state: Mapping[str, Any], model: nn.Module, policy: PolicyRule) -> dict[str, Any]:
    """Return the state of Composer's ``EMA`` as a state of ours.

    Up to 0.12 it has the state dicts of two models. Later it has one set of tensors, which are the average, or, if
    ``ema_weights_active``, the training weights, the model then having been saved with the average in it.

    Args:
        state: As Composer saved it.
        model: The model in training, with the weights of the checkpoint.
        policy: Which tensors are averaged.
    """
    known = named_tensors(model)

    def tensors(saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        wrapped = all(name.startswith("module.") for name in saved) and not saved.keys() & known.keys()
        return {name.removeprefix("module.") if wrapped else name: tensor for name, tensor in saved.items()}

    active = state["ema_weights_active"]
    held = state["ema_model"] or {}
    if "training_model" in state:
        average, training = tensors(held), tensors(state["training_model"] or {})
    else:
        average = training = tensors({**held["named_parameters_dict"], **held["named_buffers_dict"]})
        if active:
            average = {name: known[name].clone() if name in known else tensor for name, tensor in training.items()}
    # Composer averages integer buffers and cuts the result: those of the training weights are right.
    true = training if active else known
    # The state of a model also has frozen tensors, and tied ones under each of their names.
    wanted = {slot.name for slot in slots(model) if decided(policy, slot) is not Policy.LEAVE}

    def fitting(side: Mapping[str, Tensor]) -> dict[str, Tensor]:
        kept = {name: tensor for name, tensor in side.items() if name in wanted or name not in known}
        return {
            name: tensor if tensor.is_floating_point() or name not in true else true[name].clone()
            for name, tensor in kept.items()
        }

    return {
        "ema_started": state["ema_started"],
        "ema_model": fitting(average),
        "training_model": fitting(training) if active else None,
        "num_updates": 0,
        "num_quarantined": 0,
        "origin": Timestamp().state_dict(),
        "updated": False,
        "decay": None,
    }

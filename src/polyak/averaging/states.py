"""Takes, checks, loads and copies the state of an ``EMA``, also for a model with other names."""

import warnings
from collections.abc import Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from polyak.averaging.agreement import agree_on_names, refuse_unsynchronized
from polyak.averaging.saving import refuse_swapped
from polyak.compat.composer import from_composer
from polyak.errors import CheckpointError, PlanWarning, ShardingError
from polyak.sharding import OneProcess, Ranks, has_experts, is_initialized
from polyak.tensors.slots import slots

if TYPE_CHECKING:
    from polyak.averaging.online import OnlineAverage

# Entries that the state of the averaged tensors and the state of an EMA have under the same names.
_SAME = ("num_updates", "num_quarantined", "copied", "waiting", "dtype")


def state_of(average: "OnlineAverage") -> dict[str, Any]:
    """Return all that a resumed run depends on, as tensors, numbers, strings and dicts.

    Args:
        average: The average, begun or not.
    """
    if average.model is None and average.pending is not None:
        return dict(average.pending[0])
    active, shadow, model = average.active, average.shadow, average.model
    state: dict[str, Any] = {"repr": average.name, "polyak": 1, "ema_started": average.started, "lent": active}
    if shadow is None and model is not None and is_initialized():
        shadow = average.new_shadow(model)  # `torch.distributed.checkpoint` loads into the entries that are there
    if shadow is None or model is None:
        return state
    refuse_unsynchronized(average.ranks, model, average.settings.policy)
    if shadow.extra and has_experts(model):
        raise ShardingError(
            "experts that were declared to differ by rank must be averaged in one buffer to be saved (got "
            f"{average.name}, which keeps more); make them DTensors, or use another profile"
        )
    pipeline = average.pipeline()
    if pipeline or (average.ranks is not None and not average.ranks.replicas):
        average.agree(shadow)
    if pipeline:
        agree_on_names(pipeline, average.ranks or OneProcess(), model)
    saved = shadow.state_dict()
    saved |= _joined(pipeline or average.ranks, saved)
    state |= {
        "ema_model": saved["averages"],
        **{name: saved[name] for name in (*_SAME, *shadow.extra)},
        **average.progress.state_dict(),
    }
    if active:
        state["training_model"] = saved["training"]
    return state


def _joined(ranks: Ranks | None, saved: Mapping[str, Any]) -> dict[str, str]:
    """Return the joined lists of names of all ranks if they differ, since only rank 0's text is saved."""
    if ranks is None or not ranks.differ:
        return {}
    keys = ("copied", "waiting")
    names = ranks.union({f"{key} {name}": "" for key in keys for name in saved[key].split("\n") if name})
    return {key: "\n".join(n.partition(" ")[2] for n in names if n.startswith(f"{key} ")) for key in keys}


def load(average: "OnlineAverage", state: Mapping[str, Any], strict: bool = True) -> None:
    """Resume from a state of an EMA, of polyak or Composer; before the model is known, keep it until then.

    Args:
        average: The average, begun or not.
        state: The saved state.
        strict: Whether all names must match the model's.

    Raises:
        CheckpointError: If it is not such a state.
        LoanError: If the model holds an average.
        MismatchError: If names or shapes differ from the model's.
    """
    check_state(state)
    if average.model is None:
        # A copy: what is waited for may be the average of a run that goes on.
        average.pending, average.given = (cloned(state), bool(strict)), None
        return
    average.given = None
    if "polyak" not in state:
        state = from_composer(state, average.model, average.settings.policy)
    elif state["repr"] != average.name:
        warnings.warn(
            f"the run was averaged so far by {state['repr']} and continues with {average.name}",
            PlanWarning,
            stacklevel=3,
        )
    if not state["ema_started"]:
        refuse_swapped(average.model)
        average.shadow = None
        return
    if state.get("lent") and "training_model" not in state:
        raise CheckpointError(
            "a state that was taken while the model held the average must have the training weights (it has no "
            "training_model); save what state_dict() returns as it is"
        )
    shadow = average.shadow or average.new_shadow(average.model)
    averages, training = state["ema_model"], state.get("training_model")
    if not strict:
        averages, training = fitted(average.model, shadow.averages, averages, training)
    same = {name: state.get(name) for name in (*_SAME, *shadow.extra)}
    shadow.load_state_dict({"averages": averages, "training": training, **same})
    average.shadow = shadow
    average.progress.load_state_dict(state)
    average.quarantine_warned = shadow.num_quarantined


def check_state(state: Any) -> None:
    """Check that a state is that of an EMA, of polyak or Composer.

    Args:
        state: Any object.

    Raises:
        CheckpointError: If it is not, or is incomplete.
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
    if "polyak" in state and state["polyak"] != 1:
        raise CheckpointError(
            f"the state of an EMA must be of a form that this polyak reads, 1 (got {state['polyak']!r}): use the "
            "polyak that saved it"
        )
    if "polyak" in state and state["ema_started"]:
        _check_kinds(state)


def _check_kinds(state: Mapping[str, Any]) -> None:
    wrong = [name for name, kind in _KINDS.items() if not isinstance(state[name], kind)]
    if not wrong:
        held = state["ema_model"].items()
        wrong = [f"ema_model[{name!r}]" for name, tensor in held if not isinstance(tensor, Tensor) or tensor.is_meta]
    if wrong:
        raise CheckpointError(
            f"the state of an EMA must have tensors by name, numbers and moments (got another kind of {wrong[0]}); "
            "save what state_dict() returns as it is"
        )


_KINDS = {"ema_model": Mapping, "num_updates": (Real, Tensor), "origin": Mapping, "updated_at": Mapping}


def cloned(state: Mapping[str, Any], device: str | None = None) -> dict[str, Any]:
    """Return a copy of a state, with copies of its tensors.

    Args:
        state: Tensors, mappings of tensors, and plain values.
        device: The device of the copies; None for each tensor's own.
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
    """Return saved averages and training weights under a model's names; warn with a list of the differences.

    Args:
        model: The model in training.
        held: The averages that it has so far, which replace what is missing.
        averages: The saved averages.
        training: The saved training weights, if there are any.
    """
    own = {slot.name: slot.tensor.detach() for slot in slots(model)}
    missing, unexpected = held.keys() - averages.keys(), averages.keys() - own.keys() - held.keys()
    if missing or unexpected:
        warnings.warn(
            "the saved average does not have the names of the model, and was loaded with strict=False: missing, and "
            f"left as it was: {sorted(missing)}; unexpected, and left out: {sorted(unexpected)}",
            PlanWarning,
            stacklevel=4,
        )
    fitting = {name: tensor for name, tensor in averages.items() if name not in unexpected}
    fitting |= {name: held[name] for name in missing}
    return fitting, {name: training.get(name, own[name]) for name in fitting} if training else None

"""The formats of libraries that keep an average. Each is a function of a file's content.

It returns what it found, or None if the content is not of its format. To add one, write it and put it in ``READERS``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import isfinite
from typing import Any, TypeGuard

from torch import Tensor

from polyak.compat.found import MODULE, Averaged, Content, count, like, named_under, require, tensors_of, under
from polyak.compat.words import shown
from polyak.errors import CheckpointError


def _polyak_trainer(content: Content) -> Averaged | None:
    if "polyak_checkpoint" not in content:
        return None
    kind = "checkpoint of polyak.Trainer"
    if _is_averaged(holds := content["model_holds"]):
        return Averaged(kind, tensors_of(content["model"]), (f"the average is the {shown(holds, most=1000)}",))
    return _with_states(kind, content["model"], content["algorithms"])


def _polyak_lightning(content: Content) -> Averaged | None:
    ours = content.get("polyak")
    if not isinstance(ours, Mapping) or "state_dict_holds" not in ours:
        return None
    kind = "Lightning checkpoint of polyak"
    if _is_averaged(holds := ours["state_dict_holds"]):
        return Averaged(kind, tensors_of(content["state_dict"]), (f"the average is the {shown(holds, most=1000)}",))
    return _with_states(kind, content["state_dict"], ours.get("algorithms", ()))


def _ema_state(content: Content) -> Averaged | None:
    """Read the state of an ``EMA``, of polyak or Composer, by itself."""
    if "ema_started" not in content:
        return None
    kind = "state of polyak.EMA" if "polyak" in content else "state of Composer's EMA"
    require(content["ema_started"], kind, "averaging had not begun when it was saved")
    held = content["ema_model"]
    if "polyak" in content:
        return Averaged(kind, tensors_of(held), ("frozen parameters are not in it, but in the model's own state",))
    if "training_model" in content:
        return Averaged(f"{kind}, up to 0.12", tensors_of(held))
    require(
        not content["ema_weights_active"],
        kind,
        "it was saved while the average was in the model, and has the training weights; give the whole checkpoint",
    )
    return Averaged(kind, tensors_of({**held["named_parameters_dict"], **held["named_buffers_dict"]}))


def _composer(content: Content) -> Averaged | None:
    state = content.get("state")
    if not isinstance(state, Mapping) or "model" not in state or "metadata" not in state:
        return None
    kind, model = "checkpoint of Composer", tensors_of(state["model"])
    for _, saved in _pairs(state.get("algorithms", ())):
        if not _is_ema(saved):
            continue
        if (training := training_weights(saved, model)) is None:
            return _with_states(kind, model, [("EMA", saved)])
        require(saved["ema_started"], kind, "averaging had not begun when it was saved")
        return Averaged(f"{kind} with {_whose(saved)}", _with_counters(model, training))
    require(False, kind, "it has the state of no EMA")
    return None


def training_weights(saved: object, model: Content) -> dict[str, Tensor] | None:
    """Return the training weights in an algorithm's state in a checkpoint of Composer, if its model has the average.

    Args:
        saved: The state, of ``EMA`` of polyak or Composer, or of any other algorithm.
        model: The state dict of the model next to it.
    """
    if not _is_ema(saved):
        return None
    if "training_model" in saved:  # of polyak while the average is swapped in; up to 0.12 always
        held = saved["training_model"] if saved.get("ema_weights_active", True) else None
    else:
        held = saved["ema_model"] if saved.get("ema_weights_active") else None
        held = held and {**held["named_parameters_dict"], **held["named_buffers_dict"]}
    return None if held is None else like(tensors_of(held), model)


def _polyak_loop(content: Content) -> Averaged | None:
    """Read what `attach` and the integrations save next to the model: the states of algorithms, and a clock."""
    if not {"algorithms", "timestamp"} <= content.keys():
        return None
    return next((found for _, saved in _pairs(content["algorithms"]) if (found := _ema_state(saved))), None)


def _lightning(content: Content) -> Averaged | None:
    if not {"averaging_state", "current_model_state", "state_dict"} <= content.keys():
        return None
    return Averaged("Lightning checkpoint of WeightAveraging", tensors_of(content["state_dict"]))


def _timm(content: Content) -> Averaged | None:
    if "state_dict_ema" not in content:
        return None
    return Averaged("checkpoint of timm", like(tensors_of(content["state_dict_ema"]), content.get("state_dict", {})))


def timm_state(content: Content) -> Averaged:
    """Read the state dict of timm's ``ModelEmaV3``, which looks like that of any model under DDP.

    Args:
        content: The content of the file.

    Raises:
        CheckpointError: If it cannot be one.
    """
    if not named_under(MODULE, content):
        raise CheckpointError(
            "all names in a state dict of timm's ModelEmaV3 must begin with 'module.' (these do not); leave out --timm"
        )
    return Averaged("timm ModelEmaV3", under(MODULE, content))


def _averaged_model(content: Content) -> Averaged | None:
    if "n_averaged" not in content or not named_under(MODULE, content.keys() - {"n_averaged"}):
        return None
    times = int(count(content["n_averaged"]))
    return Averaged("torch AveragedModel", under(MODULE, content), (f"averaged {times} times",))


def _ema_pytorch(content: Content) -> Averaged | None:
    if not {"initted", "step"} <= content.keys() or not any(name.startswith("ema_model.") for name in content):
        return None
    require(bool(content["initted"]), "ema-pytorch", "averaging had not begun when it was saved")
    steps = float(count(content["step"]))  # inf where PostHocEMA saved a large one in 16 bits
    notes = (f"{steps:g} steps",) if isfinite(steps) else ()
    return Averaged("ema-pytorch", under("ema_model.", content), notes)


def _positional(content: Content) -> Averaged | None:
    """Read averages without names: diffusers' ``EMAModel`` and torch-ema's ``ExponentialMovingAverage``."""
    parameters = content.get("shadow_params")
    if not isinstance(parameters, (list, tuple)):
        return None
    diffusers = "optimization_step" in content
    steps = content["optimization_step" if diffusers else "num_updates"]
    return Averaged(
        "diffusers EMAModel" if diffusers else "torch-ema",
        tensors_of({str(i): tensor for i, tensor in enumerate(parameters)}),
        (f"decay {count(content.get('decay'))}, {count(steps)} updates",),
        positional=True,
    )


READERS: Sequence[Callable[[Content], Averaged | None]] = (
    _polyak_trainer,
    _polyak_lightning,
    _composer,
    _ema_state,
    _polyak_loop,
    _lightning,
    _timm,
    _averaged_model,
    _ema_pytorch,
    _positional,
)

KNOWN = (
    "Composer (its checkpoints, and the state of its EMA of any release), torch AveragedModel, timm (checkpoints with "
    "state_dict_ema), diffusers EMAModel (its folder, or its state), ema-pytorch, torch-ema, Lightning's "
    "WeightAveraging, polyak's own checkpoints, and what many training scripts save, such as {model, ema}"
)


def _is_averaged(holds: object) -> bool:
    return isinstance(holds, str) and holds.startswith("averaged")


def _pairs(algorithms: Any) -> Iterator[tuple[str, Content]]:
    yield from algorithms.items() if isinstance(algorithms, Mapping) else algorithms


def _is_ema(saved: object) -> TypeGuard[Content]:
    return isinstance(saved, Mapping) and "ema_started" in saved


def _whose(saved: Content) -> str:
    return "polyak's EMA" if "polyak" in saved else "its own EMA"


def _with_states(kind: str, model: Content, algorithms: Any) -> Averaged:
    """Take the average from the state of an ``EMA``, and the rest from the model."""
    for _, saved in _pairs(algorithms):
        if isinstance(saved, Mapping) and (found := _ema_state(saved)) is not None:
            base = tensors_of(model)
            average = like(found.tensors, base)
            if "polyak" not in saved:
                average = _with_counters(average, base)
            return Averaged(f"{kind} with {_whose(saved)}", {**base, **average})
    raise CheckpointError(f"the file must hold an average; this is a {kind}, and it has the state of no EMA")


def _with_counters(average: Mapping[str, Tensor], training: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take integer and bool tensors from the training weights: Composer averages them and truncates the result."""
    return {
        name: tensor if tensor.is_floating_point() or name not in training else training[name]
        for name, tensor in average.items()
    }

"""Averages that other libraries saved: their files are recognised, read without running code, and kept as safetensors.

A reader of a format is a function of a file's content: it returns what it found, or None if the content is not of its
format. To add one, write it and put it in ``READERS``.
"""

import hashlib
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import polyak.record
from polyak.errors import CheckpointError

# What torch.compile and the wrappers of checkpointing and FSDP put into names; no module of a model's own has these.
_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_MODULE = "module."

Content = Mapping[Any, Any]


@dataclass(frozen=True, slots=True)
class Averaged:
    """An average that was found in a file.

    Args:
        format: Whose, for people.
        tensors: By name; without names, by position as ``"0"``, ``"1"``, ...
        notes: What to know about it.
        positional: Whether the names are positions among a model's parameters.
    """

    format: str
    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()
    positional: bool = False


# The formats


def _polyak_trainer(content: Content) -> Averaged | None:
    if "polyak_checkpoint" not in content:
        return None
    kind = "checkpoint of polyak.Trainer"
    if str(content["model_holds"]).startswith("averaged"):
        return Averaged(kind, _tensors(content["model"]), (f"the average is the {content['model_holds']}",))
    return _with_states(kind, content["model"], content["algorithms"])


def _polyak_lightning(content: Content) -> Averaged | None:
    ours = content.get("polyak")
    if not isinstance(ours, Mapping) or "state_dict_holds" not in ours:
        return None
    kind = "Lightning checkpoint of polyak"
    if str(ours["state_dict_holds"]).startswith("averaged"):
        return Averaged(kind, _tensors(content["state_dict"]), (f"the average is the {ours['state_dict_holds']}",))
    return _with_states(kind, content["state_dict"], ours.get("algorithms", ()))


def _ema_state(content: Content) -> Averaged | None:
    """Read the state of an ``EMA``, of polyak or Composer, by itself."""
    if "ema_started" not in content:
        return None
    kind = "state of polyak.EMA" if "polyak" in content else "state of Composer's EMA"
    _require(content["ema_started"], kind, "averaging had not begun when it was saved")
    held = content["ema_model"]
    if "polyak" in content:
        return Averaged(kind, _tensors(held), ("frozen parameters are not in it, but in the model's own state",))
    if "training_model" in content:
        return Averaged(f"{kind}, up to 0.12", _tensors(held))
    _require(
        not content["ema_weights_active"],
        kind,
        "it was saved while the average was in the model, and has the training weights; give the whole checkpoint",
    )
    return Averaged(kind, _tensors({**held["named_parameters_dict"], **held["named_buffers_dict"]}))


def _composer(content: Content) -> Averaged | None:
    state = content.get("state")
    if not isinstance(state, Mapping) or "model" not in state or "metadata" not in state:
        return None
    kind, model = "checkpoint of Composer", _tensors(state["model"])
    for _, saved in _pairs(state.get("algorithms", ())):
        if not _is_ema(saved):
            continue
        if (training := training_weights(saved, model)) is None:
            return _with_states(kind, model, [("EMA", saved)])
        _require(saved["ema_started"], kind, "averaging had not begun when it was saved")
        return Averaged(f"{kind} with {_whose(saved)}", _with_counters(model, training))
    _require(False, kind, "it has the state of no EMA")
    return None


def training_weights(saved: object, model: Content) -> dict[str, Tensor] | None:
    """Return the training weights in an algorithm's state in a checkpoint of Composer, if its model has the average.

    Args:
        saved: The state, of ``EMA`` of polyak or Composer, or of any other algorithm.
        model: The state dict of the model beside it.
    """
    if not _is_ema(saved):
        return None
    if "training_model" in saved:  # of polyak while the average is lent; up to 0.12 always
        held = saved["training_model"] if saved.get("ema_weights_active", True) else None
    else:
        held = saved["ema_model"] if saved.get("ema_weights_active") else None
        held = held and {**held["named_parameters_dict"], **held["named_buffers_dict"]}
    return None if held is None else _like(_tensors(held), model)


def _polyak_loop(content: Content) -> Averaged | None:
    """Read what `attach` and the hosts keep beside the model: the states of algorithms, and a clock."""
    if not {"algorithms", "timestamp"} <= content.keys():
        return None
    return next((found for _, saved in _pairs(content["algorithms"]) if (found := _ema_state(saved))), None)


def _lightning(content: Content) -> Averaged | None:
    if not {"averaging_state", "current_model_state", "state_dict"} <= content.keys():
        return None
    return Averaged("Lightning checkpoint of WeightAveraging", _tensors(content["state_dict"]))


def _timm(content: Content) -> Averaged | None:
    if "state_dict_ema" not in content:
        return None
    return Averaged("checkpoint of timm", _like(_tensors(content["state_dict_ema"]), content.get("state_dict", {})))


def _timm_state(content: Content) -> Averaged:
    if not _bare(content):
        raise CheckpointError(
            "all names in a state dict of timm's ModelEmaV3 must begin with 'module.' (these do not); leave out --timm"
        )
    return Averaged("timm ModelEmaV3", _under(_MODULE, content))


def _averaged_model(content: Content) -> Averaged | None:
    if "n_averaged" not in content or not _named_under(_MODULE, content.keys() - {"n_averaged"}):
        return None
    times = int(content["n_averaged"])
    return Averaged("torch AveragedModel", _under(_MODULE, content), (f"averaged {times} times",))


def _ema_pytorch(content: Content) -> Averaged | None:
    if not {"initted", "step"} <= content.keys() or not any(name.startswith("ema_model.") for name in content):
        return None
    _require(bool(content["initted"]), "ema-pytorch", "averaging had not begun when it was saved")
    steps = float(content["step"])  # inf where PostHocEMA saved a large one in 16 bits
    notes = (f"{steps:g} steps",) if isfinite(steps) else ()
    return Averaged("ema-pytorch", _under("ema_model.", content), notes)


def _positional(content: Content) -> Averaged | None:
    """Read what has no names: diffusers' ``EMAModel`` and torch-ema's ``ExponentialMovingAverage``."""
    parameters = content.get("shadow_params")
    if not isinstance(parameters, list) or not all(isinstance(tensor, Tensor) for tensor in parameters):
        return None
    diffusers = "optimization_step" in content
    steps = content["optimization_step" if diffusers else "num_updates"]
    return Averaged(
        "diffusers EMAModel" if diffusers else "torch-ema",
        {str(i): tensor for i, tensor in enumerate(parameters)},
        (f"decay {content.get('decay')}, {steps} updates",),
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
    "WeightAveraging, and polyak's own checkpoints"
)


def _require(holds: object, kind: str, problem: str) -> None:
    if not holds:
        raise CheckpointError(f"the file must hold an average; this is a {kind}, and {problem}")


def _pairs(algorithms: Any) -> Iterator[tuple[str, Content]]:
    yield from algorithms.items() if isinstance(algorithms, Mapping) else algorithms


def _is_ema(saved: object) -> TypeGuard[Content]:
    return isinstance(saved, Mapping) and "ema_started" in saved


def _whose(saved: Content) -> str:
    return "polyak's EMA" if "polyak" in saved else "its own EMA"


def _with_states(kind: str, model: Content, algorithms: Any) -> Averaged:
    """Take the average from the state of an ``EMA``, and what it has not from the model."""
    for _, saved in _pairs(algorithms):
        if isinstance(saved, Mapping) and (found := _ema_state(saved)) is not None:
            base = _tensors(model)
            average = _like(found.tensors, base)
            if "polyak" not in saved:
                average = _with_counters(average, base)
            return Averaged(f"{kind} with {_whose(saved)}", {**base, **average})
    raise CheckpointError(f"the file must hold an average; this is a {kind}, and it has the state of no EMA")


def _with_counters(average: Mapping[str, Tensor], training: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take integer and bool tensors from the training weights: Composer averages them, and cuts the result."""
    return {
        name: tensor if tensor.is_floating_point() or name not in training else training[name]
        for name, tensor in average.items()
    }


def _tensors(state: Any) -> dict[str, Tensor]:
    """Return the tensors of a state dict under their canonical names."""
    return {_canonical(name): value for name, value in state.items() if isinstance(value, Tensor)}


def _canonical(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _named_under(prefix: str, names: Any) -> bool:
    return bool(names) and all(name.startswith(prefix) for name in names)


def _under(prefix: str, content: Content) -> dict[str, Tensor]:
    found = {name.removeprefix(prefix): value for name, value in content.items() if name.startswith(prefix)}
    return _tensors(found)


def _like(tensors: Mapping[str, Tensor], model: Content) -> dict[str, Tensor]:
    """Take ``module.``, which DDP puts in front, off all names if the model has none of them otherwise."""
    if _named_under(_MODULE, tensors.keys()) and not tensors.keys() & model.keys():
        return {name.removeprefix(_MODULE): tensor for name, tensor in tensors.items()}
    return dict(tensors)


# The files


class _Inert:
    """Stands in for an object of another library that a file holds beside tensors. No code of that library runs."""

    def __init__(self, *args: object, **options: object) -> None:
        del args, options

    def __setstate__(self, state: object) -> None:
        del state


def load(path: Path) -> Content:
    """Return what is in a file, without running code that it may hold.

    Args:
        path: Of a safetensors file or one of ``torch.save``; of a folder, all its safetensors files together.

    Raises:
        CheckpointError: If it cannot be read so.
    """
    try:
        if path.is_dir() or path.suffix == ".safetensors":
            return _load_safetensors(sorted(path.glob("*.safetensors")) if path.is_dir() else [path])
        content = _load_torch(path)
    except FileNotFoundError:
        raise CheckpointError(f"the file must exist (there is no {path})") from None
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError) as error:
        # torch's message begins with the advice to unpickle it all the same.
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].split("\n", 1)[0]
        raise CheckpointError(
            f"{path} must be a safetensors file, or one of torch.save that holds tensors in plain containers "
            f"({type(error).__name__}: {reason}); save the state dict alone"
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} must hold a state dict or a checkpoint (got a {type(content).__name__}); save its state_dict()"
        )
    return content


def _load_safetensors(paths: Sequence[Path]) -> Content:
    found = dict[str, Tensor]()
    for path in paths:
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
    return found


def _load_torch(path: Path) -> Any:
    zipped = path.is_file() and zipfile.is_zipfile(path)
    with ExitStack() as stack:
        if zipped:
            others = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            stack.enter_context(torch.serialization.safe_globals([(_Inert, name) for name in others]))
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def read(path: Path, names: Path | None = None, *, timm: bool = False) -> Averaged:
    """Find the average in a file, whatever library saved it.

    Args:
        path: Of a checkpoint, a state dict, or a folder that diffusers saved.
        names: Of a file with the names for an average that has none: the model's state dict, saved by ``torch.save``,
            or a JSON list of the names of its parameters in order.
        timm: Whether the file is the state dict of timm's ``ModelEmaV3``. It looks like that of any model under DDP.

    Raises:
        CheckpointError: If the file cannot be read safely, is of no known format, holds no average or several, or the
            names do not fit.
    """
    try:
        found = _read_folder(path) if path.is_dir() else _read_file(path, timm=timm)
    except CheckpointError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError) as error:
        # A file of a known format with something else where its numbers and tensors should be.
        raise CheckpointError(f"{path} must be whole (reading it gave {type(error).__name__}: {error})") from error
    if found.positional:
        if names is None:
            raise CheckpointError(
                f"{found.format} saves its {len(found.tensors)} tensors without names; give --names, a JSON list of "
                "[name for name, _ in model.named_parameters()], or the model's state dict saved by torch.save"
            )
        return _named(found, names)
    if names is not None:
        raise CheckpointError(f"the file has names (this is {found.format}); leave out those that were given")
    if not found.tensors:
        raise CheckpointError(f"the file must hold an average; this is {found.format}, and it has no tensors")
    return found


def _read_file(path: Path, *, timm: bool) -> Averaged:
    content = load(path)
    return _timm_state(content) if timm else _find(content, path)


def _find(content: Content, path: Path) -> Averaged:
    for reader in READERS:
        if (found := reader(content)) is not None:
            return found
    # Training scripts keep the state of an average under a name of theirs, beside the model's.
    inside = {key: value for key, value in content.items() if isinstance(value, Mapping)}
    nested = {key: found for key, value in inside.items() for reader in READERS if (found := reader(value))}
    if len(nested) == 1:
        ((key, found),) = nested.items()
        return replace(found, notes=(f"found under {key!r}", *found.notes))
    if nested:
        raise CheckpointError(f"{path} must hold one average (got {', '.join(map(repr, nested))}); save one alone")
    keys = [str(key) for key in content]
    shown = ", ".join(keys[:6]) + (", ..." if len(keys) > 6 else "")
    hint = "; names that all begin with 'module.' are training weights under DDP, or timm's ModelEmaV3: say --timm then"
    raise CheckpointError(
        f"{path} must be of a known format: {KNOWN}; it has the keys {shown or 'none'}"
        + (hint if _bare(content) else "")
    )


def _bare(content: Content) -> bool:
    return _named_under(_MODULE, [str(key) for key in content])


def _read_folder(path: Path) -> Averaged:
    try:
        config = json.loads((path / "config.json").read_text())
    except (OSError, ValueError):
        config = dict[str, Any]()
    if not {"decay", "optimization_step", "_class_name"} <= config.keys():
        raise CheckpointError(
            "a folder must be one that diffusers' EMAModel.save_pretrained wrote, with decay and optimization_step in "
            f"its config.json ({path} is not); give the file instead"
        )
    notes = (f"{config['_class_name']}, decay {config['decay']}, {config['optimization_step']} updates",)
    return Averaged("diffusers EMAModel", _tensors(load(path)), notes)


def _named(found: Averaged, names: Path) -> Averaged:
    given = list(found.tensors.values())
    if names.suffix == ".json":
        listed = _listed(names)
        if len(listed) != len(given):
            raise CheckpointError(f"{names} must have {len(given)} names (it has {len(listed)})")
        return replace(found, tensors=dict(zip(listed, given, strict=True)), positional=False)
    if names.suffix == ".safetensors":
        raise CheckpointError(
            f"the order of the parameters must be known, and {names} has its tensors in another; give a file of "
            "torch.save, or a JSON list of names"
        )
    model = _tensors(load(names))
    # Tied tensors have several names, and the first is that of the parameter.
    first = {_place(name, tensor): name for name, tensor in reversed(model.items())}
    names_once = set(first.values())
    parameters = [name for name in model if name in names_once and not name.endswith(_STATISTICS)]
    shapes = {name: (tuple(model[name].shape), tuple(t.shape)) for name, t in zip(parameters, given, strict=False)}
    if len(parameters) != len(given) or any(one != other for one, other in shapes.values()):
        wrong = next((f"; {n}: {a} there, {b} here" for n, (a, b) in shapes.items() if a != b), "")
        raise CheckpointError(
            f"the parameters of {names} must be those that were averaged, in order ({len(parameters)} there, "
            f"{len(given)} here{wrong}); if it has frozen parameters or other buffers, give a JSON list of names"
        )
    average = dict(zip(parameters, given, strict=True))
    tensors = {name: average.get(first[_place(name, tensor)], tensor) for name, tensor in model.items()}
    others = sum(first[_place(name, tensor)] not in average for name, tensor in model.items())
    note = (f"{others} others, not averaged, are from {names.name}",) if others else ()
    return replace(found, tensors=tensors, notes=(*found.notes, *note), positional=False)


def _listed(names: Path) -> list[str]:
    try:
        listed = json.loads(names.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{names} must be a JSON list of names ({error})") from error
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise CheckpointError(f"{names} must be a JSON list of names (got {json.dumps(listed)[:60]})")
    if len(set(listed)) < len(listed):
        raise CheckpointError(f"{names} must have each name once")
    return listed


def _place(name: str, tensor: Tensor) -> object:
    return (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else name


def write(found: Averaged, path: Path, source: Path) -> None:
    """Keep an average as a safetensors file that says where it is from. It is complete, or ``path`` is as it was.

    Args:
        found: By ``read``.
        path: Of the file.
        source: What was read.

    Raises:
        RecordError: If the disk refuses.
    """
    metadata = {
        "format": "pt",
        "polyak.source": source.resolve().name,
        "polyak.source_format": found.format,
        "polyak.notes": "; ".join(found.notes),
    }
    if source.is_file():
        with source.open("rb") as file:
            metadata["polyak.source_sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    infos = {name: polyak.record.TensorInfo.of(tensor, averaged=False) for name, tensor in found.tensors.items()}
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    with polyak.record.disk_errors(f"writing {path}"):
        polyak.record.write_tensors(draft, infos, found.tensors.__getitem__, metadata)
        draft.replace(path)

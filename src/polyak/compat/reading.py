"""Finds the average in a file or a folder, whatever saved it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from polyak.compat import folders
from polyak.compat.files import load, read_json
from polyak.compat.formats import KNOWN, READERS, timm_state
from polyak.compat.found import MODULE, Averaged, Content, named_under, plain, tensors_of
from polyak.compat.pickles import StandIn
from polyak.compat.shapes import STATISTICS, candidates, is_state_dict, one_of, take
from polyak.compat.words import listed, shown
from polyak.errors import CheckpointError

# A state dict that has one of these is not a model's.
_COUNTERS = {"n_averaged", "initted", "step", "num_updates", "ema_started"}


def read(
    path: Path, names: Path | None = None, *, timm: bool = False, key: str | None = None, prefix: str | None = None
) -> Averaged:
    """Find the average in a file, whatever library saved it.

    Args:
        path: The path of a checkpoint, a state dict, or a folder of diffusers or ``torch.distributed.checkpoint``.
        names: A file with the names for an average that has none: the model's state dict, saved by ``torch.save``, or a
            JSON list of the names of its parameters in order.
        timm: Whether the file is the state dict of timm's ``ModelEmaV3``. It looks like that of any model under DDP.
        key: Where the average is, as ``ema`` or ``optimizer_states.0.ema``; None to find out.
        prefix: How the names of its tensors begin, as ``teacher.``; None to find out.

    Raises:
        CheckpointError: If the file cannot be read safely, is of no known format, holds no average or several, or the
            names do not fit.
    """
    try:
        found = _read(path, timm=timm, key=key, prefix=prefix)
        return _with_names(found, names)
    except CheckpointError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError) as error:
        # A file of a known format with something else where its numbers and tensors should be.
        said = f"{type(error).__name__}: {shown(error)}"
        raise CheckpointError(f"{shown(path)} must be whole (reading it gave {said})") from error
    except MemoryError:
        raise CheckpointError(f"{shown(path)} cannot be read: it needs more memory than there is") from None


def _read(path: Path, *, timm: bool, key: str | None, prefix: str | None) -> Averaged:
    if folders.is_diffusers(path):
        if key is not None or prefix is not None or timm:
            raise CheckpointError("a folder of diffusers has one average; leave out --key, --prefix and --timm")
        return folders.diffusers(path)
    content = folders.load_distributed(path) if path.is_dir() else load(path)
    if key is not None or prefix is not None:
        return _chosen(content, key, prefix)
    return timm_state(content) if timm else _find(content, path)


def _find(content: Content, path: Path) -> Averaged:
    for reader in READERS:
        if (found := reader(content)) is not None:
            return found
    # Training scripts keep the state of an average under their own key, next to the model's.
    inside = {str(k): value for k, value in content.items() if isinstance(value, Mapping) and isinstance(k, (str, int))}
    nested = {key: found for key, value in inside.items() for reader in READERS if (found := reader(value))}
    shaped = {place: one for place, one in candidates(content).items() if place.partition(".")[0] not in nested}
    if len(nested) + len(shaped) > 1:
        raise one_of(nested | shaped)
    for key, found in nested.items():
        return replace(found, notes=(f"found under {shown(key)!r}", *found.notes))
    for place, (shape, value) in shaped.items():
        found = take(shape, content, value)
        return replace(found, notes=(f"found under {shown(place)!r}", *found.notes))
    if is_state_dict(content) and not _is_bare(content) and not content.keys() & _COUNTERS:
        return Averaged("state dict alone", tensors_of(content), ("nothing in the file says that it is an average",))
    raise _unknown(content, path)


def _is_bare(content: Content) -> bool:
    return named_under(MODULE, content)


def _unknown(content: Content, path: Path) -> CheckpointError:
    hint = ""
    if _is_bare(content):
        hint = "; names that all begin with 'module.' are training weights under DDP, or timm's ModelEmaV3: say --timm"
    elif objects := [key for key, value in content.items() if isinstance(value, StandIn) and not value]:
        hint = f"; {listed(objects)} hold objects, which are not built from a file: save their state_dict()"
    elif any(isinstance(value, Mapping) for value in content.values()):
        hint = "; if one of them is the average, say which by --key"
    return CheckpointError(
        f"{shown(path)} must be of a known format: {KNOWN}; it has the keys {listed(content) or 'none'}{hint}"
    )


def _chosen(content: Content, key: str | None, prefix: str | None) -> Averaged:
    """Return what is at the given place."""
    value = content if key is None else dig(content, key)
    if isinstance(value, (list, tuple)) and value and prefix is None:
        tensors = tensors_of({str(i): tensor for i, tensor in enumerate(value)})
        return Averaged(f"list under {shown(key)}", tensors, positional=True)
    if not isinstance(value, Mapping):
        raise CheckpointError(f"--key must be that of a state dict ({shown(key)} is {shown(value)})")
    if prefix is None:
        found = next((found for reader in READERS if (found := reader(value)) is not None), None)
        return found or Averaged(f"state dict under {shown(key)}", plain(tensors_of(value)))
    tensors = tensors_of(value)
    chosen = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if not chosen:
        raise CheckpointError(
            f"--prefix must be how names begin (none with {shown(prefix)}; there are {listed(value)})"
        )
    return Averaged(f"tensors whose names begin with {shown(prefix)}", chosen)


def dig(value: Any, key: str) -> Any:
    """Return what is at a key whose parts are separated by points; a part may contain points.

    Args:
        value: The content of a file.
        key: Such as ``ema`` or ``optimizer_states.0.ema``.

    Raises:
        CheckpointError: If there is nothing at the key.
    """
    if isinstance(value, (list, tuple)):
        value = {str(i): inner for i, inner in enumerate(value)}
    if isinstance(value, Mapping):
        inside = {str(k): inner for k, inner in value.items() if isinstance(k, (str, int))}
        if key in inside:
            return inside[key]
        parts = key.split(".")
        for end in range(len(parts) - 1, 0, -1):
            if (head := ".".join(parts[:end])) in inside:
                return dig(inside[head], ".".join(parts[end:]))
        raise CheckpointError(f"--key must be in the file ({shown(key)} is not; there are {listed(inside) or 'none'})")
    raise CheckpointError(f"--key must be in the file (there is nothing at {shown(key)})")


def _with_names(found: Averaged, names: Path | None) -> Averaged:
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


def _named(found: Averaged, names: Path) -> Averaged:
    given = list(found.tensors.values())
    if names.suffix == ".json":
        named = _named_in(names)
        if len(named) != len(given):
            raise CheckpointError(f"{shown(names)} must have {len(given)} names (it has {len(named)})")
        return replace(found, tensors=dict(zip(named, given, strict=True)), positional=False)
    if names.suffix == ".safetensors":
        raise CheckpointError(
            f"the order of the parameters must be known, and {shown(names)} has its tensors in another; give a file of "
            "torch.save, or a JSON list of names"
        )
    model = tensors_of(load(names))
    # Tied tensors have several names, and the first is that of the parameter.
    first = {_place(name, tensor): name for name, tensor in reversed(model.items())}
    names_once = set(first.values())
    parameters = [name for name in model if name in names_once and not name.endswith(STATISTICS)]
    shapes = {name: (tuple(model[name].shape), tuple(t.shape)) for name, t in zip(parameters, given, strict=False)}
    if len(parameters) != len(given) or any(one != other for one, other in shapes.values()):
        wrong = next((f"; {shown(n)}: {a} there, {b} here" for n, (a, b) in shapes.items() if a != b), "")
        raise CheckpointError(
            f"the parameters of {shown(names)} must be those that were averaged, in order ({len(parameters)} there, "
            f"{len(given)} here{wrong}); if it has frozen parameters or other buffers, give a JSON list of names"
        )
    average = dict(zip(parameters, given, strict=True))
    tensors = {name: average.get(first[_place(name, tensor)], tensor) for name, tensor in model.items()}
    others = sum(first[_place(name, tensor)] not in average for name, tensor in model.items())
    note = (f"{others} others, not averaged, are from {names.name}",) if others else ()
    return replace(found, tensors=tensors, notes=(*found.notes, *note), positional=False)


def _named_in(path: Path) -> list[str]:
    try:
        named = read_json(path)
    except CheckpointError as error:
        raise CheckpointError(f"{shown(path)} must be a JSON list of names ({error})") from None
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise CheckpointError(f"{shown(path)} must be a JSON list of names (got {_json_start(named)})")
    if len(set(named)) < len(named):
        raise CheckpointError(f"{shown(path)} must have each name once")
    return named


def _json_start(value: object) -> str:
    return f"{shown(value)} of {len(value)}" if isinstance(value, (dict, list)) else shown(value)


def _place(name: str, tensor: Tensor) -> object:
    return (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else name

"""Finds where the weights are in a checkpoint."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polyak.checkpoints.stored import Files, StoredTensor
from polyak.compat.modules import NetworkState
from polyak.compat.pickles import StandIn
from polyak.compat.reading import dig
from polyak.compat.tensors import Unread
from polyak.compat.words import listed, shown
from polyak.errors import CheckpointError

_Mapping = Mapping[Any, Any]
# What keys of other states contain.
_OTHERS = ("optim", "sched", "scaler", "rng", "random", "dataloader", "dataset", "metric", "message_hub", "loops")
_ALSO_OTHERS = {"opt", "opt_state", "args", "config", "amp", "ddp", "batch"}
_DEPTH = 5
_MOST_ITEMS = 64  # of a list that is looked into
# What layers keep in a state dict that is not a weight: how torch names it, after the name of the layer.
EXTRA_STATE = "_extra_state"


class Weights(NamedTuple):
    """The weights in a checkpoint.

    Args:
        place: Where they are.
        tensors: The tensors, by name.
        extra: Extra states that are no tensors, but plain values, by name.
        left: The names of extra states that are neither.
        buffers: Which of the tensors are buffers, of a network that was pickled as an object; none of a state dict.
    """

    place: str
    tensors: dict[str, StoredTensor]
    extra: dict[str, Any]
    left: tuple[str, ...]
    buffers: frozenset[str]


def weights_in(content: _Mapping, files: Files, key: str | None, prefix: str | None) -> Weights:
    """Return where the weights are, and them, by name.

    Args:
        content: The content of a checkpoint.
        files: The files that its tensors are in.
        key: Where they are, as ``model`` or ``state.model``; None to find out.
        prefix: How the names of the tensors to take begin, as ``teacher.``, which is left out of them; None for all.

    Raises:
        CheckpointError: If there are none or several, or a tensor cannot be read.
    """
    place, state = _place(content, key)
    found = {name: value for name, value in state.items() if isinstance(value, (Tensor, StoredTensor, Unread))}
    states = {
        name.removeprefix(prefix or ""): value
        for name, value in state.items()
        if isinstance(name, str) and is_extra_state(name) and name not in found and name.startswith(prefix or "")
    }
    extra = {name: value for name, value in states.items() if _is_plain(value)}
    if other := [name for name in found if not isinstance(name, str)]:
        raise CheckpointError(f"the names of weights must be text (got {shown(other[0])}); save them by name")
    if prefix:
        names = list(found)
        found = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
        if not found:
            raise CheckpointError(f"--prefix must be how names begin (none with {shown(prefix)}: {listed(names)})")
    named = {name: value for name, value in state.items() if not prefix or str(name).startswith(prefix)}
    if unread := {name: kind for name, value in named.items() if (kind := unread_kind(value))}:
        name, kind = next(iter(unread.items()))
        raise CheckpointError(f"all weights must be plain tensors ({shown(name)} is {kind}); save them as such")
    buffers = state.buffers if isinstance(state, NetworkState) and not prefix else frozenset[str]()
    return Weights(place, stored_in(found, files), extra, tuple(states.keys() - extra.keys()), buffers)


def unread_kind(value: object) -> str:
    """Return what a value is that should be a tensor and cannot be read; empty for all else.

    Args:
        value: In a state dict.
    """
    if isinstance(value, StandIn) and value.of.rpartition(".")[2].endswith(
        "Tensor"
    ):  # of ranks, which keep parts of it
        return f"an object of the class {shown(value.of)}, which is not built"
    return value.kind if isinstance(value, Unread) else ""


def _is_plain(value: object, depth: int = _DEPTH) -> bool:
    """Return whether a value has no object in it that was not built."""
    if isinstance(value, (StandIn, Unread)) or not depth:
        return False
    if isinstance(value, Mapping):
        return all(_is_plain(one, depth - 1) for pair in value.items() for one in pair)
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(_is_plain(one, depth - 1) for one in value)
    return isinstance(value, (str, bytes, int, float, complex, type(None), torch.dtype))


def is_extra_state(name: str) -> bool:
    """Return whether a name in a state dict is that of an extra state, which only its layer can interpret.

    Args:
        name: Such as ``layer.0._extra_state``.
    """
    return name.rpartition(".")[2] == EXTRA_STATE


def stored_in(state: _Mapping, files: Files) -> dict[str, StoredTensor]:
    """Return the tensors of a state dict, by name.

    Args:
        state: The state dict.
        files: The files that its tensors are in.
    """
    stored = {name: files.stored(value) if isinstance(value, Tensor) else value for name, value in state.items()}
    return {name: value for name, value in stored.items() if isinstance(value, StoredTensor)}


def _place(content: _Mapping, key: str | None) -> tuple[str, _Mapping]:
    if key is not None:
        value = dig(content, key)
        if not isinstance(value, Mapping) or not any(isinstance(v, (Tensor, StoredTensor)) for v in value.values()):
            raise CheckpointError(f"--key must be that of a state dict ({shown(key)} is {shown(value)})")
        return key, value
    places = dict(state_dicts(content))
    if not places and content and all(isinstance(value, (Tensor, StoredTensor)) for value in content.values()):
        return "", content  # of single numbers alone
    if not places:
        of = ", the state of an optimizer" if "param_groups" in content else ""
        raise CheckpointError(
            f"a checkpoint must have a state dict in it (it has {listed(content) or 'nothing'}{of}); "
            f"{'leave it out' if of else 'say where by --key'}"
        )
    if len(places) > 1:
        sizes = ", ".join(f"{shown(place) or 'the file itself'} ({_count(state)})" for place, state in places.items())
        hint = "; the state_dict of mmengine's EMAHook is the average" if "message_hub" in content else ""
        raise CheckpointError(f"it must be clear which weights are meant (it has {sizes}{hint}); say which by --key")
    return next(iter(places.items()))


def _count(state: _Mapping) -> str:
    return f"{sum(isinstance(value, (Tensor, StoredTensor)) for value in state.values())} tensors"


def state_dicts(content: object, place: str = "", depth: int = _DEPTH) -> Iterator[tuple[str, _Mapping]]:
    """Yield what may be a model's state dict, with its place. States of optimizers and others are passed over.

    Args:
        content: The content of a checkpoint.
        place: Where that is.
        depth: How many levels further in are looked at.
    """
    if not depth or (isinstance(content, Mapping) and "param_groups" in content):  # of an optimizer
        return
    inside = content.items() if isinstance(content, Mapping) else _items(content)
    inner = [
        one
        for key, value in inside
        if isinstance(key, (str, int)) and not _is_other(key)
        for one in state_dicts(value, f"{place}.{key}" if place else str(key), depth - 1)
    ]
    if isinstance(content, Mapping) and _has_weights(content, alone=not inner):
        yield place, content
    yield from inner


def _items(value: object) -> Iterator[tuple[int, Any]]:
    if isinstance(value, (list, tuple)) and len(value) <= _MOST_ITEMS:
        yield from enumerate(value)


def _is_other(key: str | int) -> bool:
    return isinstance(key, str) and (key.lower() in _ALSO_OTHERS or any(word in key.lower() for word in _OTHERS))


def _has_weights(state: _Mapping, *, alone: bool) -> bool:
    """Return whether weights are in a mapping. If state dicts are in it too, its own names must have points."""
    return any(
        isinstance(name, str)
        and (alone or "." in name)
        and (
            (isinstance(value, (Tensor, StoredTensor)) and _is_averaged(value) and len(value.shape) > 0)
            or bool(unread_kind(value))
        )
        for name, value in state.items()
    )


def _is_averaged(value: Tensor | StoredTensor) -> bool:
    return value.dtype.is_floating_point or value.dtype.is_complex

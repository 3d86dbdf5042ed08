"""Pickles of whole modules, as EDM2 saves its snapshots: their tensors, read without building a module.

``pickle.dump`` writes a tensor's bytes into the pickle itself. They stay in the file: only their places are kept.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from polyak.compat.pickles import StandIn, Window
from polyak.compat.saved import load_saved
from polyak.compat.tensors import Storage, Unread, unpickler
from polyak.errors import CheckpointError

# Smaller values are copied, so that the text and numbers of a pickle are ordinary ones.
_LARGE_BYTES = 1 << 12
_MOST_DEPTH = 64


@dataclass(frozen=True, slots=True)
class PickledModule:
    """The tensors of a module in a pickle.

    Args:
        parameters: By name.
        buffers: The persistent ones, by name.
    """

    parameters: Mapping[str, Tensor | Unread]
    buffers: Mapping[str, Tensor | Unread]

    @property
    def state_dict(self) -> dict[str, Tensor | Unread]:
        """All tensors by name, as ``state_dict`` of the module has them."""
        return {**self.parameters, **self.buffers}


class _InPlace(Window):
    """Reads a pickle; long values are parts of the file and no copies."""

    def read(self, size: int = -1) -> Any:
        left = max(0, len(self._data) - self._at)
        if _LARGE_BYTES <= size <= left:
            found = self._data[self._at : self._at + size]
            self._at += size
            return found
        return super().read(size)


def load_modules(data: memoryview) -> dict[str, Any]:
    """Return what is in a pickle: a mapping, in which a `PickledModule` stands for each module.

    Args:
        data: The file.

    Raises:
        CheckpointError: If it is no pickle of a mapping, is damaged, or is no longer whole.
    """
    reader = unpickler(_outside, aligned=False, storage=_storage)
    try:
        content = reader.load(_InPlace(data))
    except RecursionError:
        raise CheckpointError("its pickle is nested too deeply") from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"a pickle must hold a mapping with a module in it (got a {type(content).__name__})")
    found = {str(key): value for key, value in content.items() if isinstance(key, str)}
    return {key: module if (module := _module(value)) else value for key, value in found.items()}


def _outside(persistent_id: object) -> Any:
    raise CheckpointError("a pickle must have all its tensors in it (one is outside); save it with torch.save")


def _storage(data: object, *_: object) -> Storage | StandIn:
    if isinstance(data, bytes):
        data = memoryview(bytearray(data))
    if not isinstance(data, memoryview):
        raise CheckpointError("a storage in a pickle must be bytes")
    found = load_saved(data, mapped=True, strict=False)
    return found if isinstance(found, Storage) else StandIn("torch.storage")


def _module(value: object) -> PickledModule | None:
    parameters, buffers = dict[str, Any](), dict[str, Any]()
    for prefix, state in _modules(value):
        local = state.get("_non_persistent_buffers_set") or ()
        parameters |= {f"{prefix}{name}": one for name, one in _tensors(state["_parameters"])}
        buffers |= {f"{prefix}{name}": one for name, one in _tensors(state.get("_buffers")) if name not in local}
    return PickledModule(parameters, buffers) if parameters or buffers else None


def _modules(value: object, prefix: str = "", depth: int = _MOST_DEPTH) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Yield the state of a module and of those inside, each with the prefix of its names."""
    state = _state(value)
    if state is None:
        return
    if not depth:
        raise CheckpointError("modules in a pickle must not be nested so deeply")
    yield prefix, state
    inside = state.get("_modules")
    for name, one in inside.items() if isinstance(inside, Mapping) else ():
        yield from _modules(one, f"{prefix}{name}.", depth - 1)


def _state(value: object) -> Mapping[Any, Any] | None:
    """Return the attributes of a module, pickled as such or by EDM2's ``persistence``."""
    if not isinstance(value, StandIn):
        return None
    state: object = value.state
    if value.of.endswith("._reconstruct_persistent_obj") and isinstance(value.arguments, tuple) and value.arguments:
        meta = value.arguments[0]
        state = meta.get("state") if isinstance(meta, Mapping) else None
    return state if isinstance(state, Mapping) and isinstance(state.get("_parameters"), Mapping) else None


def _tensors(held: object) -> Iterator[tuple[str, Tensor | Unread]]:
    for name, one in held.items() if isinstance(held, Mapping) else ():
        if isinstance(name, str) and isinstance(one, (Tensor, Unread)):
            yield name, one

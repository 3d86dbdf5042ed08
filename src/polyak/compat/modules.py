"""The weights of networks that were pickled as objects, read as data: nothing of their classes is imported or run."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor

from polyak.compat.pickles import StandIn
from polyak.compat.tensors import Unread
from polyak.errors import CheckpointError

_DEPTH = 4
_MOST_LAYERS = 64  # inside each other
# Of NVIDIA's networks, such as EDM2's and StyleGAN's: the state of the object is in its only argument.
_PERSISTENT = "._reconstruct_persistent_obj"


class NetworkState(dict[str, Any]):
    """The state dict of a network that was pickled as an object.

    Args:
        parts: The attributes of the network.

    Attributes:
        buffers: The names of its persistent buffers; its other tensors are parameters.

    Raises:
        CheckpointError: If its layers are nested too deeply.
    """

    def __init__(self, parts: Mapping[Any, Any]) -> None:
        super().__init__()
        buffers: dict[str, Any] = {}
        for prefix, layer in _layers(parts, "", _MOST_LAYERS):
            hidden = layer.get("_non_persistent_buffers_set")
            hidden = hidden if isinstance(hidden, (set, frozenset, list, tuple)) else ()
            self.update(_tensors(layer, "_parameters", prefix))
            own = _tensors(layer, "_buffers", prefix, hidden)
            self.update(own)
            buffers |= own
        self.buffers = frozenset(buffers)


def with_state_dicts(content: Any, depth: int = _DEPTH) -> Any:
    """Return the content of a file, with state dicts in place of the networks that were pickled as objects.

    Args:
        content: The content of a file.
        depth: How many levels of mappings are looked into.

    Raises:
        CheckpointError: If the layers of a network are nested too deeply.
    """
    if isinstance(content, StandIn) and not content and (parts := _parts(content)) is not None:
        return NetworkState(parts)
    if not depth or not isinstance(content, dict):
        return content
    inside = {key: with_state_dicts(value, depth - 1) for key, value in content.items()}
    if isinstance(content, StandIn):  # of a class derived from dict, such as EDM2's EasyDict
        content.update(inside)
        return content
    return inside


def _parts(value: object) -> Mapping[Any, Any] | None:
    """Return the attributes of a network; None if it is not a network."""
    if not isinstance(value, StandIn):
        return None
    state = value.state
    if value.of.endswith(_PERSISTENT) and isinstance(value.arguments, tuple) and value.arguments:
        meta = value.arguments[0]
        state = meta.get("state") if isinstance(meta, Mapping) else None
    return state if isinstance(state, Mapping) and isinstance(state.get("_parameters"), Mapping) else None


def _layers(parts: Mapping[Any, Any], prefix: str, depth: int) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Yield the attributes of a network and of the layers inside, each with the prefix of its names."""
    if not depth:
        raise CheckpointError(
            f"the layers of a network must be nested at most {_MOST_LAYERS} deep (these are nested deeper); save its "
            "state_dict()"
        )
    yield prefix, parts
    inside = parts.get("_modules")
    for name, layer in inside.items() if isinstance(inside, Mapping) else ():
        if (inner := _parts(layer)) is not None:
            yield from _layers(inner, f"{prefix}{name}.", depth - 1)


def _tensors(layer: Mapping[Any, Any], kind: str, prefix: str, hidden: Collection[Any] = ()) -> dict[str, Any]:
    found = layer.get(kind)
    held = found.items() if isinstance(found, Mapping) else ()
    return {f"{prefix}{n}": one for n, one in held if isinstance(one, (Tensor, Unread)) and n not in hidden}

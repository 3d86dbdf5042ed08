"""The weights of networks that were pickled as objects, read as data: nothing of their classes is imported or run."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from polyak.compat.pickles import StandIn
from polyak.compat.tensors import Unread

_DEPTH = 4
_MOST_LAYERS = 64  # inside each other
# Of NVIDIA's networks, such as EDM2's and StyleGAN's: the state of the object is in its only argument.
_PERSISTENT = "persistence._reconstruct_persistent_obj"


def with_state_dicts(content: Any, depth: int = _DEPTH) -> Any:
    """Return the content of a file with the state dicts of networks in place of those that were pickled as objects.

    Args:
        content: Of a file.
        depth: How many levels of mappings are looked into.
    """
    if isinstance(content, StandIn) and not content and (parts := _parts(content)) is not None:
        return dict(_named(parts, "", _MOST_LAYERS))
    if depth and isinstance(content, dict) and not isinstance(content, StandIn):
        return {key: with_state_dicts(value, depth - 1) for key, value in content.items()}
    return content


def _parts(value: object) -> Mapping[Any, Any] | None:
    """Return the attributes of a network; None if it is none."""
    if not isinstance(value, StandIn):
        return None
    state = value.state
    if value.of.endswith(_PERSISTENT) and isinstance(value.arguments, tuple) and value.arguments:
        meta = value.arguments[0]
        state = meta.get("state") if isinstance(meta, Mapping) else None
    parts = state if isinstance(state, Mapping) else {}
    return parts if all(isinstance(parts.get(name), Mapping) for name in ("_parameters", "_modules")) else None


def _named(parts: Mapping[Any, Any], prefix: str, depth: int) -> Iterator[tuple[str, Any]]:
    """Yield the tensors of a network as its state dict has them."""
    hidden = parts.get("_non_persistent_buffers_set")
    hidden = hidden if isinstance(hidden, (set, frozenset, list, tuple)) else ()
    for kind in ("_parameters", "_buffers"):
        tensors = parts.get(kind)
        for name, value in tensors.items() if isinstance(tensors, Mapping) else ():
            if isinstance(value, (Tensor, Unread)) and not (kind == "_buffers" and name in hidden):
                yield f"{prefix}{name}", value
    layers = parts["_modules"] if depth else {}
    for name, layer in layers.items():
        if (inner := _parts(layer)) is not None:
            yield from _named(inner, f"{prefix}{name}.", depth - 1)

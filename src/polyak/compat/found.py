"""What was found in a file, with its tensors under the names that they have in the model."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from polyak.compat.pickles import StandIn
from polyak.compat.tensors import Unread
from polyak.compat.words import shown
from polyak.errors import CheckpointError
from polyak.tensors.slots import WRAPPED_NAMES

Content = Mapping[Any, Any]

# What DDP and DataParallel put in front of all names.
MODULE = "module."


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


def require(holds: object, kind: str, problem: str) -> None:
    """Refuse a file.

    Args:
        holds: What must be so.
        kind: The format of the file.
        problem: What is the case otherwise.

    Raises:
        CheckpointError: If it is not so.
    """
    if not holds:
        raise CheckpointError(f"the file must hold an average; this is a {kind}, and {problem}")


def count(value: object) -> str:
    """Return a number from a file, for a note.

    Args:
        value: A number, or a tensor of one.

    Raises:
        CheckpointError: If it is not one.
    """
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    is_number = value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
    if not is_number or (isinstance(value, int) and abs(value) >= 1 << 63):
        raise CheckpointError(f"the file must be whole (a number must be where it has {shown(value)})")
    return f"{value:g}" if isinstance(value, float) else shown(value)


def tensors_of(state: object) -> dict[str, Tensor]:
    """Return the tensors of a state dict under their canonical names, without anything else, such as extra state.

    Args:
        state: The state dict.

    Raises:
        CheckpointError: If it is not one, a tensor cannot be read, or two have one name.
    """
    if not isinstance(state, Mapping):
        raise CheckpointError(f"a state dict must be where the file has {shown(state)}")
    if isinstance(state, StandIn) and not state:
        raise CheckpointError(
            f"a state dict must be where the file has an object of the class {shown(state.of)}, which is not built; "
            "save its state_dict()"
        )
    found = dict[str, Tensor]()
    for name, value in state.items():
        if not isinstance(value, (Tensor, Unread)):
            continue
        if not isinstance(name, str):
            raise CheckpointError(f"the names of tensors must be text (got {shown(name)})")
        if isinstance(value, Unread):
            raise CheckpointError(
                f"all tensors of the average must be plain ones, with values ({shown(name)} is {value.kind}); save it "
                "as one, or leave it out"
            )
        if (canonical := canonical_name(name)) in found:
            raise CheckpointError(f"the names of tensors must differ (two are {shown(canonical)})")
        found[canonical] = value
    return found


def canonical_name(name: str) -> str:
    """Return a name without the prefixes that wrappers add.

    Args:
        name: A name in a state dict.
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPED_NAMES)


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Return names as the model itself has them, without wrappers and ``module.`` in front of all, each with its own.

    Args:
        names: In a state dict.

    Example:
        >>> plain_names(["module.a", "module._orig_mod.b"])
        {'a': 'module.a', 'b': 'module._orig_mod.b'}
    """
    found = {canonical_name(name): name for name in names}
    while named_under(MODULE, found):
        found = {name.removeprefix(MODULE): given for name, given in found.items()}
    return found


def named_under(prefix: str, names: Iterable[Any]) -> bool:
    """Return whether there are names, and all of them begin with a prefix.

    Args:
        prefix: The prefix.
        names: The names.
    """
    given = list(names)
    return bool(given) and all(isinstance(name, str) and name.startswith(prefix) for name in given)


def under(prefix: str, content: Content) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, named as in the model: without it, and without ``module.``.

    Args:
        prefix: The prefix.
        content: A state dict.
    """
    inside = {
        name.removeprefix(prefix): value
        for name, value in content.items()
        if isinstance(name, str) and name.startswith(prefix)
    }
    return plain(tensors_of(inside))


def plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove ``module.``, which DDP and DataParallel put in front, from all names.

    Args:
        tensors: The tensors, by name.
    """
    found = dict(tensors)
    while named_under(MODULE, found):
        found = {name.removeprefix(MODULE): tensor for name, tensor in found.items()}
    return found


def like(tensors: Mapping[str, Tensor], model: Content) -> dict[str, Tensor]:
    """Remove ``module.`` from all names if otherwise the model has none of them.

    Args:
        tensors: The tensors, by name.
        model: The model's state dict.
    """
    return dict(tensors) if tensors.keys() & model.keys() else plain(tensors)

"""Which tensors of a model are averaged, copied or left, and why.

Names are canonical: what wrappers (``DataParallel``, ``DistributedDataParallel``, ``torch.compile``, activation
checkpointing) put in front of a name is dropped, so that a state saved under one of them loads under another.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn

from polyak.errors import MismatchError
from polyak.kernels import unchanged
from polyak.sharding import is_spread, local

# The wrappers that keep the wrapped module under a name that no one else uses, and those that need a look at the type.
_WRAPPED = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


class Policy(StrEnum):
    """What is done with a tensor of the model."""

    AVERAGE = "average"
    COPY = "copy"
    LEAVE = "leave"


@dataclass(frozen=True, slots=True)
class Slot:
    """A place in a model that holds a tensor. The tensor is looked up anew each time, since modules replace theirs.

    Args:
        name: Canonical name.
        owner: The module that holds it.
        attribute: Its name there.
        is_parameter: Whether it is a parameter, or else a buffer.
        persistent: Whether the model's state dict holds it.
    """

    name: str
    owner: nn.Module
    attribute: str
    is_parameter: bool
    persistent: bool = True

    @property
    def tensor(self) -> Tensor:
        """The tensor that is there now."""
        held = (self.owner._parameters if self.is_parameter else self.owner._buffers)[self.attribute]  # noqa: SLF001
        assert held is not None
        return held


def default_policy(slot: Slot) -> Policy:
    """Average trainable parameters and floating-point buffers, copy integer and bool buffers, leave the rest.

    The rest are frozen parameters, which are their own average, buffers that the state dict leaves out, which are
    caches, and sparse tensors.

    Args:
        slot: Where the tensor is.
    """
    tensor = slot.tensor
    if tensor.layout != torch.strided:
        return Policy.LEAVE
    numeric = tensor.is_floating_point() or tensor.is_complex()
    if slot.is_parameter:
        return Policy.AVERAGE if tensor.requires_grad and numeric else Policy.LEAVE
    if not slot.persistent:
        return Policy.LEAVE
    return Policy.AVERAGE if numeric else Policy.COPY


PolicyRule = Callable[[Slot], Policy]


def _is_wrapped(parent: nn.Module, child: str) -> bool:
    return child in _WRAPPED or (child == "module" and isinstance(parent, _PARALLEL))


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside its outermost wrappers.

    Args:
        model: Wrapped or not.
    """
    for name, child in model.named_children():
        if _is_wrapped(model, name):
            return unwrap(child)
    return model


def _modules(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    yield prefix, module
    for name, child in module.named_children():
        yield from _modules(child, prefix if _is_wrapped(module, name) else f"{prefix}{name}.")


def all_slots(model: nn.Module) -> Iterator[Slot]:
    """Yield every parameter and buffer under its canonical name, tied tensors under each of their names.

    Args:
        model: Wrapped or not.
    """
    for prefix, module in _modules(model, ""):
        for attribute, parameter in module._parameters.items():  # noqa: SLF001
            if parameter is not None:
                yield Slot(prefix + attribute, module, attribute, is_parameter=True)
        for attribute, buffer in module._buffers.items():  # noqa: SLF001
            if buffer is not None:
                persistent = attribute not in module._non_persistent_buffers_set  # noqa: SLF001
                yield Slot(prefix + attribute, module, attribute, is_parameter=False, persistent=persistent)


def slots(model: nn.Module) -> Iterator[Slot]:
    """Yield every parameter and buffer once, tied tensors under the first of their names.

    Args:
        model: Wrapped or not.

    Example:
        >>> [slot.name for slot in slots(nn.BatchNorm1d(2))]
        ['weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked']
    """
    seen = set[int]()
    for slot in all_slots(model):
        if id(slot.tensor) not in seen:
            seen.add(id(slot.tensor))
            yield slot


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer by canonical name, tied tensors under each of their names.

    Args:
        model: Wrapped or not.
    """
    return {slot.name: slot.tensor for slot in all_slots(model)}


class Inventory:
    """What a model holds, noted so that a look tells whether it still does, at 0.1 us a tensor (in C; else 2 us).

    It no longer does when a module, parameter or buffer was added, removed or replaced, when a tensor has moved or has
    another dtype or layout, and when a parameter that was frozen has become trainable.

    Args:
        model: Wrapped or not.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._dicts = self._held()
        found = [tensor for dict_ in self._dicts for tensor in dict_.values() if isinstance(tensor, Tensor)]
        self._spread = [tensor for tensor in found if is_spread(tensor)]
        self._parts = list(map(local, self._spread))
        here = [tensor for tensor in found if not is_spread(tensor) and tensor.layout == torch.strided]
        self._unchanged = unchanged(self._dicts, here + self._parts)
        self._frozen = [t for t in found if isinstance(t, nn.Parameter) and not t.requires_grad]

    def holds(self) -> bool:
        """Return whether the model still is as it was."""
        return (
            all(map(is_, self._held(), self._dicts))
            and self._unchanged()
            and all(map(is_, map(local, self._spread), self._parts))
            and not any(map(_TRAINABLE, self._frozen))
        )

    def _held(self) -> list[dict[str, Any]]:
        return list(chain.from_iterable(map(_HELD, self._modules)))


_HELD = attrgetter("_modules", "_parameters", "_buffers")
_TRAINABLE = attrgetter("requires_grad")


def check_match(what: str, expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> None:
    """Check that two sets of tensors have the same names and shapes.

    Args:
        what: What must hold, for the first line of the error.
        expected: One set.
        got: The other.

    Raises:
        MismatchError: If not; it lists every difference.
    """
    misshaped = {
        name: (tuple(expected[name].shape), tuple(got[name].shape))
        for name in expected.keys() & got.keys()
        if expected[name].shape != got[name].shape
    }
    if misshaped or expected.keys() != got.keys():
        missing, unexpected = expected.keys() - got.keys(), got.keys() - expected.keys()
        raise MismatchError(what, missing=missing, unexpected=unexpected, misshaped=misshaped)

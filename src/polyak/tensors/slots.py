"""Decides which tensors of a model are averaged, copied or left, and why.

Names are canonical, without the prefixes of wrappers (``DataParallel``, ``DistributedDataParallel``, ``torch.compile``,
activation checkpointing), so that a state saved under one wrapper loads under another.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from polyak.errors import ArgumentError, MismatchError
from polyak.sharding import ModelParts, Places, local
from polyak.tensors import memory, optimizers

# Names under which wrappers keep the wrapped module; no other module uses them. The parallel wrappers keep theirs under
# "module", which others use too.
WRAPPED_NAMES = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


class Policy(StrEnum):
    """What is done with a tensor of the model."""

    AVERAGE = "average"
    COPY = "copy"
    LEAVE = "leave"


@dataclass(frozen=True, slots=True)
class Slot:
    """A place in a model that holds a tensor. The tensor is read each time, since modules may replace it.

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
    def is_in_place(self) -> bool:
        """Whether the module still holds a tensor under this name."""
        held = self.owner._parameters if self.is_parameter else self.owner._buffers  # noqa: SLF001
        return self.attribute in held and held[self.attribute] is not None

    @property
    def tensor(self) -> Tensor:
        """The tensor that the module holds now."""
        held = (self.owner._parameters if self.is_parameter else self.owner._buffers)[self.attribute]  # noqa: SLF001
        assert held is not None
        return held


@dataclass(frozen=True, slots=True)
class Decision:
    """What averaging does with a tensor, and why.

    Args:
        policy: What.
        reason: Why, for people.
    """

    policy: Policy
    reason: str


def decide(slot: Slot) -> Decision:  # noqa: PLR0911  a table of rules
    """Return what averaging does with a tensor by default, and why. The first rule that applies decides.

    Args:
        slot: Where the tensor is.
    """
    tensor = slot.tensor
    trained = slot.is_parameter and (tensor.requires_grad or optimizers.is_moved(tensor))
    numeric = tensor.is_floating_point() or tensor.is_complex()
    if tensor.is_nested:
        return Decision(Policy.LEAVE, "a nested tensor")
    if tensor.layout != torch.strided:
        return Decision(Policy.LEAVE, f"its layout is {str(tensor.layout).removeprefix('torch.')}")
    if slot.is_parameter:
        if trained and numeric:
            return Decision(Policy.AVERAGE, "a parameter that is trained")
        return Decision(Policy.LEAVE, "a frozen parameter")
    if memory.is_wrapper(local(tensor)):
        return Decision(Policy.LEAVE, f"a {type(local(tensor)).__name__} keeps its values in inner tensors")
    if not slot.persistent:
        return Decision(Policy.LEAVE, "a buffer that the state dict leaves out: a cache")
    if tensor.is_quantized:
        return Decision(Policy.LEAVE, "a quantized buffer")
    if is_statistic(slot):
        return Decision(Policy.AVERAGE, "a running statistic")
    return Decision(Policy.COPY, "a buffer that is no running statistic: its last value counts")


def is_statistic(slot: Slot) -> bool:
    """Return whether a buffer is a running statistic by its name, such as BatchNorm's, and not a count.

    Args:
        slot: Where the tensor is.
    """
    counts = ("count", "num", "steps", "batches", "tracked")
    numeric = slot.tensor.is_floating_point() or slot.tensor.is_complex()
    return numeric and slot.attribute.startswith("running_") and not slot.attribute.endswith(counts)


def default_policy(slot: Slot) -> Policy:
    """Average trained parameters and running statistics, copy all other buffers, leave the rest.

    A parameter is trained if it requires a gradient or an optimizer of torch's has moved it. A running statistic is a
    floating-point buffer named ``running_...``, as in BatchNorm; the average of another buffer, such as a mask, a scale
    or the vectors of a spectral norm, would be a value that no model ever had. The rest are frozen parameters, which
    equal their average, buffers outside the state dict, which are caches, and sparse and quantized tensors.

    Args:
        slot: Where the tensor is.
    """
    return decide(slot).policy


PolicyRule = Callable[[Slot], Policy]


def decided(policy: PolicyRule, slot: Slot) -> Policy:
    """Return what a policy decides for a tensor.

    Args:
        policy: A policy of polyak or of a user.
        slot: Where the tensor is.

    Raises:
        ArgumentError: If the policy returns anything else than a ``Policy``, or the text of one.
    """
    found = policy(slot)
    if isinstance(found, Policy):
        return found
    try:
        return Policy(found)
    except ValueError:
        raise ArgumentError(
            f"policy must return a Policy for each tensor (got {found!r} for {slot.name!r}); return Policy.AVERAGE, "
            "Policy.COPY or Policy.LEAVE"
        ) from None


def _is_wrapped(parent: nn.Module, child: str) -> bool:
    if child in WRAPPED_NAMES or isinstance(parent, ModelParts):
        return True
    return child == "module" and isinstance(parent, _PARALLEL)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside its outermost wrappers; ``ModelParts`` are not unwrapped.

    Args:
        model: Wrapped or not.
    """
    if isinstance(model, ModelParts):
        return model
    for name, child in model.named_children():
        if _is_wrapped(model, name):
            return unwrap(child)
    return model


def _modules(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    yield prefix, module
    # Not `named_children`, which names a module that is registered twice, as in `ModuleList([layer] * 12)`, only once.
    for name, child in module._modules.items():  # noqa: SLF001
        if child is not None:
            yield from _modules(child, prefix if _is_wrapped(module, name) else f"{prefix}{name}.")


def own_attribute(module: nn.Module, name: str) -> Any:
    """Return an attribute that a module or its class has; None for one that only its ``__getattr__`` would return.

    Args:
        module: Any module.
        name: The name of the attribute.
    """
    return getattr(module, name) if name in vars(module) or hasattr(type(module), name) else None


def places_of(model: nn.Module) -> Places:
    """Return the places in the full model of a model's tensors, where ranks hold different experts.

    Args:
        model: Wrapped or not.
    """
    return Places(_modules(model, ""))


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


def extra_states(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield what modules add to a state dict with ``get_extra_state``, under its canonical name.

    Args:
        model: Wrapped or not.
    """
    for prefix, module in _modules(model, ""):
        own = type(module).get_extra_state is not nn.Module.get_extra_state
        if own and not isinstance(module, torch.jit.ScriptModule):
            yield f"{prefix}_extra_state", module.get_extra_state()


def slots(model: nn.Module, *, views: bool = False, foreign: Sequence[Tensor] = ()) -> Iterator[Slot]:
    """Yield every parameter and buffer once, and memory that several tensors share under the tensor that owns it.

    Tied tensors have the first of their names. A tensor inside the memory of another one is left out.

    Args:
        model: Wrapped or not.
        views: Whether to yield also the tensors with another layout than their owner: rows of it, or its transpose.
        foreign: Local tensors that are not the model's; tensors that share their memory are left out.

    Raises:
        MemoryLayoutError: If two tensors overlap in part.

    Example:
        >>> [slot.name for slot in slots(nn.BatchNorm1d(2))]
        ['weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked']
    """
    listed, owner = _owned(model, foreign)
    for slot, own in zip(listed, owner, strict=True):
        if own is slot or (views and own is not None and not _is_tied(slot.tensor, own.tensor)):
            yield slot


def views_of(model: nn.Module, *, tied: bool = False) -> dict[str, tuple[Slot, Slot]]:
    """Return by name the slots that ``slots`` does not yield, each after the slot that owns its memory.

    Args:
        model: Wrapped or not.
        tied: Whether to return only those with the layout of their owner.
    """
    listed, owner = _owned(model, ())
    by_id = {id(slot.tensor): own for slot, own in zip(listed, owner, strict=True)}
    found = ((slot, by_id[id(slot.tensor)]) for slot in all_slots(model))
    return {
        slot.name: (own, slot)
        for slot, own in found
        if own is not None and own.name != slot.name and not (tied and not _is_tied(slot.tensor, own.tensor))
    }


def trained_through(views: Mapping[str, tuple[Slot, Slot]], policy: PolicyRule) -> set[str]:
    """Return the names of tensors that are averaged because a tensor that shares their memory is.

    Args:
        views: As ``views_of`` returns them.
        policy: What is done with which tensor.
    """
    return {own.name for own, slot in views.values() if slot.is_parameter and decided(policy, slot) is Policy.AVERAGE}


def _owned(model: nn.Module, foreign: Sequence[Tensor]) -> tuple[list[Slot], list[Slot | None]]:
    """Return each tensor of a model once, and the slot that owns its memory; None where that is foreign."""
    once = dict[int, Slot]()
    for slot in all_slots(model):
        once.setdefault(id(slot.tensor), slot)
    listed = list(once.values())
    tensors = [*foreign, *(local(slot.tensor) for slot in listed)]
    names = ["an average"] * len(foreign) + [slot.name for slot in listed]
    rank = [-1] * len(foreign) + [0 if slot.is_parameter else 1 for slot in listed]
    owner = memory.owners(tensors, names, rank)[len(foreign) :]
    return listed, [listed[i - len(foreign)] if i >= len(foreign) else None for i in owner]


def _is_tied(one: Tensor, other: Tensor) -> bool:
    one, other = local(one), local(other)
    same_bits = one.dtype == other.dtype and one.is_conj() == other.is_conj() and one.is_neg() == other.is_neg()
    return same_bits and one.shape == other.shape and one.stride() == other.stride()


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer by canonical name, tied tensors under each of their names.

    Args:
        model: Wrapped or not.
    """
    return {slot.name: slot.tensor for slot in all_slots(model)}


def rescaled_in_forward(model: nn.Module) -> set[int]:
    """Return the ids of the weights that forward passes rescale in place, in eval mode too: embeddings with a norm.

    Args:
        model: Wrapped or not.
    """
    embeddings = (m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag))
    # Not the attribute, which a parametrization computes.
    return {id(one._parameters.get("weight")) for one in embeddings if one.max_norm is not None}  # noqa: SLF001


def averaged_parameters(model: nn.Module, policy: PolicyRule) -> list[Slot]:
    """Return the parameters that are averaged.

    Args:
        model: Wrapped or not.
        policy: What is done with which tensor.
    """
    through = trained_through(views_of(model), policy)
    found = (slot for slot in slots(model) if slot.is_parameter)
    return [slot for slot in found if slot.name in through or decided(policy, slot) is Policy.AVERAGE]


def check_ties(what: str, model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Check that each tensor of a model that has several names is to get one value.

    Args:
        what: Which tensors must have one value, for the error.
        model: That is to be written to.
        values: By name, as for ``check_match``.

    Raises:
        ArgumentError: If two of its names have different values.
    """
    for name, (own, _) in views_of(model, tied=True).items():
        one, other = local(values[own.name]), local(values[name])
        if one is not other and not torch.equal(one, other.to(one.device)):
            raise ArgumentError(
                f"{what} must have one value (got two for {own.name!r} and {name!r}, which share memory, and not in "
                "the model that is read); tie them in both models, or in none"
            )


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

"""Creates averages of tensors: checks which tensors can have one, and chooses dtype and device."""

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from polyak import sharding
from polyak.averaging.settings import Settings
from polyak.errors import DtypeError, MemoryLayoutError
from polyak.kernels import Place
from polyak.sharding import local, rows
from polyak.tensors import memory
from polyak.tensors.slots import Policy, Slot

_DTYPES = {torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.complex128}


def new_average(slot: Slot, policy: Policy, settings: Settings, dtype: torch.dtype | None) -> Tensor:
    """Return an average that begins with the tensor's value.

    Args:
        slot: The tensor's place in the model.
        policy: Whether it is averaged or copied.
        settings: How averages are kept.
        dtype: The dtype of a saved average; None for that of a new one.

    Raises:
        DtypeError: If the dtype cannot hold the value.
    """
    tensor = slot.tensor
    dtype = dtype or dtype_of(tensor, policy, settings)
    if settings.mesh is not None and slot.is_parameter and tensor.dim():
        average = sharding.divided(tensor, dtype, settings.mesh, settings.device)
        _check_range(slot.name, local(average), rows(tensor, average))
        return average
    shard = local(tensor).detach().as_subclass(Tensor)
    copy = torch.empty_like(shard, dtype=dtype, device=settings.device, requires_grad=False).copy_(shard)
    _check_range(slot.name, copy, shard)
    return sharding.beside(tensor, copy)


def dtype_of(tensor: Tensor, policy: Policy, settings: Settings) -> torch.dtype:
    """Return the dtype of a tensor's average: at least float32 unless the settings say otherwise.

    Args:
        tensor: The model's tensor.
        policy: Whether it is averaged or copied. Copies are exact.
        settings: How averages are kept.
    """
    dtype = tensor.dtype
    if dtype not in _DTYPES or not dtype.is_floating_point:
        return dtype
    wide = settings.dtype or torch.promote_types(dtype, torch.float32)
    return torch.promote_types(dtype, wide) if policy is Policy.COPY else wide


def _check_range(name: str, average: Tensor, tensor: Tensor) -> None:
    """Refuse an average that would begin with inf where the model's value is finite."""
    dtype = average.dtype
    if not dtype.is_floating_point or torch.finfo(dtype).max >= torch.finfo(tensor.dtype).max:
        return
    if bool((average.isinf() & tensor.isfinite().to(average.device)).any()):
        raise DtypeError(
            f"values must be at most {torch.finfo(dtype).max:g} to be averaged in {dtype} (got "
            f"{float(tensor.abs().max()):g} in {name!r}): use a dtype with a wider range, or None for the model's"
        )


def check_layout(slot: Slot, policy: Policy) -> None:
    """Check that a tensor can be averaged or copied, and swapped.

    Args:
        slot: The tensor's place in the model.
        policy: Whether it is averaged or copied.

    Raises:
        MemoryLayoutError: If its class, dtype or layout does not allow it.
        ValueError: If it is sparse.
    """
    tensor = local(slot.tensor)
    if slot.tensor.layout != torch.strided:
        raise ValueError(
            f"only strided tensors can be averaged or copied (got {policy!r} for {slot.name!r}, one of "
            f"{slot.tensor.layout}): the policy must leave it"
        )
    remedy = "freeze it, or leave it out by EMA(policy=...)"
    if memory.is_wrapper(tensor):
        raise MemoryLayoutError(
            f"an averaged tensor must have its own memory, and {slot.name!r} is a {type(tensor).__name__}, which keeps "
            f"its values in inner tensors; {remedy}"
        )
    if policy is Policy.AVERAGE and tensor.dtype not in _DTYPES:
        known = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in _DTYPES))
        raise MemoryLayoutError(
            f"an averaged tensor must be one of {known} ({slot.name!r} has {tensor.dtype}); {remedy}"
        )
    if memory.has_memory(tensor) and memory.overlaps_itself(memory.compact(tensor)):
        raise MemoryLayoutError(
            f"the elements of an averaged or copied tensor must not share memory, and some of {slot.name!r} do (shape "
            f"{tuple(tensor.shape)}, strides {tensor.stride()}); register a .clone() of it, or {remedy}"
        )


def check_memory(averages: Mapping[str, Tensor]) -> None:
    """Check that the averages still have their memory, since others may hold tensors over it, and resize them.

    Args:
        averages: The averages by name.

    Raises:
        MemoryLayoutError: If the memory of one has shrunk.
    """
    for name, average in averages.items():
        shard = local(average)
        size = sum(stride * (n - 1) for n, stride in zip(shard.shape, shard.stride(), strict=True)) + 1
        if shard.numel() and shard.untyped_storage().nbytes() < (shard.storage_offset() + size) * shard.element_size():
            raise MemoryLayoutError(
                f"an average must keep its memory, and that of {name!r} has shrunk to "
                f"{shard.untyped_storage().nbytes()} bytes: do not resize what state_dict() gave, and load a state"
            )


def place_of(name: str, average: Tensor) -> Place:
    """Return what the stochastic rounding of an average depends on: its name, and the place of its shard.

    Args:
        name: Its canonical name.
        average: Sharded or not.
    """
    seed, offset = zlib.crc32(name.encode()), sharding.offset(average)
    return Place(seed) if offset is None else Place(seed, tuple(average.shape), offset)

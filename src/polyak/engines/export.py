"""The average of masters as safetensors, under the model's names and in its shapes and dtypes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyak.averaging.ema import EMA
from polyak.engines.masters import Masters
from polyak.errors import ArgumentError
from polyak.export import Read, export_from, shards
from polyak.sharding import communicator_of
from polyak.sharding.fragments import Fragment
from polyak.tensors.slots import all_slots


def check_dtype(dtype: torch.dtype | None) -> None:
    """Check that averages can be written in a dtype.

    Args:
        dtype: As given; None for the model's own.

    Raises:
        ArgumentError: If it is not a floating-point dtype.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ArgumentError(f"dtype must be a floating-point dtype (got {dtype}); use None for the model's own")


def save_average(ema: EMA, masters: Masters, path: Path, dtype: torch.dtype | None, *, overwrite: bool) -> None:
    """Write the model with its averaged weights. All ranks must call this; no rank holds the full model.

    Args:
        ema: The EMA of the masters; it has begun.
        masters: The masters of the model.
        path: A file whose name ends in ``.safetensors``, or a folder.
        dtype: Of what is averaged; None for the model's own.
        overwrite: Whether an earlier export is replaced.

    Raises:
        ArgumentError: If ``dtype`` is not a floating-point dtype.
    """
    check_dtype(dtype)
    ranks = communicator_of(masters)
    saved, names = _saved(ema, masters)
    outputs, flat = dict[str, Tensor](), dict[str, Tensor]()
    for slot in all_slots(masters.model):
        if slot.persistent:
            tensor, name = slot.tensor, names[slot.name]
            averaged = name in masters.names and dtype is not None
            shape = getattr(tensor, "ds_shape", tensor.shape)
            outputs[slot.name] = torch.empty(shape, dtype=dtype if averaged else tensor.dtype, device="meta")
            flat[name] = torch.empty(
                outputs[slot.name].numel(), dtype=_dtype(ema, masters, name, tensor), device="meta"
            )

    def source(folder: Path) -> Read:
        read = shards(saved, flat, folder, ranks)

        def full(wanted: list[str]) -> dict[str, Tensor]:
            found = read(list(dict.fromkeys(names[name] for name in wanted)))
            return {n: found[names[n]].view(outputs[n].shape).to(outputs[n].dtype) for n in wanted}

        return full

    export_from(ema, masters.model, outputs, source, path, ranks, overwrite=overwrite)


def _saved(ema: EMA, masters: Masters) -> tuple[Mapping[str, Any], Mapping[str, str]]:
    """Return fragments of everything that is exported, and for each name the one that it is saved under."""
    assert ema._average.shadow is not None  # noqa: SLF001
    averages = ema._average.shadow.averaged_tensors()  # noqa: SLF001
    saved, names, first = dict[str, Fragment](), dict[str, str](), dict[int, str]()
    for slot in all_slots(masters.model):
        if not slot.persistent:
            continue
        tensor = slot.tensor.detach()
        name = names[slot.name] = first.setdefault(id(slot.tensor), slot.name)
        if name in masters.names:
            if name in averages:
                saved[name] = Fragment.of(averages[name], *masters.places[name])
        elif hasattr(slot.tensor, "ds_id"):
            divided: Any = slot.tensor  # by ZeRO-3, and frozen
            part = divided.ds_tensor.detach()
            offset = part.numel() * torch.distributed.get_rank(divided.ds_process_group)
            own = min(max(divided.ds_numel - offset, 0), part.numel())
            if own:
                saved[name] = Fragment.of(part.view(-1)[:own], offset, divided.ds_numel)
        else:
            tensor = averages.get(name, tensor).reshape(-1)
            saved[name] = Fragment.of(tensor, 0, tensor.numel())
    return saved, names


def _dtype(ema: EMA, masters: Masters, name: str, tensor: Tensor) -> torch.dtype:
    """Return the dtype in which a tensor is saved, also where this rank has no part of it."""
    shadow = ema._average.shadow  # noqa: SLF001
    average = None if shadow is None else shadow.averaged_tensors().get(name)
    if average is not None:
        return average.dtype
    return ema._average.settings.dtype or torch.float32 if name in masters.names else tensor.dtype  # noqa: SLF001

"""The average of Megatron's masters as safetensors, under the names and in the shapes of the full model."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyak.averaging.ema import EMA
from polyak.engines.export import check_dtype
from polyak.engines.megatron_masters import MegatronMasters
from polyak.export import Read, export_from, shards
from polyak.sharding import communicator_of
from polyak.tensors.slots import all_slots


def save_average(ema: EMA, masters: MegatronMasters, path: Path, dtype: torch.dtype | None, *, overwrite: bool) -> None:
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
    assert ema._average.shadow is not None  # noqa: SLF001
    averages = ema._average.shadow.averaged_tensors()  # noqa: SLF001
    wide = ema._average.settings.dtype or torch.float32  # noqa: SLF001
    saved, own, first = dict[str, Tensor](), dict[str, Any](), dict[int, str]()
    for slot in all_slots(masters.model):
        if slot.name not in masters.layout:
            continue
        name = first.setdefault(id(slot.tensor), slot.name)  # of several that share one tensor
        averaged = name in masters.names
        if name in averages or not averaged:
            saved[name] = masters.fragment(name, averages.get(name, slot.tensor))
        stored = wide if averaged else averages.get(name, slot.tensor).dtype
        written = dtype or slot.tensor.dtype if averaged else slot.tensor.dtype
        own[slot.name] = name, tuple(masters.layout[name].shape), stored, written
    facts = ranks.union(own)  # other stages of a pipeline have other names
    empty = {n: torch.empty(shape, dtype=written, device="meta") for n, (_, shape, _, written) in facts.items()}
    full = {n: torch.empty(shape, dtype=stored, device="meta") for n, shape, stored, _ in facts.values()}

    def source(folder: Path) -> Read:
        read = shards(saved, full, folder, ranks)

        def named(wanted: list[str]) -> dict[str, Tensor]:
            found = read(list(dict.fromkeys(facts[name][0] for name in wanted)))
            return {name: found[facts[name][0]].to(empty[name].dtype) for name in wanted}

        return named

    export_from(ema, masters.model, empty, source, path, ranks, overwrite=overwrite)

"""The average as safetensors under the names of torchtitan's checkpoints, or those of Hugging Face."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyak.averaging.ema import EMA
from polyak.errors import ArgumentError
from polyak.export import Read, export_from, shards, swapped_in
from polyak.sharding import Ranks, communicator_of, is_sharded, pipeline_communicator_of
from polyak.tensors.slots import unwrap


def save_average(ema: EMA, trainer: Any, model: Any, path: Path, *, overwrite: bool, hf: bool) -> None:
    """Write the averaged weights of all stages. All ranks must call this; no rank holds the full model.

    torchtitan splits fused projections when it takes a state dict, so that the names are not those of the parameters.

    Args:
        ema: The EMA of the model; it has begun.
        trainer: torchtitan's trainer.
        model: All of it that this rank trains.
        path: A file whose name ends in ``.safetensors``, or a folder.
        overwrite: Whether an earlier export is replaced.
        hf: Whether to write Hugging Face's names and layouts.

    Raises:
        ArgumentError: If the model has no adapter to Hugging Face's names.
    """
    adapter = _adapter(trainer) if hf else None
    stage = communicator_of(model)
    ranks = pipeline_communicator_of(model, stage) or stage
    with swapped_in(ema, model):
        tensors = dict[str, Tensor]()
        for part in trainer.model_parts:
            tensors |= part.state_dict()
        if adapter is not None:
            tensors = adapter.to_hf(tensors)
        tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        infos: dict[str, Any] = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
        if isinstance(ranks, Ranks):
            infos = ranks.union(infos)
        outputs = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in infos.items()}
        together = any(map(is_sharded, tensors.values())) or stage is not ranks

        def own(names: list[str]) -> dict[str, Tensor]:
            return {name: tensors[name] for name in names}

        def source(folder: Path) -> Read:
            return shards(tensors, outputs, folder, ranks) if together else own

        export_from(ema, unwrap(model), outputs, source, path, ranks, overwrite=overwrite)


def _adapter(trainer: Any) -> Any:
    spec = trainer.config.model_spec
    if spec.state_dict_adapter is None:
        raise ArgumentError(
            f"a model must have an adapter to be saved in Hugging Face's names (got {spec.name}, which has none in "
            "torchtitan); leave out hf=True"
        )
    return spec.state_dict_adapter(trainer.model_config, trainer.config.hf_assets_path)

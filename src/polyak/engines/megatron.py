"""The float32 masters of Megatron's optimizers: where they are, and how the model's weights follow them.

What an optimizer of Megatron does at the end of a step is done here after a swap, so that the next forward pass
computes with the average. Names and layouts are those of megatron-core 0.16.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from polyak.engines.masters import Master
from polyak.engines.megatron_layout import Place, inside, places_of_chunk
from polyak.engines.megatron_masters import MegatronMasters, MegatronRanks
from polyak.errors import ArgumentError, OptimizerError
from polyak.sharding import OneProcess
from polyak.sharding.groups import device_of, group_of


def masters_of(model: Any, optimizer: Any) -> MegatronMasters:
    """Return the masters of Megatron's optimizer as a module. All ranks must call this.

    Args:
        model: A chunk of the model, or a list of chunks, in Megatron's ``DistributedDataParallel``.
        optimizer: As ``get_megatron_optimizer`` returned it.

    Raises:
        ArgumentError: If these are none of Megatron's.
        OptimizerError: If the masters cannot be averaged; it says why, and what to use instead.
        ShardingError: If another rank refuses.
    """
    chunks = list(model) if isinstance(model, (list, tuple, nn.ModuleList)) else [model]
    _refuse_others(chunks, optimizer)
    ranks = _ranks(chunks)
    return (ranks or OneProcess()).on_every_rank("attaching", lambda: _masters(chunks, optimizer, ranks))


def _masters(chunks: Sequence[Any], optimizer: Any, ranks: MegatronRanks | None) -> MegatronMasters:
    parts = list(_parts(optimizer))
    _refuse(chunks, parts)
    found = [place for chunk in chunks for place in places_of_chunk(chunk)]
    places = {place.name: place for place in found}
    if twice := [place.name for place in found if places[place.name].tensor is not place.tensor]:
        raise OptimizerError(
            f"each tensor must have one name in the full model (got {twice[:5]} twice on a rank); give "
            "sharded_state_dict() of the model other keys"
        )
    parts_of = {key: part for part in parts for key in _find(part)}
    if missing := [n for n, p in places.items() if p.tensor.requires_grad and id(p.tensor) not in parts_of]:
        raise OptimizerError(
            f"the optimizer must step all parameters that are trained (it has no masters of {', '.join(missing[:5])}); "
            "give get_megatron_optimizer all chunks of the model, and attach those"
        )
    if ranks is not None:
        elsewhere = (name for name, place in places.items() if any(_replica(place, parts_of.get(id(place.tensor)))))
        ranks = replace(ranks, saved_elsewhere=frozenset(elsewhere))

    def find() -> Mapping[int, Master]:
        return {key: master for part in parts for key, master in _find(part).items()}

    return MegatronMasters(places, chunks, find, lambda: _publish(parts, chunks), ranks)


def _replica(place: Place, part: Any) -> tuple[int, ...]:
    """Return the number of a tensor among its replicas; 0 in all places on the rank that saves it."""
    divided = part is not None and _kind(part) == "DistributedOptimizer"
    return (*place.replica[:-1], part.distributed_optimizer_instance_id) if divided else place.replica


def _ranks(chunks: Sequence[Any]) -> MegatronRanks | None:
    """Return the ranks of the model: along the groups of data, tensor and pipeline parallelism."""
    found = dict.fromkeys(
        group
        for chunk in chunks
        for one in (chunk.dp_cp_group, chunk.tp_group, chunk.pp_group)
        for group in (one if isinstance(one, list) else [one])
        if group is not None
    )
    group = group_of(found, [])
    if group is None or group.size() == 1:
        return None
    return MegatronRanks(group, device_of(group), replicas=False, differ=True)


# What is refused


def _refuse_others(chunks: Sequence[Any], optimizer: Any) -> None:
    others = [type(chunk).__name__ for chunk in chunks if not _is_megatrons(chunk, "DistributedDataParallel")]
    if not chunks or others:
        hint = "train without FSDP, with the distributed optimizer, to divide the masters"
        raise ArgumentError(
            "the model must be one or more chunks in megatron.core.distributed.DistributedDataParallel (got "
            f"{others or 'none'}); {hint if any('Fully' in name for name in others) else 'give what is trained'}"
        )
    if not _is_megatrons(optimizer, "MegatronOptimizer"):
        raise ArgumentError(
            f"the optimizer must be what get_megatron_optimizer returned (got {type(optimizer).__name__}); call "
            "attach(EMA(...), model, optimizer)"
        )


def _is_megatrons(thing: Any, name: str) -> bool:
    return any(cls.__name__ == name and cls.__module__.startswith("megatron.") for cls in type(thing).__mro__)


def _refuse(chunks: Sequence[Any], parts: Sequence[Any]) -> None:
    configs = [part.config for part in parts]
    layouts = [chunk.ddp_config for chunk in chunks]
    plain = all(type(p) in {nn.Parameter, Tensor} for chunk in chunks for p in inside(chunk).parameters())
    reasons = {
        "Megatron-FSDP": any(one.use_megatron_fsdp for one in layouts),
        "use_precision_aware_optimizer, which keeps masters in TransformerEngine": any(
            one.use_precision_aware_optimizer for one in configs
        ),
        "optimizer_cpu_offload, which steps copies of the masters": any(one.optimizer_cpu_offload for one in configs),
        "parameters in fp8 or fp4": not plain or any(one.reuse_grad_buf_for_mxfp8_param_ag for one in layouts),
        **{kind: kind not in _MASTERS for kind in map(_kind, parts)},
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        raise OptimizerError(
            f"the masters must be in memory, in float32, to be averaged (got {'; '.join(found)}); turn "
            f"that off, and train with one of {', '.join(_MASTERS)}"
        )


def _parts(optimizer: Any) -> Iterator[Any]:
    """Return the optimizers of a chain, without those that have no parameters on this rank."""
    if _kind(optimizer) == "ChainedOptimizer":
        for part in optimizer.chained_optimizers:
            yield from _parts(part)
    elif not getattr(optimizer, "is_stub_optimizer", False):
        yield optimizer


def _kind(optimizer: Any) -> str:
    return type(optimizer).__name__


# Where the masters are


def _find(part: Any) -> dict[int, Master]:
    return {id(parameter): master for parameter, master in _MASTERS[_kind(part)](part)}


def _of_distributed(part: Any) -> Iterator[tuple[Tensor, Master]]:
    """Each rank has a part of a buffer that holds many parameters, one after the other."""
    own = set[int]()
    for parameters, masters in (
        (part.model_float16_groups, part.shard_fp32_from_float16_groups),
        (part.model_fp32_groups, part.shard_fp32_groups),
    ):
        for group, shards in zip(parameters, masters, strict=True):
            for parameter, shard in zip(group, shards, strict=True):
                own.add(id(parameter))
                start = part._get_model_param_range_map(parameter)["param"].start  # noqa: SLF001
                yield parameter, Master(shard.detach(), start, parameter.numel())
    for buffer in part.buffers:
        for parameter in buffer.params:
            if id(parameter) not in own:  # all of it is on other ranks
                yield parameter, Master(parameter.detach().view(-1)[:0].float(), 0, parameter.numel())


def _of_float16(part: Any) -> Iterator[tuple[Tensor, Master]]:
    """Every rank has all masters."""
    for group, masters in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
        for parameter, master in zip(group, masters, strict=True):
            yield parameter, _whole(master)
    for group in part.fp32_from_fp32_groups:
        for parameter in group:
            yield parameter, _whole(parameter)


def _of_float32(part: Any) -> Iterator[tuple[Tensor, Master]]:
    """The parameters are their own masters."""
    for parameter in part.get_parameters():
        yield parameter, _whole(parameter)


def _whole(master: Tensor) -> Master:
    return Master(master.detach().view(-1), 0, master.numel())


_MASTERS: Mapping[str, Callable[[Any], Iterator[tuple[Tensor, Master]]]] = {
    "DistributedOptimizer": _of_distributed,
    "Float16OptimizerWithFloat16Params": _of_float16,
    "FP32Optimizer": _of_float32,
}


@torch.no_grad()
def _publish(parts: Sequence[Any], chunks: Sequence[Any]) -> None:
    """Copy the masters to the weights of this rank, and gather those of the others, as after a step."""
    gathered = [chunk for chunk in chunks if chunk.ddp_config.use_distributed_optimizer]
    buckets = [bucket for chunk in gathered for bucket in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups)]
    for bucket in buckets:
        # One that is on its way has weights from before the swap, and `start_param_sync` would only wait for it.
        if bucket.param_gather_handle is not None:
            bucket.start_param_sync(force_sync=True)
    for part in parts:
        if hasattr(part, "_copy_main_params_to_model_params"):
            part._copy_main_params_to_model_params()  # noqa: SLF001
    for chunk in gathered:
        chunk.start_param_sync(force_sync=True)

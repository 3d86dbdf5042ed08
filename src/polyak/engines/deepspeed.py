"""The float32 masters of DeepSpeed's engine: where they are, and how the model's weights follow them.

What each optimizer of DeepSpeed does at the end of a step is done here after a swap, so that the next forward pass
computes with the average. Names and layouts are those of DeepSpeed 0.19.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from polyak.engines.masters import Master, Masters
from polyak.errors import ArgumentError, OptimizerError
from polyak.sharding import Ranks
from polyak.sharding.fragments import FragmentRanks
from polyak.sharding.groups import device_of

_Found = Iterator[tuple[Tensor, Master]]


def masters_of(engine: Any) -> Masters:
    """Return the masters of an engine's optimizer as a module.

    Args:
        engine: What ``deepspeed.initialize`` returned first.

    Raises:
        ArgumentError: If it is not an engine of DeepSpeed.
        OptimizerError: If its masters cannot be averaged; it says why, and what to use instead.
    """
    _refuse(engine)
    find, publish, replicas = _kind(engine.optimizer)
    group = torch.distributed.group.WORLD if torch.distributed.is_initialized() else None
    ranks = None
    if group is not None and group.size() > 1:
        ranks = (Ranks if replicas else FragmentRanks)(group, device_of(group), replicas)

    def found() -> Mapping[int, Master]:
        return {id(parameter): master for parameter, master in find(engine.optimizer)}

    def publish_weights() -> None:
        publish(engine.optimizer)

    return Masters(engine.module, found, publish_weights, ranks, _gathered)


def _refuse(engine: Any) -> None:
    names = {cls.__name__ for cls in type(engine).__mro__}
    if "DeepSpeedEngine" not in names:
        raise ArgumentError(
            "the engine must be what deepspeed.initialize returned first, or the model as Accelerate prepared it (got "
            f"{type(engine).__name__}); call attach(EMA(...), engine), or give the prepared model"
        )
    optimizer = getattr(engine, "optimizer", None)
    reasons = {
        "PipelineEngine, whose stages hold other parts of the model": "PipelineEngine" in names,
        "DeepSpeedHybridEngine": "DeepSpeedHybridEngine" in names,
        "experts (MoE layers), which differ by rank": engine.has_moe_layers,
        "tensor parallelism (autotp_size)": engine.autotp_size() > 1,
        "ZenFlow, which steps in the background": bool(engine.zenflow),
        "SuperOffload": engine.super_offload(),
        "MiCS": "MiCS" in type(optimizer).__name__,
        "masters on NVMe (offload_optimizer or offload_param to nvme)": getattr(optimizer, "swap_optimizer", False)
        or getattr(optimizer, "params_in_nvme_and_cpu", False),
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        raise OptimizerError(
            f"the masters must be in memory, divided over all ranks, to be averaged (got {'; '.join(found)}); train "
            "with ZeRO stage 0 to 3, with or without offload to the CPU"
        )


def _kind(optimizer: Any) -> tuple[Callable[[Any], _Found], Callable[[Any], object], bool]:
    """Return how to find an optimizer's masters, how weights follow them, and whether every rank has all of them."""
    for cls in type(optimizer).__mro__:
        if cls.__name__ in _KINDS:
            return _KINDS[cls.__name__]
    if isinstance(optimizer, Optimizer):
        return _own, _nothing, True
    raise OptimizerError(
        f"the optimizer must be one of DeepSpeed's with masters ({', '.join(_KINDS)}) or one of torch's (got "
        f"{type(optimizer).__name__}); give deepspeed.initialize an optimizer"
    )


@contextmanager
def _gathered(tensor: Tensor) -> Iterator[Tensor]:
    """Gather a parameter that ZeRO-3 has partitioned; anything else is full already. All ranks must call this."""
    if not hasattr(tensor, "ds_id"):
        yield tensor
        return
    from deepspeed import zero  # noqa: PLC0415  such a parameter exists only where it is imported

    with zero.GatheredParameters([tensor]):
        yield tensor.data


# ZeRO-3: each rank has as many elements of each parameter, the last ranks fewer.


def _of_stage_3(optimizer: Any) -> _Found:
    for group in optimizer.fp16_groups:
        for parameter in group:
            number, start, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
            offset = padded * optimizer._get_param_partition_rank(parameter)  # noqa: SLF001
            own = min(max(parameter.ds_numel - offset, 0), padded)
            flat = optimizer.fp32_partitioned_groups_flat[number].detach()
            yield parameter, Master(flat.narrow(0, start, own), offset, parameter.ds_numel)


def _publish_stage_3(optimizer: Any) -> None:
    """Do what follows a step: discard what was gathered from the weights before."""
    optimizer._partition_all_parameters()  # noqa: SLF001
    for number in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(number)  # noqa: SLF001
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    optimizer.invalidate_secondary_tensor()


# ZeRO-1 and 2, and bf16 with float32 gradients: parameters are in one flat buffer, of which each rank has a part.


def _of_fragments(optimizer: Any) -> _Found:
    groups = getattr(optimizer, "bit16_groups", None) or optimizer.bf16_groups
    for group in groups:
        for parameter in group:
            mapping = parameter._hp_mapping  # noqa: SLF001
            if mapping is None:  # all of it is on other ranks
                yield parameter, Master(parameter.detach().view(-1)[:0], 0, parameter.numel())
            elif mapping.hp_fragment is not None:  # or the engine has offloaded it
                fragment = mapping.hp_fragment.detach()
                yield parameter, Master(fragment, mapping.lp_fragment_address.start, parameter.numel())


def _publish_fragments(optimizer: Any) -> None:
    optimizer.update_lp_params()


# Without ZeRO: every rank has the masters of all parameters.


def _of_fused(optimizer: Any) -> _Found:
    for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True):
        start = 0
        for parameter in group:
            yield parameter, Master(flat.detach().narrow(0, start, parameter.numel()), 0, parameter.numel())
            start += parameter.numel()


def _of_unfused(optimizer: Any) -> _Found:
    for group, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        for parameter, master in zip(group, masters, strict=True):
            yield parameter, _whole(master)


def _own(optimizer: Any) -> _Found:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad:
                yield parameter, _whole(parameter)


def _whole(master: Tensor) -> Master:
    if not master.is_contiguous():
        raise OptimizerError(
            f"a master must be contiguous to be averaged (got strides {master.stride()} of shape {tuple(master.shape)}"
            "); give the model its channels_last format after deepspeed.initialize, or use ZeRO"
        )
    return Master(master.detach().view(-1), 0, master.numel())


def _publish_fused(optimizer: Any) -> None:
    for parameter, master in _of_fused(optimizer):
        _copy(parameter, master)


def _publish_unfused(optimizer: Any) -> None:
    for parameter, master in _of_unfused(optimizer):
        _copy(parameter, master)


def _copy(parameter: Tensor, master: Master) -> None:
    parameter.data.copy_(master.tensor.view(parameter.shape))


def _nothing(optimizer: Any) -> None:
    del optimizer


_KINDS: Mapping[str, tuple[Callable[[Any], _Found], Callable[[Any], object], bool]] = {
    "DeepSpeedZeroOptimizer_Stage3": (_of_stage_3, _publish_stage_3, False),
    "DeepSpeedZeroOptimizer": (_of_fragments, _publish_fragments, False),
    "BF16_Optimizer": (_of_fragments, _publish_fragments, False),
    "FP16_Optimizer": (_of_fused, _publish_fused, True),
    "FP16_UnfusedOptimizer": (_of_unfused, _publish_unfused, True),
}

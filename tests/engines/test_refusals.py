"""What cannot be averaged under an engine: refused by name, with what to do instead."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from polyak.engines import deepspeed, megatron
from polyak.errors import ArgumentError, OptimizerError


def engine(kind: str = "DeepSpeedEngine", **changed: Any) -> Any:
    """Return an engine of DeepSpeed, as far as it is looked at before it is refused."""
    base = type("DeepSpeedEngine", (), {"has_moe_layers": False, "zenflow": False, "optimizer": None})
    found: Any = base() if kind == "DeepSpeedEngine" else type(kind, (base,), {})()
    vars(found).update({"autotp_size": lambda: 1, "super_offload": lambda: False} | changed)
    return found


@pytest.mark.parametrize(
    ("refused", "name"),
    [
        (engine("PipelineEngine"), "PipelineEngine, whose stages hold other parts"),
        (engine("DeepSpeedHybridEngine"), "DeepSpeedHybridEngine"),
        (engine(has_moe_layers=True), "experts"),
        (engine(autotp_size=lambda: 2), "tensor parallelism"),
        (engine(zenflow=True), "ZenFlow"),
        (engine(super_offload=lambda: True), "SuperOffload"),
        (engine(optimizer=type("MiCS_Optimizer", (), {})()), "MiCS"),
        (engine(optimizer=SimpleNamespace(swap_optimizer=True)), "masters on NVMe"),
        (engine(optimizer=SimpleNamespace(params_in_nvme_and_cpu=True)), "masters on NVMe"),
    ],
    ids=["pipeline", "hybrid", "experts", "tensor parallel", "ZenFlow", "SuperOffload", "MiCS", "NVMe", "NVMe, params"],
)
def test_an_engine_of_deepspeed_that_cannot_be_averaged_is_refused_by_name(refused, name) -> None:
    with pytest.raises(OptimizerError, match=rf"\(got {name}.*; train with ZeRO stage 0 to 3"):
        deepspeed.masters_of(refused)


def test_an_optimizer_of_deepspeed_that_is_not_known_is_refused_by_name() -> None:
    with pytest.raises(OptimizerError, match=r"one of DeepSpeed's with masters \(.*got SimpleNamespace"):
        deepspeed.masters_of(engine(optimizer=SimpleNamespace()))


def chunk(parameter: nn.Parameter | None = None, **changed: bool) -> Any:
    found: Any = nn.Module()
    found.weight = nn.Parameter(torch.ones(1)) if parameter is None else parameter
    found.ddp_config = SimpleNamespace(
        **{"use_megatron_fsdp": False, "reuse_grad_buf_for_mxfp8_param_ag": False} | changed
    )
    return found


def optimizer(kind: str = "DistributedOptimizer", **changed: bool) -> Any:
    config = {"use_precision_aware_optimizer": False, "optimizer_cpu_offload": False} | changed
    return type(kind, (), {"config": SimpleNamespace(**config)})()


class Quantized(nn.Parameter):
    """Stands for a parameter of TransformerEngine."""


@pytest.mark.parametrize(
    ("chunks", "parts", "name"),
    [
        ([chunk(use_megatron_fsdp=True)], [optimizer()], "Megatron-FSDP"),
        ([chunk()], [optimizer(use_precision_aware_optimizer=True)], "use_precision_aware_optimizer"),
        ([chunk()], [optimizer(), optimizer(optimizer_cpu_offload=True)], "optimizer_cpu_offload"),
        ([chunk(reuse_grad_buf_for_mxfp8_param_ag=True)], [optimizer()], "parameters in fp8 or fp4"),
        ([chunk(), chunk(Quantized(torch.ones(1)))], [optimizer()], "parameters in fp8 or fp4"),
        ([chunk()], [optimizer("LayerWiseDistributedOptimizer")], "LayerWiseDistributedOptimizer"),
    ],
    ids=["FSDP", "precision-aware", "offload", "mxfp8", "fp8", "layer-wise"],
)
def test_what_cannot_be_averaged_under_megatron_is_refused_by_name(chunks, parts, name) -> None:
    with pytest.raises(OptimizerError, match=rf"\(got {name}.*; turn that off, and train with one of Distrib"):
        megatron._refuse(chunks, parts)
    megatron._refuse([chunk()], [optimizer()])


def test_a_model_under_fsdp_of_megatron_is_refused_with_the_optimizer_to_use_instead() -> None:
    wrapped = type("TorchFullyShardedDataParallel", (nn.Module,), {})()
    with pytest.raises(ArgumentError, match=r"got \['TorchFully.*; train without FSDP, with the distributed optimizer"):
        megatron.masters_of(wrapped, None)

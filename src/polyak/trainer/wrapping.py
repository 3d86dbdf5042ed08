"""A model as several ranks train it: wrapped for DDP, or sharded for FSDP2."""

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader, DistributedSampler

from polyak import sharding
from polyak.sharding import is_fsdp, is_sharded, local
from polyak.tensors.slots import slots, unwrap

if TYPE_CHECKING:
    from polyak.trainer.parallel import Group


def kind_of(model: nn.Module) -> str | None:
    """Return how a model is wrapped or sharded already; None if it is not.

    Args:
        model: Any model.

    Raises:
        ValueError: If ``Trainer`` cannot train it.
    """
    if isinstance(model, DistributedDataParallel):
        return "ddp"
    if is_fsdp(model):
        return "fsdp2"
    if any(is_sharded(parameter) for parameter in model.parameters()):
        raise ValueError(
            "a model of DTensors must be under fully_shard for Trainer to train it; for tensor parallelism alone, "
            "write the loop and use polyak.attach"
        )
    return None


def ranks_of_wrapped(model: nn.Module) -> int:
    """Return how many processes train a model on different data.

    Args:
        model: Wrapped for DDP, or sharded for FSDP2.
    """
    if isinstance(model, DistributedDataParallel):
        assert model.process_group is not None
        return model.process_group.size()
    from torch.distributed.fsdp import FSDPModule  # noqa: PLC0415  half a second

    for module in model.modules():
        if isinstance(module, FSDPModule) and (group := module._get_fsdp_state()._fsdp_param_group):  # noqa: SLF001
            return group.mesh_info.mesh.size()
    return 1


def wrapped(model: nn.Module, group: "Group", optimizers: Sequence[Optimizer]) -> nn.Module:
    """Return the model as the group trains it, on the group's device.

    Args:
        model: Wrapped or sharded already, which is returned as it is, or not.
        group: The processes that train it.
        optimizers: Over the model's parameters; where the model is sharded here, they get its shards instead.

    Raises:
        ValueError: If an optimizer has a state, which would have to be sharded.
    """
    if kind_of(model) is not None:
        return model
    model.to(group.device)
    if group.kind is None:
        return model
    if group.kind == "ddp":
        ddp = DistributedDataParallel(model, device_ids=[group.device.index] if group.device.type == "cuda" else None)
        _settle_buckets(ddp)
        return ddp
    _shard(model, group, optimizers)
    return model


def _settle_buckets(model: DistributedDataParallel) -> None:
    """Run a backward pass of zeros, so that the first step has gradients in the same buckets as all later steps.

    After its first backward pass DDP rebuilds its buckets, in the order in which gradients were computed. With three
    ranks or more the last bit of a sum depends on a gradient's place in its bucket, so the first step after a
    resumption would differ from the same step of a run that did not stop.
    """
    if any(getattr(module, "sparse", False) for module in model.modules()):
        return  # gradients of this pass would be dense
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.reducer.prepare_for_forward()
    model.reducer.prepare_for_backward([])
    torch.stack([parameter.flatten()[:1].sum().abs().float() for parameter in parameters]).sum().backward()
    model.zero_grad()


def _shard(model: nn.Module, group: "Group", optimizers: Sequence[Optimizer]) -> None:
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415  half a second
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method  # noqa: PLC0415

    if any(optimizer.state for optimizer in optimizers):
        raise ValueError(
            "optimizers must have made no step before the model is sharded (got one with a state of full tensors); to "
            "continue a run, load its checkpoint"
        )
    group.share(slot.tensor for slot in slots(model))
    inner = unwrap(model)
    names = {id(parameter): name for name, parameter in inner.named_parameters()}
    mesh = init_device_mesh(group.device.type, (group.size,))
    for block in blocks(inner):
        fully_shard(block, mesh=mesh)
    fully_shard(inner, mesh=mesh)
    if hasattr(inner, "eval_forward"):
        register_fsdp_forward_method(inner, "eval_forward")
    shards = dict(inner.named_parameters())
    for group_of in chain.from_iterable(optimizer.param_groups for optimizer in optimizers):
        # In place: some optimizers keep the list itself.
        group_of["params"][:] = [shards[names[id(p)]] if id(p) in names else p for p in group_of["params"]]


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the modules that FSDP2 gathers one at a time: the model's children, with lists replaced by their modules.

    Modules that share parameters with other modules, and containers of parameters, stay with the model.

    Args:
        model: Unwrapped.
    """
    owners = [(module, set(map(id, module._parameters.values()))) for module in model.modules()]  # noqa: SLF001

    def alone(block: nn.Module) -> bool:
        own, inside = set(map(id, block.parameters())), set(block.modules())
        return bool(own) and not any(own & held for module, held in owners if module not in inside)

    return [block for block in _steps(model) if alone(block)]


def _steps(model: nn.Module) -> list[nn.Module]:
    found = list[nn.Module]()
    for child in model.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            found += _steps(child)
        elif not isinstance(child, (nn.ParameterList, nn.ParameterDict)):
            found.append(child)
    return found


def divides_itself(loader: object) -> bool:
    """Return whether a data loader gives each rank its own batches, by torch's ``DistributedSampler``.

    Args:
        loader: Any iterable.
    """
    if not isinstance(loader, DataLoader):
        return False
    samplers = (loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None))
    return any(isinstance(sampler, DistributedSampler) for sampler in samplers)


def laid_out(source: Tensor, like: Tensor) -> Tensor:
    """Return a tensor sharded over the ranks as another is, or full if that is full.

    Args:
        source: Sharded in any way, or full.
        like: A value of the same shape.
    """
    if is_sharded(like):
        target = torch.empty_like(like, dtype=source.dtype, requires_grad=False)
        sharding.copy_(target, source)
        return target
    if is_sharded(source):
        # Gathered on the device of the model: some groups cannot send tensors on the CPU.
        there = sharding.sharded_like(source, local(source).to(like.device))
        assert is_sharded(there)
        return there.full_tensor()
    return source

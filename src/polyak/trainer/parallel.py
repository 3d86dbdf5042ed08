"""One process or several that train a model together: how they begin, how it is spread, what they tell each other."""

import atexit
import os
import time
import uuid
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader, DistributedSampler

from polyak import sharding
from polyak.errors import PlanWarning, ShardingError
from polyak.sharding import Communicator, OneProcess, Ranks, is_fsdp, is_spread, local
from polyak.tensors.slots import slots, unwrap

if TYPE_CHECKING:
    from torch.distributed import Store

KINDS = ("ddp", "fsdp2")
# How long a rank waits for the first, as torch's own process groups do.
_PATIENCE_S = 1800


@dataclass(frozen=True)
class Group:
    """The processes that train together. All of them must call the same methods in the same order.

    Args:
        kind: ``"ddp"``, ``"fsdp2"``, or None for a process by itself.
        device: Where this one trains.
        ranks: How they communicate.
    """

    kind: str | None
    device: torch.device
    ranks: Communicator = field(default_factory=OneProcess)

    @property
    def rank(self) -> int:
        """The number of this process among them."""
        return self.ranks.rank

    @property
    def size(self) -> int:
        """How many processes train together."""
        return self.ranks.world_size

    def share_buffers(self, model: nn.Module) -> None:
        """Give all ranks the buffers of rank 0: each rank has updated them from its own batches.

        Args:
            model: Wrapped or not.
        """
        self.share(slot.tensor for slot in slots(model) if not slot.is_parameter and not is_spread(slot.tensor))

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with those of rank 0.

        Args:
            tensors: On the group's device, of the same shapes on all.
        """
        self.ranks.broadcast(tensors, self.device)


def start(parallelism: str | None, model: nn.Module, device: str | torch.device | None) -> Group:
    """Return the group that trains a model.

    Args:
        parallelism: As ``Trainer`` has it.
        model: As ``Trainer`` has it.
        device: As ``Trainer`` has it.

    Raises:
        ValueError: If ``parallelism`` is not one of ``KINDS``, or the model is spread in another way.
    """
    if parallelism not in (None, *KINDS):
        raise ValueError(f"parallelism must be None or one of {', '.join(KINDS)} (got {parallelism!r})")
    done = kind_of(model)
    if done is not None and parallelism not in (None, done):
        raise ValueError(
            f"a model that is under {done} already cannot be put under parallelism={parallelism!r} as well"
        )
    kind = parallelism or done
    if kind is None and torch.distributed.is_torchelastic_launched() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        warnings.warn(
            f"each of the {os.environ['WORLD_SIZE']} processes of torchrun trains by itself, and writes where "
            "the others do; for training together give Trainer parallelism='ddp' or 'fsdp2'",
            PlanWarning,
            stacklevel=3,
        )
    group = join(kind, device)
    if done is not None and _spread_over(model) != group.size:
        raise ValueError(
            f"each of the {group.size} processes must train on data of its own, and the model is spread over "
            f"{_spread_over(model)}; the other dimensions of a mesh, as in tensor parallelism, need a loop of your own "
            "and polyak.attach"
        )
    return group


def join(kind: str | None, device: str | torch.device | None) -> Group:
    """Return the group of all processes, and begin the process group if there is none.

    It is that of the launcher's environment, as ``torchrun`` sets it, or one of this process alone. What is begun here
    ends with the process.

    Args:
        kind: How they will train; None for this process by itself, which needs no process group.
        device: Where to; by default a GPU if there is one, with a ``kind`` that of ``LOCAL_RANK``.
    """
    own = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if kind is None:
        return Group(None, own)
    if own.type == "cuda":
        if own.index is None:
            own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(own)
    _begin(own)
    world = torch.distributed.group.WORLD
    assert world is not None
    only_gpu = torch.distributed.get_backend() == torch.distributed.Backend.NCCL
    ranks = Ranks(world, own if only_gpu else torch.device("cpu"), replicas=kind == "ddp")
    return Group(kind, own, ranks if world.size() > 1 else OneProcess())


def _begin(device: torch.device) -> None:
    if torch.distributed.is_initialized():
        return
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        from torch.distributed.rendezvous import rendezvous  # noqa: PLC0415

        store, rank, size = next(rendezvous("env://"))
        store = _of_this_start(store, rank, size)
    elif {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        store, rank, size = None, -1, -1  # from the environment
    else:
        store, rank, size = torch.distributed.HashStore(), 0, 1
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size)
    atexit.register(_end)


def _of_this_start(store: "Store", rank: int, size: int) -> "Store":
    """Return a part of torchrun's store in which nothing is left of processes that it has started anew since.

    torchrun keeps one store over restarts, with the addresses of those that are gone in it, and a process that comes
    first would wait at such an address (https://github.com/pytorch/pytorch/issues/135712). So the first rank invents a
    name for this start. Another takes the name that it finds only when the first has noted it under that name.
    """
    own, last = uuid.uuid4().hex, time.monotonic() + _PATIENCE_S
    if rank == 0:
        store.set("polyak/start", own)
        came = [store.get(f"polyak/{own}/{other}").decode() for other in range(1, size)]
        store.set(f"polyak/{own}/came", " ".join(came))
        return torch.distributed.PrefixStore(own, store)
    while time.monotonic() < last:
        name = store.get("polyak/start").decode()
        store.set(f"polyak/{name}/{rank}", own)
        with suppress(RuntimeError):  # of an earlier start that ended before it was noted
            store.wait([f"polyak/{name}/came"], timedelta(seconds=1))
            if own in store.get(f"polyak/{name}/came").decode().split():
                return torch.distributed.PrefixStore(name, store)
            time.sleep(0.05)
    raise ShardingError(f"all ranks must come within {_PATIENCE_S} s for training to begin (the first has not)")


def _end() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def kind_of(model: nn.Module) -> str | None:
    """Return how a model is spread over processes already, if it is.

    Args:
        model: Any.

    Raises:
        ValueError: If it is in a way that ``Trainer`` cannot train.
    """
    if isinstance(model, DistributedDataParallel):
        return "ddp"
    if is_fsdp(model):
        return "fsdp2"
    if any(is_spread(parameter) for parameter in model.parameters()):
        raise ValueError(
            "a model of DTensors must be under fully_shard for Trainer to train it; for tensor parallelism alone, "
            "write the loop and use polyak.attach"
        )
    return None


def _spread_over(model: nn.Module) -> int:
    """Return over how many processes a model is spread that each see other data."""
    if isinstance(model, DistributedDataParallel):
        assert model.process_group is not None
        return model.process_group.size()
    from torch.distributed.fsdp import FSDPModule  # noqa: PLC0415  half a second

    for module in model.modules():
        if isinstance(module, FSDPModule) and (group := module._get_fsdp_state()._fsdp_param_group):  # noqa: SLF001
            return group.mesh_info.mesh.size()
    return 1


def spread(model: nn.Module, group: Group, optimizers: Sequence[Optimizer]) -> nn.Module:
    """Return the model as the group trains it.

    Args:
        model: On the group's device; one that is spread already is returned as it is.
        group: With a kind.
        optimizers: Over the model's parameters; those of a model that is sharded here get its shards instead.

    Raises:
        ValueError: If an optimizer has made a step already whose state would have to be sharded.
    """
    if kind_of(model) is not None or group.kind is None:
        return model
    if group.kind == "ddp":
        wrapped = DistributedDataParallel(
            model, device_ids=[group.device.index] if group.device.type == "cuda" else None
        )
        _settle_buckets(wrapped)
        return wrapped
    _shard(model, group, optimizers)
    return model


def _settle_buckets(model: DistributedDataParallel) -> None:
    """Let gradients lie from the first step on where they will lie in all others.

    After its first backward pass DDP sorts them into buckets anew, in the order in which they came. Sums over three
    ranks and more depend in the last bit on where in a bucket a gradient lies: the first step after a resumption would
    not be what it was. So here is a backward pass of nothing, in which they come from last to first.
    """
    if any(getattr(module, "sparse", False) for module in model.modules()):
        return  # the gradients of nothing are dense
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.reducer.prepare_for_forward()
    model.reducer.prepare_for_backward([])
    torch.stack([parameter.flatten()[:1].sum().abs().float() for parameter in parameters]).sum().backward()
    model.zero_grad()


def _shard(model: nn.Module, group: Group, optimizers: Sequence[Optimizer]) -> None:
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415  half a second
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method  # noqa: PLC0415

    if any(optimizer.state for optimizer in optimizers):
        raise ValueError(
            "optimizers must not have made a step before the model is sharded: their states would be of whole tensors; "
            "to go on from a run, load its checkpoint"
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
    """Return the modules that are gathered one at a time: the model's children, and those of lists in their place.

    What has parameters in common with another part, and what is no step of the computation, stays with the model.

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
    """Return whether a data loader gives each rank batches of its own, by torch's ``DistributedSampler``.

    Args:
        loader: Any iterable.
    """
    if not isinstance(loader, DataLoader):
        return False
    samplers = (loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None))
    return any(isinstance(sampler, DistributedSampler) for sampler in samplers)


def laid_out(source: Tensor, like: Tensor) -> Tensor:
    """Return a tensor spread over the ranks as another is, or whole where that is whole.

    Args:
        source: Spread in any way, or not.
        like: Of the same shape.
    """
    if is_spread(like):
        target = torch.empty_like(like, dtype=source.dtype, requires_grad=False)
        sharding.copy_(target, source)
        return target
    if is_spread(source):
        # Gathered where the model is: not every group can send what is on the CPU.
        there = sharding.beside(source, local(source).to(like.device))
        assert is_spread(there)
        return there.full_tensor()
    return source

"""Finds the ranks that hold a model from its parameters, and makes a group of exactly these ranks."""

import functools
import gc
import math
import os
import sys
import weakref
from collections.abc import Iterable, Sequence
from datetime import timedelta
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from polyak.errors import ShardingError
from polyak.sharding.parts import ModelParts
from polyak.sharding.tensors import is_fsdp, is_sharded, reshard, reshard_after_an_error

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

# The groups that this module made, by the ranks in them. They last as long as the group of all ranks.
_MADE: "weakref.WeakKeyDictionary[ProcessGroup, dict[frozenset[int], ProcessGroup]]" = weakref.WeakKeyDictionary()


def ddps_of(model: nn.Module) -> list[nn.parallel.DistributedDataParallel]:
    """Return the ``DistributedDataParallel`` that a model is, compiled or not, or those of its parts.

    Args:
        model: Any model.
    """
    if isinstance(model, ModelParts):
        return list(chain.from_iterable(map(ddps_of, model.parts)))
    while "_orig_mod" in model._modules:  # noqa: SLF001  of torch.compile
        model = model.get_submodule("_orig_mod")
    return [model] if isinstance(model, nn.parallel.DistributedDataParallel) else []


def meshes_of(model: nn.Module) -> list["DeviceMesh"]:
    """Return the meshes over which a model's tensors are sharded or replicated as ``DTensor``, in the model's order.

    Args:
        model: With ``fully_shard`` or not; it holds its shards afterwards.

    Raises:
        ShardingError: If an exception ended its forward pass, and this version of torch cannot reshard it.
    """
    reshard(model)
    found = _meshes(model)
    if not found and is_fsdp(model):
        reshard_after_an_error(model)
        found = _meshes(model)
    return found


def _meshes(model: nn.Module) -> list["DeviceMesh"]:
    tensors = chain(model.parameters(), model.buffers())
    by_id = {id(tensor.device_mesh): tensor.device_mesh for tensor in tensors if is_sharded(tensor)}
    return list(dict.fromkeys(by_id.values()))


def group_of(groups: Iterable["ProcessGroup"], meshes: Sequence["DeviceMesh"]) -> "ProcessGroup | None":
    """Return a group of exactly the ranks that hold a model; None if this rank holds no part of it.

    They are the ranks of its meshes, of its ``DistributedDataParallel`` and of its pipeline. All of them must call
    this, and no others. A group is made only where there is none; it lasts as long as the group of all ranks.

    Args:
        groups: Those of ``DistributedDataParallel`` and of a pipeline.
        meshes: As of ``meshes_of``.

    Raises:
        ShardingError: If the ranks of some meshes cannot communicate with those of the others.
    """
    sources = [(frozenset[int](mesh.mesh.flatten().tolist()), _groups(mesh)) for mesh in meshes]
    sources += [(_ranks(group), [group]) for group in groups]
    members = frozenset(chain.from_iterable(ranks for ranks, _ in sources))
    world = torch.distributed.group.WORLD
    assert world is not None
    if torch.distributed.get_rank() not in members:
        return None
    # A mesh over all of them, or meshes that cross, such as rows and columns of a grid.
    through = next((through for ranks, through in sources if ranks == members and through), None)
    if through is None:
        through = list(dict.fromkeys(chain.from_iterable(through for _, through in sources)))
        members = _reached(members, through)
    if members == _ranks(world):
        return world
    if len(through) == 1:
        return through[0]
    made = _MADE.setdefault(world, {})
    if members not in made:
        made[members] = new_group(members, through)
    return made[members]


def _ranks(group: "ProcessGroup") -> frozenset[int]:
    return frozenset(torch.distributed.get_process_group_ranks(group))


def _groups(mesh: "DeviceMesh") -> list["ProcessGroup"]:
    """Return the groups of this rank along each dimension of a mesh; none if it is not in the mesh."""
    return [] if mesh.get_coordinate() is None else [mesh.get_group(i) for i in range(mesh.ndim)]


def _reached(members: frozenset[int], groups: Sequence["ProcessGroup"]) -> frozenset[int]:
    """Return the ranks of a model of which each rank sees only those in its own groups."""
    for group in groups:
        found: list[Any] = [None] * group.size()
        torch.distributed.all_gather_object(found, members, group)
        members = members.union(*found)
    if math.prod(group.size() for group in groups) < len(members):
        raise ShardingError(
            "the meshes of a model must be connected by ranks that are in several of them (got meshes over the ranks "
            f"{sorted(members)}, and groups here of {[sorted(_ranks(group)) for group in groups]}): slice them from "
            "one mesh, or attach an algorithm to each submodule"
        )
    return members


def device_of(group: "ProcessGroup") -> torch.device:
    """Return the device on which a group sends tensors.

    Args:
        group: Any group.
    """
    on_gpu = torch.distributed.get_backend(group) == torch.distributed.Backend.NCCL
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def new_group(
    members: Iterable[int], groups: Sequence["ProcessGroup"], patience: timedelta | None = None
) -> "ProcessGroup":
    """Return a new group of gloo. Its members must call this, and no others.

    ``torch.distributed.new_group`` must be called by all ranks, of which some may not know of this model. With
    ``use_local_synchronization`` it names the group after the number of groups that a process has, which differs
    between members that are in other groups too. The number also comes again after a group was destroyed, whose entries
    in the store, such as addresses, are still there. So members agree on a name here.

    Args:
        members: Their numbers among all ranks.
        groups: Through which, one after the other, each of them can reach all others.
        patience: How long a member waits for the others; None for torch's default.
    """
    from torch.distributed import distributed_c10d as c10d  # noqa: PLC0415

    number = int.from_bytes(os.urandom(7), "big")
    for group in groups:
        largest = torch.tensor(number, dtype=torch.int64, device=device_of(group))
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group)
        number = int(largest)
    ranks = sorted(members)
    name: Any = f"polyak-{number:014x}"
    made, _ = c10d._new_process_group_helper(  # noqa: SLF001  new_group calls it, with another name
        len(ranks),
        ranks.index(torch.distributed.get_rank()),
        ranks,
        torch.distributed.Backend("gloo"),
        c10d._get_default_store(),  # noqa: SLF001
        name,
        timeout=patience or c10d.default_pg_timeout,
        group_desc="polyak",
    )
    assert isinstance(made, torch.distributed.ProcessGroup)  # every caller is a member
    c10d._world.pg_group_ranks[made] = {rank: i for i, rank in enumerate(ranks)}  # noqa: SLF001
    return made


def pipeline_of(model: nn.Module) -> list["ProcessGroup"]:
    """Return the groups over which a model is a pipeline: those of its stages, or of its ``ModelParts``.

    Args:
        model: Any. A stage of ``torch.distributed.pipelining`` may run it, or modules of it.
    """
    if isinstance(model, ModelParts) and model.group is not None:
        return [model.group]
    module = sys.modules.get("torch.distributed.pipelining.stage")
    if module is None:
        return []
    own = set(map(id, model.modules()))
    world = torch.distributed.group.WORLD
    assert world is not None
    found: list[ProcessGroup] = [
        stage.group or world
        for stage in _stages(module._PipelineStageBase)  # noqa: SLF001
        if getattr(stage, "group_size", 1) > 1 and not own.isdisjoint(map(id, stage.submod.modules()))
    ]
    return list(dict.fromkeys(found))


# By their class, all stages of this process, in one order.
_STAGES = dict[type, "weakref.WeakKeyDictionary[Any, None]"]()


def _stages(kind: Any) -> Iterable[Any]:
    """Return all stages. A stage knows its module, and not the reverse; its class knows no stages.

    To look for what refers to the class takes as long as a step of a small model. So this happens once, and stages are
    noted when they are made from then on.

    Args:
        kind: The class that all stages are of.
    """
    if kind not in _STAGES:
        kinds = _with_subclasses(kind)
        made = weakref.WeakKeyDictionary({one: None for one in gc.get_referrers(*kinds) if type(one) in kinds})
        _STAGES[kind], begin = made, kind.__init__

        @functools.wraps(begin)
        def noted(stage: Any, *args: Any, **kwargs: Any) -> None:
            begin(stage, *args, **kwargs)
            made[stage] = None

        kind.__init__ = noted
    return list(_STAGES[kind])


def _with_subclasses(kind: type) -> list[type]:
    return [kind, *chain.from_iterable(map(_with_subclasses, kind.__subclasses__()))]

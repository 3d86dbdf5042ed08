"""Jobs of ``ranks.Ranks`` with models that only some ranks hold, or that differ by rank."""

import copy
import os
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sharded import full, unequal
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from polyak import BEMA, EMA, HalfLife, ModelParts, Record, Recorder, Uniform, attach, declare_experts, export_averaged
from polyak.export import save_averaged
from polyak.sharding import Ranks, local, pipeline_of, reshard, whole
from polyak.tensors.slots import Policy, Slot, default_policy, slots, unwrap

D = 4


class Experts(nn.Module):
    """Two experts on each rank, between layers that all have."""

    def __init__(self, *, seed: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp, self.norm, self.out = nn.Linear(D, D), nn.BatchNorm1d(D), nn.Linear(D, D)
        torch.manual_seed(dist.get_rank() if seed is None else seed)
        self.experts = nn.Parameter(torch.randn(2, D, D))

    def forward(self, x: Tensor) -> Tensor:
        held = self.experts.to_local() if isinstance(self.experts, DTensor) else self.experts
        return self.out(self.norm(self.inp(x)) @ held.sum(0))


def experts(kind: str, *, seed: int | None = None) -> nn.Module:
    """Return a model with experts that FSDP2 or DDP ignores; they may be a ``DTensor``, and frozen."""
    model, mesh = Experts(seed=seed), init_device_mesh("cpu", (dist.get_world_size(),))
    if "dtensor" in kind:
        model.experts = nn.Parameter(DTensor.from_local(model.experts.detach(), mesh, [Shard(0)]))
    if "frozen" in kind:
        model.experts.requires_grad_(False)
    if "other shapes" in kind:
        model.experts = nn.Parameter(torch.randn(1 + dist.get_rank(), D, D))
    if kind.startswith("ddp"):
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["experts"])
        model = DistributedDataParallel(model)
        if "compiled" in kind:
            model = torch.compile(model, backend="eager")  # not run: compiling takes seconds
        return model
    return fully_shard(model, mesh=mesh, ignored_params={model.experts})


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer make a step, with gradients that are the same on all ranks where parameters are not sharded."""
    reshard(model)
    for number, parameter in enumerate(model.parameters()):
        held = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        grad = torch.randn(held.shape, generator=torch.Generator().manual_seed(number))
        if isinstance(parameter, DTensor):
            places = parameter.device_mesh, parameter.placements
            grad = DTensor.from_local(grad, *places, shape=parameter.shape, stride=parameter.stride())
        parameter.grad = grad if parameter.requires_grad else None
    optimizer.step()


def trained(model: nn.Module, algorithm: Any, steps: int = 3) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attached = attach(algorithm, model, optimizer)
    for _ in range(steps):
        step(model, optimizer)
    return attached


def said(act: Callable[[], Any]) -> str:
    """Return the error."""
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def own(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the local tensors."""
    reshard(model)
    return {
        slot.name: (slot.tensor.to_local() if isinstance(slot.tensor, DTensor) else slot.tensor).detach().clone()
        for slot in slots(model)
    }


# Experts


def tries(kind: str, folder: str) -> dict[str, str]:
    """Swap, save, export and record; return the errors, and whether the weights changed."""
    model, algorithm = experts(kind), EMA("2ba")
    attached = trained(model, algorithm)
    before = own(model)

    def swap() -> None:
        with attached.applied():
            pass

    found = {
        "swap": said(swap),
        "state": said(algorithm.state_dict),
        "save": said(lambda: dcp.save({"ema": attached}, checkpoint_id=f"{folder}/state")),
        "export": said(lambda: export_averaged(algorithm, model, f"{folder}/export")),
    }
    other = experts(kind)
    found["state before"] = said(attach(EMA("2ba"), other, torch.optim.SGD(other.parameters(), lr=0.1)).state_dict)
    recorded = experts(kind)
    found["record"] = said(lambda: trained(recorded, Recorder(f"{folder}/record", "2ba")))
    return found | {"changed": str(unequal(before, own(model)))}


def saves_alone() -> int | None:
    """Return the state that rank 0 saves while the other rank does nothing."""
    model, algorithm = DistributedDataParallel(net()), EMA("2ba")
    trained(model, algorithm, 4)
    return algorithm.state_dict()["num_updates"] if dist.get_rank() == 0 else None


def leaves(slot: Slot) -> Policy:
    return Policy.LEAVE if "experts" in slot.name else default_policy(slot)


def leaves_them_out(kind: str, folder: str) -> list[str]:
    """Do the same with a policy that leaves experts out, except for the export."""
    model, algorithm = experts(kind), EMA("2ba", policy=leaves)
    attached = trained(model, algorithm)
    with attached.applied():
        pass
    planner = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    dcp.save({"ema": attached}, checkpoint_id=f"{folder}/state", planner=planner)
    recorded = experts(kind)
    trained(recorded, Recorder(f"{folder}/record", "2ba", policy=leaves)).detach()
    return sorted(algorithm.state_dict()["ema_model"])


def are_parts(kind: str, folder: str) -> dict[str, list[int]]:
    """Save, load, export and record experts that are ``DTensor``; return shapes, and whether values are restored."""
    model, algorithm = experts(kind), EMA("2ba")
    attached = trained(model, algorithm)
    want = {name: full(tensor) for name, tensor in algorithm._shadow.averages.items()}
    planner = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    dcp.save({"ema": attached}, checkpoint_id=f"{folder}/state", planner=planner)
    for tensor in algorithm._shadow.averages.values():
        tensor.zero_()
    dcp.load({"ema": attached}, checkpoint_id=f"{folder}/state")
    got = {name: full(tensor) for name, tensor in algorithm._shadow.averages.items()}
    assert unequal(want, got) == []
    export_averaged(algorithm, model, f"{folder}/export")
    with attach(Recorder(f"{folder}/record", "2ba"), model, optimizer := torch.optim.SGD(model.parameters(), lr=0.1)):
        for _ in range(4):
            step(model, optimizer)
    found = {"averaged": list(want["experts"].shape)}
    if dist.get_rank() == 0:
        from safetensors.torch import load_file

        exported = load_file(f"{folder}/export/model.safetensors")
        assert torch.equal(exported["experts"], want["experts"])
        found["exported"] = list(exported["experts"].shape)
        found["recorded"] = list(Record(f"{folder}/record").average(Uniform())["experts"].shape)
    return found


def drift_apart(folder: str) -> list[str]:
    """Record experts that are equal on all ranks at first; return the messages of each step."""
    model = experts("fsdp", seed=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(Recorder(folder, "2ba"), model, optimizer)
    found = []
    for number in range(6):
        if number == 2:
            with torch.no_grad():
                model.experts.add_(dist.get_rank())
        found.append(said(lambda: step(model, optimizer)))
    return found


def hold_the_same_rows_in_another_order() -> str:
    """Swap where one rank has the experts of another in another order."""
    model = experts("fsdp", seed=3)
    if dist.get_rank():
        with torch.no_grad():
            model.experts.copy_(model.experts.flip(0).clone())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    attached = attach(EMA("2ba"), model, optimizer)
    step(model, optimizer)
    return said(lambda: attached.applied().__enter__())


class Mixture(nn.Module):
    """Experts of this rank, stacked in one tensor or as modules, next to a layer that all have."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp = nn.Linear(D, D)
        torch.manual_seed(1 + dist.get_rank())
        if "numbers" in kind:
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D)) for _ in range(2))
        else:
            self.experts = nn.ParameterDict({"up": torch.randn(2, D, D), "down": torch.randn(2, D)})
            self.experts.register_buffer("tokens", torch.full((2,), dist.get_rank()))


def declares(kind: str, folder: str) -> dict[str, Any]:
    """Declare experts; swap, save, load, export, record and read them. Return what all ranks have, and rank 0 reads."""
    model, mesh, rank = Mixture(kind), init_device_mesh("cpu", (dist.get_world_size(),)), dist.get_rank()
    declare_experts(model.experts, mesh, numbers=[2 * rank, 2 * rank + 1] if "numbers" in kind else None)
    if kind.startswith("ddp"):
        ignored = [f"experts.{name}" for name, _ in model.experts.named_parameters()]
        ignored += [f"experts.{name}" for name, _ in model.experts.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
        model = DistributedDataParallel(model)
    else:
        model = fully_shard(model, mesh=mesh, ignored_params=set(model.experts.parameters()))
    algorithm = EMA("2ba")
    attached = trained(model, [algorithm, Recorder(f"{folder}/record", 1, None, dtype=torch.float32)])
    attached.algorithms[1].close()
    before = own(model)
    with attached.applied():
        inside = own(model)
    assert unequal(before, own(model)) == []
    assert unequal(before, inside) != []
    distance = algorithm.metrics()["ema/distance"]
    want = {name: full(tensor) for name, tensor in algorithm._shadow.averages.items()}
    found = _distance({slot.name: full(slot.tensor) for slot in slots(model) if slot.is_parameter}, want)
    planner = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    dcp.save({"ema": algorithm}, checkpoint_id=f"{folder}/state", planner=planner)
    for average in algorithm._shadow.averages.values():
        local(average).zero_()
    kinds = {name: averaged for name, (_, averaged) in algorithm._shadow.kinds().items()}
    dcp.load({"ema": algorithm}, checkpoint_id=f"{folder}/state")
    assert unequal(want, {name: full(tensor) for name, tensor in algorithm._shadow.averages.items()}) == []
    assert kinds == {name: averaged for name, (_, averaged) in algorithm._shadow.kinds().items()}
    export_averaged(algorithm, model, f"{folder}/export")
    Record(f"{folder}/record").average_into(model, Uniform())
    read = own(model)
    everything = [None] * dist.get_world_size()
    mine = {name: tensor for name, tensor in read.items() if name.startswith("experts")}
    dist.all_gather_object(everything, (want, mine))
    return {
        "distance": distance,
        "found distance": found,
        "averages": [one for one, _ in everything],
        "read": [one for _, one in everything],
    }


def _distance(weights: dict[str, Tensor], averages: dict[str, Tensor]) -> float:
    """Return the distance of the full model from its average: of experts all ranks', of other tensors those of one."""
    own = {
        name: torch.stack([(tensor - averages[name]).double().square().sum(), averages[name].double().square().sum()])
        for name, tensor in weights.items()
        if dist.get_rank() == 0 or name.startswith("experts")
    }
    total = torch.stack([*own.values(), torch.zeros(2, dtype=torch.float64)]).sum(0)
    dist.all_reduce(total)
    return float((total[0] / total[1]).sqrt())


def bema_of_experts() -> str:
    """Return what is said of the state of an average that keeps several buffers, of declared experts."""
    model, mesh = Mixture("ddp"), init_device_mesh("cpu", (dist.get_world_size(),))
    declare_experts(model.experts, mesh)
    model = fully_shard(model, mesh=mesh, ignored_params=set(model.experts.parameters()))
    return said(trained(model, BEMA()).state_dict)


def declares_wrongly() -> dict[str, str]:
    """Return what is said of declarations that do not fit together."""
    mesh, rank = init_device_mesh("cpu", (dist.get_world_size(),)), dist.get_rank()
    two = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    grid = init_device_mesh("cpu", (dist.get_world_size(), 1))
    return {
        "shapes": said(lambda: declare_experts(nn.ParameterDict({"up": torch.zeros(1 + rank, 2)}), mesh)),
        "numbers": said(lambda: declare_experts(two, mesh, numbers=[0, 1 + rank])),
        "count": said(lambda: declare_experts(two, mesh, numbers=[rank])),
        "dim": said(lambda: declare_experts(nn.ParameterDict({"scale": torch.zeros(2)}), mesh, dim=1)),
        "mesh": said(lambda: declare_experts(two, grid)),
        "one": said(lambda: declare_experts(two, mesh, numbers=None if rank else [0, 1])),
        "sharded": said(lambda: declare_experts(fully_shard(nn.Linear(2, 2), mesh=mesh), mesh)),
    }


def reads_its_shards(folder: str) -> list[str]:
    """Read a record into a sharded model; return the names of tensors that differ from the average."""
    if dist.get_rank() == 0:
        trained(net(width=51), Recorder(folder, 1, None), steps=5).detach()
    dist.barrier()
    average = Record(folder).average(HalfLife("2ba"))
    found = []
    for model in (net(seed=7, width=51), fully_shard(net(seed=8, width=51))):
        Record(folder).average_into(model, HalfLife("2ba"))
        reshard(model)
        found += unequal(average, {slot.name: full(slot.tensor) for slot in slots(model)})
    return [*found, said(lambda: Record(folder).average_into(net(width=3), Uniform()))]


# On part of the ranks


def part_of(size: int, kind: str) -> tuple[DeviceMesh, bool]:
    """Return a mesh of the last ``size`` ranks, and whether this is one of them. All ranks must call this."""
    ranks = list(range(dist.get_world_size()))[-size:]
    if "2-d" in kind:
        shape = (1, size) if "one copy" in kind else (size, 1)
        mesh = DeviceMesh("cpu", torch.tensor(ranks).view(shape), mesh_dim_names=("copies", "shards"))
    else:
        mesh = DeviceMesh("cpu", torch.tensor(ranks))
    return mesh, dist.get_rank() in ranks


def net(seed: int = 0, width: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(D, width), nn.BatchNorm1d(width), nn.Linear(width, 3))


def on_part(kind: str, folder: str) -> dict[str, Any]:
    """Train a model on the last ranks; swap, measure, save, load, export and record it. The others do nothing."""
    group = dist.new_group(list(range(dist.get_world_size()))[1:]) if kind == "ddp" else None
    mesh, member = part_of(dist.get_world_size() - 1, kind)
    if not member:
        elsewhere = nn.ParameterList([nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh))])
        assert Ranks.of(elsewhere) is None
        return {}
    model = net()
    model = DistributedDataParallel(model, process_group=group) if kind == "ddp" else fully_shard(model, mesh=mesh)
    made = Ranks.of(model).group
    assert Ranks.of(model).group is made  # a group is made once
    found = everything(model, folder, process_group=group or made)
    state = {slot.name: slot.tensor.detach() for slot in slots(model)}
    found["whole"] = {name: list(tensor.shape) for name, tensor in whole(state).items()}
    return found


def everything(model: nn.Module, folder: str, process_group: Any, steps: int = 3) -> dict[str, Any]:
    """Swap, measure, save, load, export and record; return by name what the average is, and who the ranks are."""
    algorithm = EMA("2ba")
    attached = trained(model, algorithm, steps)
    before = own(model)
    with attached.applied():
        inside = own(model)
    assert unequal(before, own(model)) == []
    assert unequal(before, inside) != []
    assert algorithm.metrics()["ema/distance"] > 0
    want = {name: full(tensor) for name, tensor in algorithm._shadow.averages.items()}
    planner = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    dcp.save({"ema": attached}, checkpoint_id=f"{folder}/state", planner=planner, process_group=process_group)
    dcp.load({"ema": attached}, checkpoint_id=f"{folder}/state", process_group=process_group)
    assert unequal(want, {name: full(tensor) for name, tensor in algorithm._shadow.averages.items()}) == []
    export_averaged(algorithm, model, f"{folder}/export")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with attach(recorder := Recorder(f"{folder}/record", "2ba"), model, optimizer):
        for _ in range(4):
            step(model, optimizer)
        recorder.state_dict()
    ranks = Ranks.of(model)
    assert ranks is not None
    members = dist.get_process_group_ranks(ranks.group)
    if ranks.rank == 0:
        from safetensors.torch import load_file

        exported = load_file(f"{folder}/export/model.safetensors")
        assert unequal({name: exported[name] for name in want}, want) == []
        assert len(Record(f"{folder}/record").stretches) == 2
    return {"ranks": members, "replicas": ranks.replicas}


def side_by_side(folder: str) -> dict[str, Any]:
    """Train one sharded model on each half of the ranks, of other sizes, for other numbers of steps."""
    half = dist.get_world_size() // 2
    grid = init_device_mesh("cpu", (2, half), mesh_dim_names=("job", "shard"))
    job = grid["job"].get_local_rank()
    model = net(job, width=5 + job)
    if job:
        model = DistributedDataParallel(model, process_group=grid["shard"].get_group())
    else:
        fully_shard(model, mesh=grid["shard"])
    return everything(model, f"{folder}/{job}", grid["shard"].get_group(), steps=3 + 2 * job)


def makes_groups(times: int) -> list[int]:
    """Make separate groups of the last two of three ranks, one of which is in another group too."""
    pair = dist.new_group([0, 2], use_local_synchronization=True) if dist.get_rank() != 1 else None
    mesh, member = part_of(2, "1-d")
    if not member:
        return []
    ranks, found = Ranks.of(fully_shard(net(), mesh=mesh)), []
    assert ranks is not None
    for number in range(times):
        separate = ranks.separate()
        found.append(sum(separate.sums(dist.get_rank())))
        if number % 2:
            separate.close()
    del pair
    return found


def crossing(kind: str) -> Any:
    """Return the ranks of a model on several meshes, of which none has all, and what they say together."""
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("row", "column"))
    if kind == "crossing":
        meshes = [grid["row"], grid["column"]]
    elif kind == "one in another":
        meshes = [grid["column"], grid]
    else:  # two parts of one model; no rank has both
        meshes = [DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [2])]
        if dist.get_rank() == 3:
            return None
    model = nn.Module()
    for number, mesh in enumerate(meshes):
        setattr(model, f"p{number}", nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh)))
    try:
        ranks = Ranks.of(model)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    assert ranks is not None
    return dist.get_process_group_ranks(ranks.group), ranks.sums(10 + dist.get_rank())


def has_parts_in_ddp() -> tuple[list[int], bool]:
    """Return the ranks of a model of two parts, each of which DDP replicates, and whether each has the full model."""
    ranks = Ranks.of(ModelParts(DistributedDataParallel(net()), DistributedDataParallel(nn.ModuleDict({"x": net()}))))
    assert ranks is not None
    return dist.get_process_group_ranks(ranks.group), ranks.replicas


# Pipelines


STAGES = {"plain": 2, "ddp": 4, "fsdp": 4, "several parts": 2, "by hand": 2, "same names": 2, "tied": 2}
NUMBER_OF_BLOCKS = 4


class Block(nn.Module):
    """A layer of a stage; every second one has buffers."""

    def __init__(self, number: int) -> None:
        super().__init__()
        torch.manual_seed(number)
        self.layer = nn.Linear(D, D)
        self.norm = nn.BatchNorm1d(D) if number % 2 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x))


def stage_of(kind: str, number: int, stages: int) -> nn.Module:
    """Return the blocks of a stage under the names that they have in the whole model."""
    per = NUMBER_OF_BLOCKS // stages
    blocks = {f"block{i}": Block(i) for i in range(number * per, (number + 1) * per)}
    if "same names" in kind:
        return nn.Sequential(*blocks.values())
    if kind == "tied":
        torch.manual_seed(9)
        blocks["shared"] = nn.Linear(D, D).requires_grad_(False)
    return nn.Sequential(OrderedDict(blocks))


def pipeline(kind: str) -> tuple[nn.Module, Callable[[], None]]:
    """Return what this rank holds of a pipeline over two ranks, and a function that computes gradients."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

    grid = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("pp", "dp"))
    rank, stages = grid["pp"].get_local_rank(), NUMBER_OF_BLOCKS if kind == "several parts" else 2
    parts = [stage_of(kind, number, stages) for number in range(rank, stages, 2)]
    model = parts[0] if kind != "several parts" else ModelParts(*parts)
    if kind == "by hand":
        return ModelParts(*parts, group=grid["pp"].get_group()), lambda: None
    if "fsdp" in kind:
        fully_shard(model, mesh=grid["dp"])
    if kind == "ddp":
        model = DistributedDataParallel(model, process_group=grid["dp"].get_group())
    run = parts if kind == "several parts" else [model]
    numbers = range(rank, stages, 2)
    held = [
        PipelineStage(part, number, stages, torch.device("cpu"), group=grid["pp"].get_group())
        for part, number in zip(run, numbers, strict=True)
    ]
    loss = nn.functional.mse_loss
    schedule = ScheduleInterleaved1F1B(held, 4, loss_fn=loss) if held[1:] else Schedule1F1B(held[0], 4, loss_fn=loss)
    data = torch.randn(8, D, generator=torch.Generator().manual_seed(grid["dp"].get_local_rank()))
    return model, lambda: schedule.step(data) if rank == 0 else schedule.step(target=data)


def is_a_stage(kind: str, folder: str) -> dict[str, Any]:
    """Train a stage of a pipeline; swap, save, load, export and record it. Return errors, and what rank 0 reads."""
    model, differentiate = pipeline(kind)
    optimizer, algorithm = torch.optim.SGD(model.parameters(), lr=0.1), EMA("2ba")
    attached = attach([algorithm, Recorder(f"{folder}/record", 1, None, dtype=torch.float32)], model, optimizer)
    means: dict[str, Tensor] = {}
    for number in range(3):
        optimizer.zero_grad()
        differentiate()
        if number == 0:  # stages find out shapes by a forward pass of memory that nobody has written
            for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm1d)):
                norm.reset_running_stats()
        if kind == "by hand":
            step(model, optimizer)
        else:
            optimizer.step()
        now = {name: full(tensor).double() for name, tensor in _trained(model).items()}
        means = {
            name: means.get(name, 0) + (tensor - means.get(name, 0)) / (number + 1) for name, tensor in now.items()
        }
    attached.algorithms[1].close()
    before = own(model)
    with attached.applied():
        inside = own(model)
    assert unequal(before, own(model)) == []
    assert unequal(before, inside) != []
    assert "one process must have the full average to copy" in said(lambda: copy.deepcopy(algorithm))
    assert pipeline_of(nn.Linear(1, 1)) == []  # another model of this process
    want = {name: full(tensor) for name, tensor in algorithm._shadow.averages.items()}
    distance = algorithm.metrics()["ema/distance"]
    planner = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    dcp.save({"ema": algorithm}, checkpoint_id=f"{folder}/state", planner=planner)
    for average in algorithm._shadow.averages.values():
        local(average).zero_()
    kinds = {name: averaged for name, (_, averaged) in algorithm._shadow.kinds().items()}
    dcp.load({"ema": algorithm}, checkpoint_id=f"{folder}/state")
    assert unequal(want, {name: full(tensor) for name, tensor in algorithm._shadow.averages.items()}) == []
    assert kinds == {name: averaged for name, (_, averaged) in algorithm._shadow.kinds().items()}
    export_averaged(algorithm, model, f"{folder}/export")
    save_averaged(algorithm, model, f"{folder}/model.safetensors")
    everything = [None] * dist.get_world_size()
    dist.all_gather_object(everything, (want, means))
    return {
        "distance": distance,
        "averages": {name: tensor for one, _ in everything for name, tensor in one.items()},
        "means": {name: tensor for _, one in everything for name, tensor in one.items()},
    }


def _trained(model: nn.Module) -> dict[str, Tensor]:
    reshard(model)
    return {slot.name: slot.tensor for slot in slots(model) if slot.tensor.requires_grad}


def has_stages_of_the_same_names(kind: str, folder: str) -> dict[str, str]:
    """Return what is said of a pipeline whose stages have the same names."""
    model, differentiate = pipeline(kind)
    optimizer, algorithm = torch.optim.SGD(model.parameters(), lr=0.1), EMA("2ba")
    attached = attach(algorithm, model, optimizer)
    differentiate()
    optimizer.step()
    with attached.applied():
        pass
    found = {
        "save": said(lambda: dcp.save({"ema": attached}, checkpoint_id=f"{folder}/state")),
        "export": said(lambda: export_averaged(algorithm, model, f"{folder}/export")),
        "record": said(lambda: trained(model, Recorder(f"{folder}/record", "2ba"))),
    }
    named = nn.ModuleDict({f"stage{dist.get_rank() // (dist.get_world_size() // 2)}": model})
    attached = trained(named, EMA("2ba"))
    return found | {"with a prefix": said(lambda: export_averaged(attached, named, f"{folder}/export"))}


def one_stage_begins_later() -> list[str]:
    """Return what is said of swaps before any stage has begun to average, and after one has."""
    model, _ = pipeline("by hand")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attached, found = attach(EMA("2ba", ema_start="2ba"), model, optimizer), []
    first = next(model.parameters())

    def swap() -> None:
        with attached.applied():
            pass

    for number in range(3):
        if dist.get_rank() == 1:  # an average does not begin with NaN
            nn.init.constant_(first, torch.nan if number == 1 else 1.0)
        step(model, optimizer)
        found.append(said(swap))
    return found


def stages_differ_in_updates() -> str:
    """Return what is said of a swap where one stage has made another update."""
    model, differentiate = pipeline("plain")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attached = attach(EMA("2ba"), model, optimizer)
    for _ in range(3):
        differentiate()
        optimizer.step()
    if dist.get_rank() == 1:
        attached.algorithm._shadow.update_(0.5)

    def swap() -> None:
        with attached.applied():
            pass

    return said(swap)


# An error on one rank


def one_refuses(what: str, kind: str, folder: str) -> tuple[str, str, bool]:
    """Let one rank fail where ranks communicate; return the errors, whether a swap works then, and the weights."""
    odd = dist.get_rank() == 1
    model = net()
    model = DistributedDataParallel(model) if kind == "ddp" else fully_shard(model)
    algorithm = EMA("2ba", ema_start="3ba" if what == "beginning" and odd else "0ba")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attached = attach(algorithm, model, optimizer)
    for _ in range(2):
        step(model, optimizer)
    inner = unwrap(model)

    def act() -> None:
        if what == "export to a folder":
            export_averaged(algorithm, model, f"{folder}/{dist.get_rank()}")
        elif what in {"a full disk", "beginning", "another average"}:
            export_averaged(algorithm, model, f"{folder}/export")
        else:
            with attached.applied():
                pass

    removed = None
    if what == "export to a folder":
        mine = Path(folder) / str(dist.get_rank())
        mine.mkdir()
        if odd:
            (mine / "dear").write_text("to somebody")
    elif what == "a tensor" and odd:
        removed = inner._modules.pop("2")
    elif what == "another average" and odd:
        from polyak.averaging.weights import Shadow

        other = Shadow(inner)
        other.swap_in("another")
    elif what == "a full disk" and dist.get_rank() == 0:
        import polyak.export

        def fails(*_: Any) -> None:
            raise OSError(28, os.strerror(28))

        original, polyak.export.write_tensors = polyak.export.write_tensors, fails
    before = own(model) if what != "a tensor" else {}
    raised = said(act)
    if removed is not None:
        inner._modules["2"] = removed
    if what == "another average" and odd:
        other.restore()
    elif what == "a full disk" and dist.get_rank() == 0:
        polyak.export.write_tensors = original
    after = own(model) if what != "a tensor" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = said(act) if what in {"a full disk", "a tensor"} else ""
    return raised, again, what == "another average" or unequal(before, after) == []


# Publishing


def _published(attached: Any, model: nn.Module, files: str) -> dict[str, Any]:
    """Export and publish, to rank 0 and to every rank; return what came, and what the export has."""
    from safetensors.torch import load_file

    before = own(model)
    found: dict[str, Any] = {"rank 0": {}, "every rank": {}}

    def into(where: str) -> Callable[[str, Tensor], None]:
        return lambda name, tensor: found[where].update({name: tensor.clone()})

    attached.publish(into("rank 0"))
    attached.publish(into("every rank"), every_rank=True)
    calls: list[str] = []

    def fails(name: str, tensor: Tensor) -> None:
        calls.append(name)
        if len(calls) == 3 and dist.get_rank() == 1:
            raise ValueError("the engine is gone")

    found["error"] = said(lambda: attached.publish(fails, every_rank=True))
    found["calls"] = len(calls)
    found["restored"] = unequal(before, own(model)) == []
    attached.save(f"{files}/averaged.safetensors")
    dist.barrier()
    found["exported"] = load_file(f"{files}/averaged.safetensors")
    return found


def publishes_a_stage(kind: str, folder: str) -> dict[str, Any]:
    """Train a stage of a pipeline, and publish the average of all stages."""
    model, differentiate = pipeline(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attached = attach(EMA("2ba"), model, optimizer)
    for number in range(3):
        differentiate()
        if number == 0:
            for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm1d)):
                norm.reset_running_stats()
        step(model, optimizer) if kind == "by hand" else optimizer.step()
    return _published(attached, model, folder)


def publishes_experts(kind: str, folder: str) -> dict[str, Any]:
    """Train declared experts, and publish the average of all of them."""
    model, mesh, rank = Mixture(kind), init_device_mesh("cpu", (dist.get_world_size(),)), dist.get_rank()
    declare_experts(model.experts, mesh, numbers=[2 * rank, 2 * rank + 1] if "numbers" in kind else None)
    if kind.startswith("ddp"):
        ignored = [f"experts.{name}" for name, _ in model.experts.named_parameters()]
        ignored += [f"experts.{name}" for name, _ in model.experts.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
        model = DistributedDataParallel(model)
    else:
        model = fully_shard(model, mesh=mesh, ignored_params=set(model.experts.parameters()))
    return _published(trained(model, EMA("2ba")), model, folder)


def publishes_undeclared_experts(kind: str) -> str:
    """Return what is said of experts that differ by rank and were not declared."""
    attached = trained(experts(kind), EMA("2ba"))
    return said(lambda: attached.publish(print))


# Another average


def one_rank_holds_another_average(what: str, kind: str) -> tuple[str, str]:
    """Let one rank hold another average when all swap, measure or save; return the error, and what is said after it."""
    from polyak.averaging.weights import Shadow

    if kind == "pipeline":
        model, _ = pipeline("by hand")
    else:
        model = DistributedDataParallel(net()) if kind == "ddp" else fully_shard(net())
    attached = trained(model, EMA("2ba"))

    def act() -> None:
        if what == "applied":
            with attached.applied():
                pass
        elif what == "metrics":
            attached.metrics()
        elif what == "publish":
            attached.publish(lambda name, tensor: None)
        else:
            attached.state_dict()

    other = Shadow(unwrap(model))
    own_average = attached.average._shadow
    if dist.get_rank() == 1:
        own_average.swap_in("a test") if what == "state" else other.swap_in("another")
    first = said(act)
    if dist.get_rank() == 1:
        own_average.restore() if what == "state" else other.restore()
    return first, said(act)

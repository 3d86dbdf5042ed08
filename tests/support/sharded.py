"""What the processes of ``ranks.Ranks`` do: models under every kind of parallelism, and their averages."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from polyak import EMA, Offload, attach
from polyak.averaging.weights import Shadow
from polyak.tensors.slots import slots, unwrap

# How a model may be spread, and on how many ranks it is tested. Of two, rows do not divide; of four, one has no rows of
# the second layer; of three, all divide.
KINDS = {
    "ddp": (2, 3),
    "ddp, divided average": (2, 4),
    "fsdp": (2, 3),
    "fsdp, blocks": (2, 4),
    "fsdp, bfloat16": (2,),
    "fsdp, cpu offload": (2,),
    "fsdp, offloaded average": (2,),
    "fsdp, kept whole": (2,),
    "fsdp, checkpointed": (2,),
    "fsdp, compiled": (2,),
    "fsdp, from meta": (3,),
    "hsdp": (4,),
    "tp": (2,),
    "fsdp and tp": (4,),
}


# Rows of the first layer and columns of the second.
PLAN = {
    "first": ColwiseParallel(output_layouts=Replicate()),
    "second": RowwiseParallel(input_layouts=Replicate()),
}


def device() -> str:
    """Return where this group's models are."""
    return "cuda" if dist.is_initialized() and dist.get_backend() == "nccl" else "cpu"


class Net(nn.Module):
    """51 rows do not divide by 2 or 4, and 3 rows leave ranks without any."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(37, 51)
        self.norm = nn.BatchNorm1d(51)
        self.second = nn.Linear(51, 3)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x).float()).relu()) * self.scale


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def batch(step: int, *, own: bool = True) -> Tensor:
    """Return the batch of a step: of this rank's own, or the same for all."""
    seed = 100 + step + (1000 * dist.get_rank() if own else 0)
    return torch.randn(8, 37, generator=torch.Generator().manual_seed(seed)).to(device())


def spread(kind: str) -> nn.Module:
    """Return the net under a kind of parallelism."""
    world, model = dist.get_world_size(), net().to(device())
    mesh = init_device_mesh(device(), (world,))
    if kind.startswith("ddp"):
        return DistributedDataParallel(model)
    if kind == "tp":
        model.tensor_parallel = True
        return parallelize_module(model, mesh, PLAN)
    if kind == "fsdp and tp":
        grid = init_device_mesh(device(), (world // 2, 2), mesh_dim_names=("dp", "tp"))
        model.first, model.second = (
            nn.Linear(37, 52).to(device()),
            nn.Linear(52, 3).to(device()),
        )  # it must divide where both divide it
        model.norm = nn.BatchNorm1d(52).to(device())
        model.tensor_parallel = True
        parallelize_module(model, grid["tp"], PLAN)
        return fully_shard(model, mesh=grid["dp"])
    if kind == "hsdp":
        mesh = init_device_mesh(device(), (2, world // 2), mesh_dim_names=("copies", "shards"))
    if kind == "fsdp, checkpointed":
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

        model.first = checkpoint_wrapper(model.first)
    if kind == "fsdp, compiled":
        model.first.compile(backend="aot_eager")
    if kind == "fsdp, from meta":
        model = Net().to("meta")
    options: dict[str, Any] = {
        "fsdp, bfloat16": {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)},
        "fsdp, cpu offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
        "fsdp, kept whole": {"reshard_after_forward": False},
    }.get(kind, {})
    if kind == "fsdp, bfloat16":
        fully_shard(model.norm, mesh=mesh)
    if kind != "fsdp":
        fully_shard(model.first, mesh=mesh, **options)
        fully_shard(model.second, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    if kind == "fsdp, from meta":
        model.to_empty(device=device())
        for number, slot in enumerate(slots(model)):
            with torch.no_grad():
                torch.manual_seed(number)
                slot.tensor.normal_(std=0.1) if slot.tensor.is_floating_point() else slot.tensor.zero_()
                if slot.name == "norm.running_var":
                    slot.tensor.fill_(1.0)
    return model


def full(tensor: Tensor) -> Tensor:
    """Return a copy of the whole of a tensor."""
    return (tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()).clone()


def own_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the whole weights and of this rank's buffers; this makes the model hold its shards."""
    from polyak.sharding import reshard

    reshard(model)
    return {slot.name: full(slot.tensor) for slot in slots(model)}


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the same with rank 0's buffers, which are saved: each rank has other ones."""
    found = own_weights(model)
    for slot in slots(model):
        if not slot.is_parameter:
            dist.broadcast(found[slot.name], 0)
    return found


def ema_of(kind: str, half_life: str = "2ba", **options: Any) -> EMA:
    if kind == "ddp, divided average":
        options["mesh"] = init_device_mesh(device(), (dist.get_world_size(),))
    if kind == "fsdp, offloaded average":
        options["offload"] = Offload()
    return EMA(half_life, **options)


class Reference:
    """The average of a whole copy of the model, which every rank makes for itself."""

    def __init__(self, model: nn.Module, dtype: torch.dtype | None) -> None:
        self._model = nn.Module()
        for slot in slots(model):
            *path, attribute = slot.name.split(".")
            owner = self._model
            for part in path:
                owner = owner._modules.setdefault(part, nn.Module())
            if slot.is_parameter:
                owner.register_parameter(attribute, nn.Parameter(full(slot.tensor)))
            else:
                owner.register_buffer(attribute, full(slot.tensor))
        self.shadow = Shadow(self._model, dtype=dtype)
        self.averages = self.shadow.averages

    @torch.no_grad()
    def update_(self, model: nn.Module, weight: float) -> None:
        tensors = {slot.name: slot.tensor for slot in slots(self._model)}
        for name, tensor in own_weights(model).items():
            tensors[name].copy_(tensor)
        self.shadow.update_(weight)


def unequal(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Return the names under which two sets of tensors differ in a bit."""
    assert a.keys() == b.keys(), (a.keys(), b.keys())
    return [n for n in a if a[n].dtype != b[n].dtype or not torch.equal(a[n], b[n])]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    model.train()
    own = not hasattr(model, "tensor_parallel")  # whose ranks must see the same
    for step in steps:
        optimizer.zero_grad()
        model(batch(step, own=own)).float().square().mean().backward()
        optimizer.step()


@torch.no_grad()
def evaluated(model: nn.Module) -> Tensor:
    model.eval()
    output = model(batch(999, own=False))
    model.train()
    return full(output)


# Jobs


def follows_the_whole(kind: str, dtype: torch.dtype | None) -> dict[str, Any]:
    """Train; compare the average, a swap and training after it to those of a full copy of the model."""
    model = spread(kind)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    algorithm = ema_of(kind, dtype=dtype)
    ema = attach(algorithm, model, optimizer)
    train(model, optimizer, range(1))
    reference = Reference(unwrap(model), dtype)
    for step in range(1, 4):
        train(model, optimizer, range(step, step + 1))
        reference.update_(unwrap(model), 1 - 0.5**0.5)
    averages = {name: full(tensor) for name, tensor in algorithm._shadow.averages.items()}
    buffers = [slot.name for slot in slots(model) if not slot.is_parameter]
    found: dict[str, Any] = {"averages": unequal(averages, reference.averages)}

    evaluated(model)  # leaves the outermost module whole
    before = own_weights(model)
    evaluated(model)  # and so it is when the average is swapped in
    with ema.applied():
        inside = own_weights(model)
        first = evaluated(model)
        inside_later = own_weights(model)
        kept = {n: full(t) for n, t in algorithm._shadow._swapper.training().items()}
        held = {n: full(t) for n, t in algorithm._shadow.averaged_tensors().items()}
    after = own_weights(model)
    want = {n: t.to(before[n].dtype) for n, t in reference.averages.items()}
    for name in buffers:  # those of rank 0 count
        dist.broadcast(want[name], 0)
        dist.broadcast(reference.averages[name], 0)
    found["lent"] = unequal(inside, want) + unequal(inside_later, want)
    found["kept"] = unequal({n: kept[n] for n in kept}, {n: before[n].to(kept[n].dtype) for n in kept})
    found["held"] = unequal(held, reference.averages)
    found["restored"] = unequal(before, after)
    found["moved by the swap"] = float((evaluated(model) - first).abs().max())
    train(model, optimizer, range(4, 5))
    before, averages = own_weights(model), {n: full(t) for n, t in algorithm._shadow.averages.items()}
    parameters = [slot.name for slot in slots(model) if slot.is_parameter]
    apart = sum(float((before[n] - averages[n].float()).double().square().sum()) for n in parameters)
    length = sum(float(averages[n].double().square().sum()) for n in parameters)
    found["distance"] = algorithm.metrics()["ema/distance"] / (apart / length) ** 0.5
    return found


def trains(kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights of a run without an average and of one with swaps."""
    return _trains(kind, loans=False), _trains(kind, loans=True)


def _trains(kind: str, *, loans: bool) -> dict[str, Tensor]:
    """Return the weights of a run, evaluated on the way with its own weights, and with an average or not."""
    model = spread(kind)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    ema = attach(ema_of(kind) if loans else [], model, optimizer)
    for step in range(3):
        train(model, optimizer, range(step, step + 1))
        raw = evaluated(model)  # leaves the outermost module of FSDP2 whole
        if loans and step > 0:
            with ema.applied():
                assert not torch.equal(raw, evaluated(model))
            assert torch.equal(raw, evaluated(model))
    return weights(model)


def _state(model: nn.Module, optimizer: torch.optim.Optimizer, ema: Any) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, "ema": ema}


def _averages(algorithm: EMA) -> dict[str, Tensor]:
    algorithm._average.agree()  # rank 0's averages of buffers count
    return {name: full(tensor) for name, tensor in algorithm._shadow.averaged_tensors().items()}


def _set_up(kind: str, seed: int, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer, EMA, Any]:
    model = spread(kind)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    if seed:  # other weights than those that are going to be loaded
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(seed)
    algorithm = ema_of(kind, **options)
    return model, optimizer, algorithm, attach(algorithm, model, optimizer)


def saves(kind: str, folder: str, dtype: torch.dtype | None, steps: int, asynchronous: bool = False) -> Any:
    """Train, save by DCP, train on; return the averages at the save, and weights and averages at the end."""
    import torch.distributed.checkpoint as dcp

    model, optimizer, algorithm, ema = _set_up(kind, 0, dtype=dtype, ema_start="2ba")
    train(model, optimizer, range(steps))
    then = _averages(algorithm) if algorithm.ema_started else {}
    state = _state(model, optimizer, ema)
    # By default any rank's buffers may be saved, this one's running mean and that one's variance.
    planner = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    if asynchronous:
        group = dist.new_group(backend="gloo")  # its messages must not mix with those of training
        saving = dcp.async_save(state, checkpoint_id=folder, planner=planner, process_group=group)
        train(model, optimizer, range(steps, steps + 3))
        saving.result()
    else:
        dcp.save(state, checkpoint_id=folder, planner=planner)
        train(model, optimizer, range(steps, steps + 3))
    return then, weights(model), _averages(algorithm), ema.timestamp.batch.value


def loads(kind: str, folder: str, dtype: torch.dtype | None, steps: int) -> Any:
    """Load by DCP what ``saves`` saved, train on; return the same."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_state_dict

    model, optimizer, algorithm, ema = _set_up(kind, 1, dtype=dtype, ema_start="2ba")
    state = _state(model, optimizer, ema)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    then = _averages(algorithm) if algorithm.ema_started else {}
    train(model, optimizer, range(steps, steps + 3))
    return then, weights(model), _averages(algorithm), ema.timestamp.batch.value


def communicates(kind: str) -> tuple[int, int]:
    """Return how many messages an update takes, and how many a swap."""
    from torch.distributed.tensor.debug import CommDebugMode

    model = spread(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    algorithm = ema_of(kind)
    ema = attach(algorithm, model, optimizer)
    train(model, optimizer, range(2))
    with CommDebugMode() as update:
        algorithm._shadow.update_(0.5)
    with CommDebugMode() as loan, ema.applied():
        pass
    return update.get_total_counts(), loan.get_total_counts()


def shares(kind: str) -> tuple[int, int, int]:
    """Return the bytes of this rank's averages, of the parameters it owns, and of the whole model."""
    from polyak.sharding import local

    model = spread(kind)
    shadow = Shadow(model, mesh=ema_of(kind)._average.settings.mesh)
    own = sum(local(average).untyped_storage().nbytes() for average in shadow.averages.values())
    shards = sum(local(parameter).nbytes for parameter in model.parameters())
    return own, shards, sum(parameter.numel() * 4 for parameter in model.parameters())


def disagrees(about: str) -> None:
    """Swap in an average about which one rank differs from the others."""
    odd = dist.get_rank() == 1
    model = spread("ddp")
    if about == "tensors" and odd:
        model.module.scale.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    start = "3ba" if about == "beginning" and odd else "0ba"
    algorithm = EMA("3ba" if about == "profile" and odd else "2ba", ema_start=start if about == "beginning" else "0ba")
    ema = attach(algorithm, model, optimizer)
    for step in range(2 if about == "steps" and odd else 3 if about != "beginning" else 2):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.5 + step) if parameter.requires_grad else None
        optimizer.step()
        if about == "nan" and odd and step == 1:
            with torch.no_grad():
                model.module.second.weight[1, 2] = torch.nan
        if about == "values" and odd and step == 1:
            with torch.no_grad():
                model.module.second.weight[1, 2] += 1e-6
    with ema.applied():
        pass


def sees_a_nan_in_one_shard() -> list[str]:
    """Return the warnings of a swap after one rank's shard had NaN."""
    import warnings

    from polyak import QuarantineWarning

    model = spread("fsdp, blocks")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    ema = attach(EMA("2ba"), model, optimizer)
    train(model, optimizer, range(2))
    if dist.get_rank() == 1:
        with torch.no_grad():
            model.first.weight.to_local()[0, 0] = torch.nan
    ema.algorithm._shadow.update_(0.5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with ema.applied():
            pass
    of_nan = [str(one.message) for one in caught if issubclass(one.category, QuarantineWarning)]
    return [*of_nan, str(ema.algorithm.state_dict()["num_quarantined"])]


def interrupted_or_not(kind: str) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Return the weights and the averages of a run, and of one in which an evaluation fails."""
    return [is_interrupted(kind, fails) for fails in (False, True)]


def is_interrupted(kind: str, fails: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train; let an evaluation with the average fail in the middle of the forward pass on all ranks; train on."""
    model = spread(kind)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    algorithm = ema_of(kind)
    ema = attach(algorithm, model, optimizer)
    train(model, optimizer, range(2))
    if fails:

        def fail(*args: Any) -> None:
            raise ValueError("as planned")

        hook = unwrap(model).norm.register_forward_hook(fail)
        try:
            with ema.applied():
                evaluated(model)
        except ValueError:
            pass
        hook.remove()
    train(model, optimizer, range(2, 4))
    return weights(model), _averages(algorithm)


def exports(kind: str, folder: str, max_file_bytes: float) -> dict[str, Tensor]:
    """Export the average; return what the model holds while it is swapped in."""
    from polyak import export_averaged

    model, optimizer, algorithm, ema = _set_up(kind, 0)
    train(model, optimizer, range(3))
    before = weights(model)
    export_averaged(algorithm, model, folder, max_file_bytes=max_file_bytes)
    assert unequal(before, weights(model)) == []
    with ema.applied():
        return weights(model)


def saves_by_the_handle(kind: str, file: str) -> dict[str, Tensor]:
    """Save the averaged weights by the handle; return what the model holds while they are swapped in."""
    model, optimizer, _, ema = _set_up(kind, 0)
    train(model, optimizer, range(3))
    before = weights(model)
    ema.save(file)
    assert unequal(before, weights(model)) == []
    with ema.applied():
        ema.save(file, overwrite=True)
        return weights(model)


def teaches(kind: str) -> dict[str, Any]:
    """Train towards the outputs of ``ema.model``; return how these differ from those under ``applied()``."""
    model, optimizer, _, ema = _set_up(kind, 0)
    train(model, optimizer, range(1))
    teacher = ema.model
    for step in range(1, 4):
        inputs = batch(step, own=False)
        with torch.no_grad():
            targets = full(teacher(inputs))
        (model(inputs) - targets).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with ema.applied():
        apart = evaluated(model) - full(teacher(batch(999, own=False)))
    return {"apart": float(apart.abs().max()), "moved": float((targets - evaluated(model)).abs().max())}


def publishes(kind: str) -> dict[str, Any]:
    """Publish the averaged weights, to rank 0 and to every rank; return what came, and the error of a failure."""
    model, optimizer, _, ema = _set_up(kind, 0)
    train(model, optimizer, range(3))
    before, most = weights(model), []
    found: dict[str, Any] = {"alone": {}, "everywhere": {}, "inside": {}}

    def into(where: str) -> Any:
        return lambda name, tensor: found[where].update({name: tensor.clone()})

    def fails(name: str, tensor: Tensor) -> None:
        most.append(name)
        if name == "second.weight" and dist.get_rank() == 1:
            raise ValueError("the engine is gone")

    ema.publish(into("alone"))
    ema.publish(into("everywhere"), every_rank=True)
    for name, load in (("error", fails), ("no function", None)):
        try:
            ema.publish(load, every_rank=True)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    found["calls before the error"] = most
    found["restored"] = unequal(before, weights(model))
    with ema.applied():
        ema.publish(into("inside"), every_rank=True)
        found["swapped"] = weights(model)
    return found


def makes_separate_groups(times: int) -> list[int]:
    """Make a separate group, use it and close it, several times; return the sums of the ranks in each."""
    from polyak.sharding import Ranks

    ranks = Ranks.of(spread("fsdp"))
    assert ranks is not None
    found = []
    for _ in range(times):
        separate = ranks.separate()
        found.append(sum(separate.sums(dist.get_rank())))
        separate.close()
    return found

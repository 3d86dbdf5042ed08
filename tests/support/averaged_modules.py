"""Jobs of ``ranks.Ranks`` in which ``ema.model`` computes: under FSDP2 and tensor parallelism, in a training step."""

from typing import Any

import pages
import sharded
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sharded import batch, evaluated, full, train, unequal, weights
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from polyak import EMA, attach
from polyak.sharding import is_sharded, local, reshard
from polyak.tensors.slots import slots, unwrap

STEPS = 4


def _set_up(kind: str, seed: int = 0, **options: Any) -> Any:
    model, optimizer, algorithm, ema = sharded._set_up(kind, seed, **options)
    if not kind.startswith("ddp"):  # which must know before
        model.norm.weight.requires_grad_(False)  # the module shares it with the model
    return model, optimizer, algorithm, ema


def _memory(tensors: Any) -> set[int]:
    return {local(tensor).untyped_storage().data_ptr() for tensor in tensors}


def computes(kind: str) -> dict[str, Any]:
    """Return how ``ema.model`` differs from the model with the average, after each of some updates."""
    model, optimizer, algorithm, ema = _set_up(kind)
    train(model, optimizer, range(1))
    reference = sharded.Reference(unwrap(model), None)
    train(model, optimizer, range(1, 2))
    reference.update_(unwrap(model), 1 - 0.5**0.5)
    before = {name: full(tensor) for name, tensor in algorithm._shadow.averages.items()}
    averaged = ema.model
    assert unequal(before, {name: full(tensor) for name, tensor in algorithm._shadow.averages.items()}) == []
    found: dict[str, Any] = {"apart": [], "moved": []}
    for step in range(2, 2 + STEPS):
        train(model, optimizer, range(step, step + 1))
        reference.update_(unwrap(model), 1 - 0.5**0.5)
        algorithm._average.agree()  # in a swap, the buffers of rank 0 count
        with torch.no_grad():
            got = full(averaged(batch(999, own=False)))
        with ema.applied():
            want = evaluated(model)
        found["apart"].append(float((got.float() - want.float()).abs().max()))
        found["moved"].append(float((got.float() - evaluated(model).float()).abs().max()))
    reshard(model)
    held = algorithm._shadow.averages
    frozen = [p for p in model.parameters() if not p.requires_grad]
    trained = [slot.name for slot in slots(model) if slot.tensor.requires_grad]  # in one order on all ranks
    found["wrong"] = [n for n in trained if not torch.equal(full(held[n]), reference.averages[n])]
    found["elsewhere"] = len(_memory(averaged.parameters()) - _memory(held.values()) - _memory(frozen))
    found["requires a gradient"] = any(parameter.requires_grad for parameter in averaged.parameters())
    state = {name: full(tensor) for name, tensor in averaged.state_dict().items()}
    own = {name: full(tensor) for name, tensor in {**dict(model.named_parameters()), **held}.items()}
    found["state"] = [name for name in state if not torch.equal(state[name], own.get(name, own.get(f"module.{name}")))]
    return found


def has_16_bits() -> list[bool]:
    """Return whether the float32 average of a bfloat16 model computes with what a swap rounds it to."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(37, 51), nn.Tanh(), nn.Linear(51, 3)).bfloat16()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model[0], mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ema, found = attach(EMA("2ba"), model, optimizer), []
    train(model, optimizer, range(1))
    averaged = ema.model
    for step in range(1, 5):
        train(model, optimizer, range(step, step + 1))
        with torch.no_grad():
            got = averaged(batch(999, own=False))
        with ema.applied():
            found.append(torch.equal(got, evaluated(model)) and got.dtype == torch.bfloat16)
    return [*found, {parameter.dtype for parameter in averaged.parameters()} == {torch.float32}]


def learns(kind: str, how: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train towards the outputs of the average; return weights and averages. They may be read and not used."""
    model, optimizer, algorithm, ema = _set_up(kind)
    if how == "without polyak":
        ema.detach()
    train(model, optimizer, range(1))
    averaged = ema.model if how in {"module", "read"} else None
    for step in range(1, STEPS):
        inputs, target = batch(step, own=False), torch.zeros(())
        if how != "without polyak":
            algorithm._average.agree()  # in a swap, the buffers of rank 0 count
        if how == "swap":
            with ema.applied():
                target = evaluated_on(model, inputs)
        output = model.train()(inputs)
        if averaged is not None:  # while the student's full tensors are in memory
            with torch.no_grad():
                target = averaged(inputs)
        used = torch.zeros(()) if how == "read" else target
        (output - used - 1).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights(model), {} if how == "without polyak" else sharded._averages(algorithm)


@torch.no_grad()
def evaluated_on(model: nn.Module, inputs: Tensor) -> Tensor:
    return model.eval()(inputs)


def resumes(kind: str, folder: str) -> dict[str, Any]:
    """Return how ``ema.model`` of a resumed run differs from that of the run that was saved."""
    model, optimizer, _, ema = _set_up(kind)
    train(model, optimizer, range(3))
    dcp.save(
        sharded._state(model, optimizer, ema),
        checkpoint_id=folder,
        planner=dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True),
    )
    inputs = batch(999, own=False)
    other, its_optimizer, algorithm, resumed = _set_up(kind, 1)
    train(other, its_optimizer, range(1))
    early = resumed.model
    state = sharded._state(other, its_optimizer, resumed)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(other, its_optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    found = {}
    for name in ("loaded", "trained on"):
        algorithm._average.agree()  # buffers are those of rank 0
        ema.average._average.agree()
        with torch.no_grad():
            want, got, before = (full(one(inputs)) for one in (ema.model, resumed.model, early))
        found[name] = [torch.equal(want, got), torch.equal(want, before)]
        for trained, moves in ((model, optimizer), (other, its_optimizer)):
            train(trained, moves, range(5, 6))
    return found


def is_compiled(kind: str) -> list[bool]:
    """Return for each of some updates whether the compiled module gives the bits of the plain one, and follows."""
    model, optimizer, _, ema = _set_up(kind)
    train(model, optimizer, range(1))
    averaged = ema.model
    compiled, found, last = torch.compile(averaged, backend="aot_eager"), [], None
    for step in range(1, 4):
        train(model, optimizer, range(step, step + 1))
        with torch.no_grad():
            plain, got = (full(one(batch(999, own=False))) for one in (averaged, compiled))
        found.append(torch.equal(plain, got) and (last is None or not torch.equal(last, got)))
        last = got
    torch._dynamo.reset()
    return found


def fails(kind: str) -> list[bool]:
    """Let a forward pass of ``ema.model`` fail on all ranks; return whether later ones see later averages."""
    model, optimizer, _, ema = _set_up(kind)
    train(model, optimizer, range(1))
    averaged, found = ema.model, []

    def fail(*args: Any) -> None:
        raise ValueError("as planned")

    for step in range(1, 3):
        train(model, optimizer, range(step, step + 1))
        hook = averaged.get_submodule("norm").register_forward_pre_hook(fail)
        try:
            averaged(batch(999, own=False))
        except ValueError:
            hook.remove()
        train(model, optimizer, range(step + 10, step + 11))
        ema.average._average.agree()  # in a swap, the buffers of rank 0 count
        with torch.no_grad():
            got = full(averaged(batch(999, own=False)))
        with ema.applied():
            found.append(torch.equal(got, evaluated(model)))
    return found


def run_as_on_the_page(page: str) -> None:
    """Run the examples of the page up to its section on FSDP2 here, in one of several ranks."""
    found = [block.text for block in pages.blocks(pages.ROOT / page) if block.tag == "python"]
    fsdp2 = next(text for text in found if "fully_shard" in text)
    views = found[0].partition("student =")[0]
    exec(compile(views + fsdp2, page, "exec"), {})


class Other(nn.Module):
    """Tied, frozen and ignored parameters, and modules that are gathered together."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(7, 6), nn.Linear(6, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.columns, self.frozen = nn.Linear(6, 6), nn.Linear(6, 5).requires_grad_(False)
        self.back = nn.Linear(5, 6)
        self.ignored = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.one(self.embedding(x)).tanh()) * self.ignored
        return self.head(self.back(self.frozen(self.columns(x))))


def other_calls() -> dict[str, Any]:
    """Return how ``ema.model`` differs from the model with the average where ``fully_shard`` has other arguments."""
    model, mesh = Other(), init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard([model.one, model.two], mesh=mesh)
    fully_shard(model.columns, mesh=mesh, shard_placement_fn=lambda p: Shard(1) if p.dim() > 1 else None)
    fully_shard(model.frozen, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params={model.ignored})
    seen: list[str] = []
    model.columns.register_forward_hook(lambda *_: seen.append("columns"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ema = attach(EMA("2ba"), model, optimizer)
    tokens = torch.arange(7)
    averaged, found = None, []
    for _ in range(4):
        model(tokens).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        averaged = averaged or ema.model
        with torch.no_grad():
            got = averaged(tokens)
            with ema.applied():
                found.append(torch.equal(got, model(tokens)))
            reshard(model)
    assert averaged is not None
    tied = averaged.head.weight is averaged.embedding.weight
    placements = [str(averaged.columns.weight.placements), is_sharded(averaged.ignored)]
    elsewhere = _memory(averaged.parameters()) - _memory(ema.average._shadow.averages.values())
    return {
        "equal": found,
        "tied": tied,
        "placements": placements,
        "frozen": elsewhere == _memory(model.frozen.parameters()),
        "hooks of the user": len(seen) == 12,
    }

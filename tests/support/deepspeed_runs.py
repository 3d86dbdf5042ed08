"""What the processes of ``ranks.Ranks`` do with DeepSpeed's engine, on CPUs."""

import os
import signal
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp

os.environ.setdefault("DS_ACCELERATOR", "cpu")

HALF_LIFE, DECAY = "3ba", 0.5 ** (1 / 3)
# By name, DeepSpeed's configuration, and whether the ranks divide the masters.
KINDS: dict[str, dict[str, Any]] = {
    "fp32, stage 0": {},
    "bf16, stage 0": {"bf16": {"enabled": True}},
    "fp16, stage 0": {"fp16": {"enabled": True, "initial_scale_power": 4}},
    "fp32, zero 1": {"zero_optimization": {"stage": 1}},
    "bf16, zero 1": {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}},
    "bf16, zero 1, float32 gradients": {
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1},
        "data_types": {"grad_accum_dtype": "fp32"},
    },
    "bf16, zero 2": {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}},
    "bf16, zero 2, offload": {
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        "zero_force_ds_cpu_optimizer": False,
    },
    "bf16, zero 3": {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}},
    "bf16, zero 3, offloaded average": {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}},
    "bf16, zero 3, nothing persistent": {
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    },
    "bf16, zero 3, secondary copies": {
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 0},
    },
    "bf16, zero 3, offload": {
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "cpu"},
            "offload_param": {"device": "cpu"},
        },
        "zero_force_ds_cpu_optimizer": False,
    },
}
# What the tests run, and the page lists: numbers of ranks, layouts that a state of two ranks is loaded in, and kills.
FOLLOWED = dict.fromkeys(KINDS, (2,)) | {"bf16, zero 2": (2, 3), "bf16, zero 3": (1, 2, 3)}
SAVED = {
    kind: [(kind, 1), (kind, 3), (other, 3)]
    for kind, other in (
        ("fp32, stage 0", "bf16, zero 2"),
        ("bf16, zero 2", "bf16, zero 3"),
        ("bf16, zero 3, nothing persistent", "bf16, zero 2"),
    )
}
KILLED = ["bf16, zero 2", "bf16, zero 3"]


class Scale(nn.Module):
    """Has a running statistic, of which DeepSpeed saves that of rank 0, and a buffer that is copied."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_scale", torch.ones(1))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.running_scale.lerp_(x.abs().mean().to(self.running_scale.dtype).view(1), 0.1)
                self.seen += 1
            return x
        return x / self.running_scale.to(x.dtype)


class Net(nn.Module):
    """51 rows do not divide by 2 or 4; a layer is frozen; a submodule has the name of an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(37, 51)
        self.frozen = nn.Linear(51, 51)
        self.frozen.requires_grad_(False)
        self.norm, self.scaled = nn.LayerNorm(51), Scale()
        self.last = nn.Linear(51, 3, bias=False)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.scaled(self.norm(self.frozen(self.model(x)))).relu()) * self.scale


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def batch(step: int) -> Tensor:
    rank = dist.get_rank() if dist.is_initialized() else 0
    return torch.randn(8, 37, generator=torch.Generator().manual_seed(100 + step + 1000 * rank))


def begin() -> None:
    """Let DeepSpeed use the group of this job, on a CPU."""
    import deepspeed
    from deepspeed.comm import comm
    from deepspeed.utils import groups

    comm.cdb = None  # of the group of an earlier job
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled
    for name, value in list(vars(groups).items()):
        if isinstance(value, dist.ProcessGroup) or name == "mesh_device":
            setattr(groups, name, None)
    os.environ.update(LOCAL_RANK=str(dist.get_rank()), RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()))
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True  # slowly, on CPUs
    deepspeed.utils.logger.setLevel("ERROR")
    deepspeed.init_distributed(dist_backend="gloo", dist_init_required=False)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    # Two groups, as with weight decay on matrices alone.
    split = [{"params": [p for p in parameters if p.dim() > 1]}, {"params": [p for p in parameters if p.dim() <= 1]}]
    return torch.optim.Adam(split, lr=0.02)


def engine_of(kind: str, accumulate: int = 1, **more: Any) -> Any:
    import deepspeed

    begin()
    model = net()
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": accumulate,
        "zero_allow_untested_optimizer": True,
        **KINDS[kind],
        **more,
    }
    optimizer = adam(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def attach(engine: Any, half_life: str = HALF_LIFE, **options: Any) -> Any:
    from polyak import EMA
    from polyak.hosts.deepspeed import attach as attach_deepspeed

    return attach_deepspeed(EMA(half_life, **options), engine)


def dtype(engine: Any) -> torch.dtype:
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(
        "bfloat16" if engine.bfloat16_enabled() else "float16" if engine.fp16_enabled() else "", torch.float32
    )


def train(engine: Any, steps: range) -> None:
    engine.train()
    for step in steps:
        output = engine(batch(step).to(dtype(engine)))
        engine.backward((output.float() - 1).square().mean())
        engine.step()


def master(engine: Any) -> dict[str, Tensor]:
    """Return the whole masters by name, by DeepSpeed's own means."""
    from deepspeed.utils import safe_get_full_fp32_param

    found = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            if type(engine.optimizer).__name__ in ("FP16_Optimizer", "FP16_UnfusedOptimizer", "Adam", "AdamW"):
                found[name] = _replicated(engine.optimizer, parameter)
            else:
                found[name] = safe_get_full_fp32_param(parameter).detach().clone().cpu()
    return found


def _replicated(optimizer: Any, parameter: Tensor) -> Tensor:
    groups = getattr(optimizer, "fp16_groups", None)
    if groups is None:
        return parameter.detach().clone()
    for i, group in enumerate(groups):
        start = 0
        for j, own in enumerate(group):
            if own is parameter:
                if hasattr(optimizer, "fp32_groups"):
                    return optimizer.fp32_groups[i][j].detach().clone()
                flat = optimizer.fp32_groups_flat[i].detach()
                return flat[start : start + own.numel()].view(own.shape).clone()
            start += own.numel()
    raise AssertionError("no master")


@torch.no_grad()
def evaluated(engine: Any) -> Tensor:
    x = torch.randn(5, 37, generator=torch.Generator().manual_seed(9))
    engine.eval()
    output = engine(x.to(dtype(engine))).clone()
    engine.train()
    return output


def error(averages: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    assert averages.keys() == reference.keys(), averages.keys() ^ reference.keys()
    return max(((averages[n].double() - r).norm() / (r.norm() + 1e-30)).item() for n, r in reference.items())


def reference_of(engine: Any, reference: dict[str, Tensor] | None) -> dict[str, Tensor]:
    now = {name: tensor.double() for name, tensor in master(engine).items()}
    if reference is None:
        return now
    return {name: DECAY * reference[name] + (1 - DECAY) * tensor for name, tensor in now.items()}


def single(reference: dict[str, Tensor], engine: Any, buffers: dict[str, Tensor]) -> Tensor:
    """Return the output of a model on one process that holds the reference."""
    model = net().to(dtype(engine))
    state = {**model.state_dict(), **{n: t.to(dtype(engine)) for n, t in reference.items()}, **buffers}
    model.load_state_dict(state)
    return model.eval()(torch.randn(5, 37, generator=torch.Generator().manual_seed(9)).to(dtype(engine))).detach()


# Jobs


def follows(kind: str) -> dict[str, Any]:
    """Train; compare the average, a swap and later training to references."""
    from torch.profiler import ProfilerActivity, profile

    from polyak import Offload

    plain = engine_of(kind)
    train(plain, range(9))
    expected = master(plain)
    engine = engine_of(kind)
    ema, reference = attach(engine, offload=Offload() if "offloaded average" in kind else None), None
    for step in range(6):
        train(engine, range(step, step + 1))
        reference = reference_of(engine, reference)
    shadow = ema.average._average.shadow
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        shadow.update_(0.0)
    words = ("c10d", "gloo", "all_gather", "all_reduce", "broadcast", "reduce_scatter", "record_param_comms")
    messages = sorted({e.key for e in profiled.key_averages() if any(word in e.key for word in words)})
    updates = ema.num_updates - 1  # without the one that was profiled
    before = evaluated(engine)
    raw = master(engine)
    kept = [p for p in engine.module.parameters() if getattr(p, "ds_persist", True)]
    shapes = [parameter.shape for parameter in kept]
    with ema.applied() as model:
        reshaped = [parameter.shape for parameter in kept] != shapes
        swapped = master(engine)
        output = evaluated(engine)
        buffers = {n: b.detach().clone() for n, b in model.named_buffers()}
    again = evaluated(engine)
    restored = master(engine)
    distance = ema.metrics()["ema/distance"]
    train(engine, range(6, 9))
    after = master(engine)
    squares = sum((raw[n].double() - r).square().sum() for n, r in reference.items())
    return {
        "messages": messages,
        "error": error(swapped, reference),
        "moved": error(raw, reference),
        "output": output,
        "single": single(reference, engine, buffers),
        "outputs moved": not torch.equal(before, output),
        "restored": torch.equal(before, again) and all(torch.equal(restored[n], raw[n]) for n in raw),
        "harmless": [n for n in expected if not torch.equal(expected[n], after[n])],
        "distance": (distance, (squares / sum(r.square().sum() for r in reference.values())).sqrt().item()),
        "updates": updates,
        "reshaped": reshaped,
        "elements": sum(a.numel() for a in shadow.averages.values()),
    }


def counts(kind: str) -> dict[str, Any]:
    """Accumulate over two batches; in fp16, let a step overflow."""
    engine = engine_of(kind, accumulate=2)
    ema = attach(engine)
    train(engine, range(4))
    found = {"after 4 batches": (ema.num_updates, ema.timestamp.batch.value, ema.timestamp.sample.value)}
    if engine.fp16_enabled():
        for step in range(2):
            engine.backward((engine(batch(step).half()).float() * 1e30).square().mean())
            engine.step()
        found["after an overflow"] = ema.num_updates
    ema.detach()
    train(engine, range(2))
    found["after detach"] = ema.num_updates
    found["methods"] = [name for name in ("step", "backward", "save_checkpoint") if name in vars(engine)]
    return found


def move_masters(engine: Any) -> None:
    """Move the masters of ZeRO-3 in memory, as ``reload_states`` does with DeepSpeed's own Adam, which needs a GPU."""
    for flat in engine.optimizer.fp32_partitioned_groups_flat:
        flat.data = flat.data.clone()


def moves(kind: str) -> dict[str, Any]:
    """Let the engine offload its masters and load them again, which moves them in memory; then train on."""
    engine = engine_of(kind)
    ema, reference, found = attach(engine), None, {"offloaded": ""}
    for step in range(6):
        train(engine, range(step, step + 1))
        reference = reference_of(engine, reference)
        if step == 3 and "zero 3" in kind:
            move_masters(engine)
        elif step == 3:
            engine.offload_states(pin_memory=False)
            try:
                with ema.applied():
                    pass
            except Exception as refused:
                found["offloaded"] = f"{type(refused).__name__}: {refused}"
            engine.reload_states()
    with ema.applied():
        swapped = master(engine)
    return {**found, "error": error(swapped, reference), "updates": ema.num_updates}


def refuses(kind: str, folder: str) -> dict[str, str]:
    """Return the errors of what must not run while the average is swapped in, and of what no rank can do."""
    from polyak import EMA, Recorder
    from polyak.hosts.deepspeed import attach as attach_deepspeed

    engine = engine_of(kind)
    ema = attach(engine)
    train(engine, range(2))
    found = {}

    def attempt(name: str, act: Any) -> None:
        try:
            act()
            found[name] = "nothing"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"

    before = master(engine)
    with ema.applied():
        loss = engine(batch(0).to(dtype(engine))).float().square().mean()
        attempt("backward", lambda: engine.backward(loss))
        attempt("plain backward", lambda: engine(batch(0).to(dtype(engine))).float().square().mean().backward())
        own = engine.module(batch(0).to(dtype(engine))).float().square().mean()  # of which the engine sees no forward
        attempt("backward of the module", lambda: engine.backward(own))
        attempt("step", engine.step)
        attempt("save", lambda: engine.save_checkpoint(folder))
        attempt("load", lambda: engine.load_checkpoint(folder))
        attempt("state", ema.state_dict)
        attempt("second", lambda: ema.applied().__enter__())
    after = master(engine)
    found["lost"] = str([n for n in before if not torch.equal(before[n], after[n])])
    found["gradients"] = str(
        [n for n, p in engine.module.named_parameters() if p.grad is not None and bool(p.grad.any())]
    )
    import copy

    attempt("model", lambda: ema.model)
    attempt("copy", lambda: copy.deepcopy(ema))
    attempt("by hand", ema.step)
    attempt("recorder", lambda: attach_deepspeed(Recorder(folder, "1ba"), engine))
    attempt("engine", lambda: attach_deepspeed(EMA("2ba"), nn.Linear(2, 2)))
    return found


def saves(kind: str, folder: str) -> dict[str, Tensor]:
    """Save after 4 steps by the engine, and by DCP; return the averages that one then has after 7."""
    engine = engine_of(kind)
    ema = attach(engine)
    train(engine, range(4))
    engine.save_checkpoint(folder)
    dcp.save({"ema": ema.state_dict()}, checkpoint_id=folder + "/alone")
    with ema.applied():
        saved = master(engine)
    ema.save(folder + "/averaged.safetensors")
    ema.save(folder + "/averaged32.safetensors", dtype=torch.float32)
    published = dict[str, Tensor]()
    before = master(engine)
    ema.publish(lambda name, tensor: published.update({name: tensor.clone()}), every_rank=True)
    assert all(torch.equal(before[name], now) for name, now in master(engine).items())
    train(engine, range(4, 7))
    with ema.applied():
        return {"saved": saved, "later": master(engine), "published": published}


def resumes(kind: str, folder: str) -> dict[str, Any]:
    """Resume from the engine's checkpoint on as many ranks, and return the averages after 7 steps."""
    engine = engine_of(kind)
    ema = attach(engine)
    engine.load_checkpoint(folder)
    train(engine, range(4, 7))
    with ema.applied():
        return {"later": master(engine), "updates": ema.num_updates}


def loads(kind: str, folder: str) -> dict[str, Tensor]:
    """Load the state alone on any number of ranks under any stage, and return the averages."""
    engine = engine_of(kind)
    ema = attach(engine)
    state = {"ema": ema.state_dict()}
    dcp.load(state, checkpoint_id=folder + "/alone")
    ema.load_state_dict(state["ema"])
    with ema.applied():
        return master(engine)


def is_killed(kind: str, folder: str, at: int) -> None:
    """Save after each step, and die before the step ``at``."""
    engine = engine_of(kind)
    ema = attach(engine)
    if (Path(folder) / "latest").exists():
        engine.load_checkpoint(folder)
    for step in range(int(engine.global_steps), 6):
        if step == at:
            dist.barrier()
            os.kill(os.getpid(), signal.SIGKILL)
        train(engine, range(step, step + 1))
        engine.save_checkpoint(folder)
    with ema.applied():
        average = master(engine)
    raw = master(engine)
    if dist.get_rank() == 0:
        torch.save({"raw": raw, "average": average}, Path(folder, "end.pt"))

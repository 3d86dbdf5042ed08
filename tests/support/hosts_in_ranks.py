"""Scripts in frameworks that train on several processes; ``ranks.Ranks`` runs them.

Each trains ``EPOCHS`` epochs of ``STEPS`` steps, evaluates and saves at the end of each, and returns a ``Found``.
"""

import json
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import loops
import torch
import torch.distributed as dist
from sharded import full
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader

from polyak import EMA, HalfLife, Record, Uniform
from polyak.averaging.weights import Shadow
from polyak.record.manifest import MANIFEST
from polyak.sharding import reshard

EPOCHS, STEPS = 2, 3
DECAY = 0.5**0.5


def net() -> nn.Module:
    """5 rows do not divide by 2."""
    return loops.seeded(lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)))


def shard(model: nn.Sequential, mesh: Any = None) -> nn.Sequential:
    fully_shard(model[0], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.02)


@dataclass
class Found:
    """The results of a script, to compare between ranks and runs.

    Args:
        weights: At the end, unsharded, by canonical name.
        average: The same for the average.
        want: The average of the parameters after each step, by the formula.
        exact: The average of the unsharded parameters, bit for bit.
        evaluated: The first layer's weight, in each evaluation.
        loadable: The weights that users of this framework load from the checkpoint of the first epoch.
        lines: How often the distance of the average was logged.
        distances: The logged values, if the logger keeps them.
        recorded: The record's average, where there is one.
        pinned: The checkpoints whose files the record keeps.
        saved: The weights after the first epoch.
        samples: How many the average has seen, on all ranks.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)
    want: list[dict[str, Tensor]] = field(default_factory=list)
    exact: dict[str, Tensor] = field(default_factory=dict)
    evaluated: list[Tensor] = field(default_factory=list)
    loadable: dict[str, Tensor] = field(default_factory=dict)
    lines: int = 0
    distances: list[float] = field(default_factory=list)
    recorded: dict[str, Tensor] = field(default_factory=dict)
    pinned: set[str] = field(default_factory=set)
    saved: dict[str, Tensor] = field(default_factory=dict)
    samples: int = 0

    def watch(self, model: nn.Sequential) -> None:
        """Store the weights with which the model is evaluated."""

        def note(layer: nn.Linear, inputs: Any, output: Any) -> None:
            if not model.training:
                self.evaluated.append(full(layer.weight))

        model[0].register_forward_hook(note)

    def follow(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Compute the average."""
        profile, copies, shadows = HalfLife("2ba"), nn.ParameterList(), list[Shadow]()

        def after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            if any(parameter.grad is None for parameter in model.parameters()):
                return
            weights = {name: full(parameter) for name, parameter in model.named_parameters()}
            now = {name: tensor.double() for name, tensor in weights.items()}
            last = self.want[-1] if self.want else now
            self.want.append({name: DECAY * last[name] + (1 - DECAY) * now[name] for name in now})
            step = len(self.want)
            if step == STEPS:
                self.saved = weights
            if not shadows:
                copies.extend(weights.values())
                shadows.append(Shadow(copies))
            else:
                torch._foreach_copy_([copy.detach() for copy in copies], list(weights.values()))
                shadows[0].update_(1 - profile.decay(step - 1.0, float(step)))
            self.exact = dict(zip(weights, shadows[0].averages.values(), strict=True))

        optimizer.register_step_post_hook(after)

    def end(self, model: nn.Module, ema: EMA) -> "Found":
        reshard(model)
        self.weights = {name: full(tensor) for name, tensor in model.named_parameters()}
        ema._average.agree()
        self.average = _inner({name: full(tensor) for name, tensor in ema._shadow.averaged_tensors().items()})
        self.loadable = _inner(self.loadable)
        self.samples = ema.state_dict()["updated_at"]["sample"]
        return self


def _inner(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefix of the framework's module from a name."""
    return {name.removeprefix("net."): tensor for name, tensor in tensors.items()}


class Odd(EMA):
    """Averages with a wrong value on one rank."""

    def apply(self, event: Any, state: Any, logger: Any) -> None:
        super().apply(event, state, logger)
        if self.num_updates == 2 and dist.get_rank() == 1:
            next(iter(self._shadow.averages.values())).view(-1)[0] += 1


def ema_for(kind: str) -> EMA:
    options = {"mesh": init_device_mesh("cpu", (dist.get_world_size(),))} if kind == "ddp, divided average" else {}
    half_life = "3ba" if kind == "fsdp, disagreeing" and dist.get_rank() == 1 else "2ba"
    return (Odd if kind == "ddp, disagreeing" else EMA)(half_life, **options)


def environment() -> None:
    """Set the environment variables of a launcher."""
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "OMP_NUM_THREADS": "1"}
    warnings.simplefilter("ignore")


def data(seed: int = 0, batches: int = STEPS) -> Any:
    return loops.dataset(batches * dist.get_world_size(), seed=seed)


def fsdp_on_a_cpu() -> None:
    """Make Accelerate accept FSDP2 on a CPU, and reset its state of the last script."""
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    if hasattr(AcceleratorState, "unpatched"):
        return
    AcceleratorState.unpatched = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        AcceleratorState.unpatched(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


# Lightning


def lightning(kind: str, folder: str, resume: bool = False) -> Found:
    environment()
    import lightning.pytorch as pl
    from lightning.fabric.utilities.load import _load_distributed_checkpoint
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import Logger
    from lightning.pytorch.strategies import ModelParallelStrategy
    from lightning.pytorch.utilities import rank_zero_only

    from polyak.hosts.lightning import Averaging

    class Kept(Logger):
        name, version = "kept", 0

        @rank_zero_only
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            found.lines += "ema/distance" in metrics

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
            """Nothing."""

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()
            found.watch(self.net)

        def configure_model(self) -> None:
            if fsdp and not isinstance(self.net, FSDPModule):  # it is called for each fit and validation
                shard(self.net, self.device_mesh["data_parallel"])

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.net(batch[0])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            optimizer = optimizer_of(self)
            found.follow(self.net, optimizer)
            return optimizer

    found, path = Found(), Path(folder)
    parts = kind != "fsdp, one file"
    fsdp = kind.startswith("fsdp")
    strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=parts) if fsdp else "ddp"
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        strategy=strategy,
        devices=dist.get_world_size(),
        accelerator="cpu",
        callbacks=[Averaging(ema := ema_for(kind)), ModelCheckpoint(path, save_top_k=-1, filename="{epoch}")],
        num_sanity_val_steps=0,
        logger=Kept(),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Module()
    loaders = DataLoader(data(), batch_size=loops.BATCH), DataLoader(data(5, 1), batch_size=loops.BATCH)
    trainer.fit(module, *loaders, ckpt_path=path / "epoch=0.ckpt" if resume else None)
    if not resume:
        trainer.validate(module, loaders[1], verbose=False)
        if fsdp and parts:
            found.loadable = _load_distributed_checkpoint(path / "epoch=0.ckpt")["state_dict"]
        else:
            found.loadable = torch.load(path / "epoch=0.ckpt", weights_only=True)["state_dict"]
    return found.end(module.net, ema)


# Fabric


def fabric(kind: str, folder: str, resume: bool = False) -> Found:
    environment()
    from lightning.fabric import Fabric
    from lightning.fabric.loggers.logger import Logger, rank_zero_only

    from polyak.hosts.lightning import attach

    class Kept(Logger):
        name, version = "kept", 0

        @rank_zero_only
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            found.lines += "ema/distance" in metrics

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
            """Nothing."""

    found, path = Found(), Path(folder)
    fabric = Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy="ddp", loggers=Kept())
    fabric.launch()
    inner = net()
    model, optimizer = fabric.setup(inner, optimizer_of(inner))
    loader = fabric.setup_dataloaders(DataLoader(data(), batch_size=loops.BATCH))
    attached = attach(ema := ema_for(kind), fabric, model, optimizer, steps_per_epoch=STEPS)
    found.follow(inner, optimizer.optimizer)
    found.watch(inner)
    inputs = data(1, 1)[:][0]
    state = {"model": model, "optimizer": optimizer, "ema": attached}

    @torch.no_grad()
    def evaluate() -> None:
        model.eval()
        with attached.applied():
            model(inputs)
        model.train()

    if resume:
        fabric.load(path / "state-0.ckpt", state)
    for epoch in range(attached.timestamp.epoch.value, EPOCHS):
        for x, y in loader:
            fabric.backward(nn.functional.cross_entropy(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
        evaluate()
        fabric.save(path / f"state-{epoch}.ckpt", state)
        if epoch == 0:
            with attached.applied():
                fabric.save(path / "averaged.ckpt", {"model": model})
    if not resume:
        evaluate()
        found.loadable = torch.load(path / "averaged.ckpt", weights_only=True)["model"]
    return found.end(inner, ema)


# Accelerate


def accelerate(kind: str, folder: str, resume: bool = False) -> Found:
    environment()
    fsdp_on_a_cpu()
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.tracking import GeneralTracker
    from safetensors.torch import load_file

    from polyak.hosts.accelerate import attach

    class Kept(GeneralTracker):
        name, requires_logging_directory, tracker = "kept", False, None

        def store_init_configuration(self, values: Any) -> None:
            """Nothing."""

        def log(self, values: dict[str, float], step: int | None = None, **kwargs: Any) -> None:
            found.lines += "ema/distance" in values

    found, path = Found(), Path(folder)
    os.environ["ACCELERATE_USE_FSDP"] = "false"
    plugin = None
    if kind.startswith("fsdp"):
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="size_based_wrap",
            min_num_params=1,
            cpu_ram_efficient_loading=False,
            state_dict_type="FULL_STATE_DICT" if kind == "fsdp, one file" else "SHARDED_STATE_DICT",
        )
    accelerator = Accelerator(cpu=True, log_with=Kept(), fsdp_plugin=plugin)
    accelerator.init_trackers("run")
    inner = net()
    model, optimizer, loader = accelerator.prepare(
        inner, optimizer_of(inner), DataLoader(data(), batch_size=loops.BATCH)
    )
    assert (type(model).__name__ == "DistributedDataParallel") == (plugin is None)
    ema = ema_for(kind)
    attached = attach(ema, accelerator, model, optimizer, steps_per_epoch=STEPS)
    found.follow(inner, optimizer.optimizer)
    found.watch(inner)
    inputs = data(1, 1)[:][0]

    @torch.no_grad()
    def evaluate() -> None:
        model.eval()
        with attached.applied():
            model(inputs)
        model.train()

    if resume:
        accelerator.load_state(path / "state-0")
    for epoch in range(attached.timestamp.epoch.value, EPOCHS):
        for x, y in loader:
            accelerator.backward(nn.functional.cross_entropy(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
        evaluate()
        accelerator.save_state(path / f"state-{epoch}")
        if epoch == 0:
            with attached.applied():
                accelerator.save_model(model, path / "for-use")
    if not resume:
        evaluate()
        dist.barrier()
        found.loadable = load_file(path / "for-use" / "model.safetensors")
    return found.end(inner, ema)


# Transformers


def transformers(kind: str, folder: str, resume: bool = False) -> Found:
    environment()
    fsdp_on_a_cpu()
    import transformers
    from safetensors.torch import load_file

    from polyak.hosts.transformers import attach

    class Classifier(nn.Module):
        main_input_name = "x"

        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.net(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    class Kept(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            found.lines += state.is_world_process_zero and "ema/distance" in logs

    def collate(samples: list[Any]) -> dict[str, Tensor]:
        inputs, labels = zip(*samples, strict=True)
        return {"x": torch.stack(inputs), "labels": torch.stack(labels)}

    found, path = Found(), Path(folder)
    os.environ["ACCELERATE_USE_FSDP"] = "false"
    fsdp: dict[str, Any] = {}
    if kind.startswith("fsdp"):
        state_dict_type = "FULL_STATE_DICT" if kind == "fsdp, one file" else "SHARDED_STATE_DICT"
        config = {
            "version": 2,
            "min_num_params": 1,
            "state_dict_type": state_dict_type,
            "cpu_ram_efficient_loading": False,
        }
        fsdp = {"fsdp": True, "fsdp_config": config}
    model = Classifier()
    found.watch(model.net)
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            output_dir=folder,
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=loops.BATCH,
            per_device_eval_batch_size=loops.BATCH,
            learning_rate=0.02,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            eval_strategy="epoch",
            # Under DDP also inside an epoch, from where that run resumes.
            **({"save_strategy": "steps", "save_steps": 1} if kind == "ddp" else {"save_strategy": "epoch"}),
            max_grad_norm=0.0,
            use_cpu=True,
            ddp_backend="gloo",
            report_to="none",
            disable_tqdm=True,
            **fsdp,
        ),
        data_collator=collate,
        train_dataset=data(),
        eval_dataset=data(1, 1),
        callbacks=[Kept()],
    )
    create = trainer.create_optimizer

    def create_optimizer(*args: Any) -> Any:
        optimizer = create(*args)
        found.follow(model.net, optimizer)
        return optimizer

    trainer.create_optimizer = create_optimizer
    attach(ema := ema_for(kind), trainer)
    saved = STEPS - 1 if kind == "ddp" else STEPS
    trainer.train(resume_from_checkpoint=str(path / f"checkpoint-{saved}") if resume else None)
    if not resume:
        trainer.evaluate()
        if kind != "fsdp":
            found.loadable = load_file(path / f"checkpoint-{STEPS}" / "model.safetensors")
    return found.end(model.net, ema)


# Composer


def composer(kind: str, folder: str, resume: bool = False, averages: bool = True) -> Found:
    environment()
    os.environ["NODE_RANK"] = "0"
    from composer import Trainer
    from composer.loggers import LoggerDestination
    from composer.utils import FSDP2Config
    from composer.utils import dist as composers
    from composer_script import Wrapped
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    from polyak.hosts import composer as hosted

    class Kept(LoggerDestination):
        def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
            if dist.get_rank() == 0 and "ema/distance" in metrics:
                found.lines += 1
                found.distances.append(metrics["ema/distance"])

    found, path = Found(), Path(folder)
    model, train, held = Wrapped(net()), data(), data(1, 1)
    first_loads = kind == "fsdp, first rank loads"
    if first_loads and dist.get_rank() > 0:
        model.to("meta")
    found.watch(model.net)
    optimizer = optimizer_of(model)
    found.follow(model.net, optimizer)
    ema, algorithms, parallelism, checkpoint = hosted.EMA("2ba"), [], None, f"ep1-ba{STEPS}-rank0.pt"
    ema.algorithm = ema_for(kind)
    if kind.startswith(("fsdp", "tp")):
        parts = kind not in {"fsdp, one file", "fsdp, first rank loads"}
        checkpoint = f"ep1-ba{STEPS}" if parts else checkpoint
        model.net.fsdp_wrap_fn = lambda module: module is model.net[0]
        parallelism = {
            "fsdp": FSDP2Config(state_dict_type="sharded" if parts else "full", load_monolith_rank0_only=first_loads)
        }
        parallelism |= {"tp": {"tensor_parallel_degree": 2}} if kind == "tp" else {}
        algorithms = [hosted.Recorder(path / "record", "2ba")]
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(train, batch_size=loops.BATCH, sampler=composers.get_sampler(train, shuffle=False)),
        eval_dataloader=DataLoader(held, batch_size=loops.BATCH, sampler=composers.get_sampler(held, shuffle=False)),
        max_duration=f"{EPOCHS}ep",
        algorithms=[ema, *algorithms] if averages else [],
        parallelism_config=parallelism,
        optimizers=optimizer,
        loggers=[Kept()],
        save_folder=str(path),
        save_interval="1ep",
        save_overwrite=True,
        load_path=str(path / checkpoint) if resume else None,
        device="cpu",
        progress_bar=False,
        seed=3,
    )
    if resume:
        trainer.eval()
    trainer.fit()
    assert (type(trainer.state.model).__name__ == "DistributedDataParallel") == kind.startswith("ddp")
    if not averages:
        found.weights = {name: full(tensor) for name, tensor in model.net.named_parameters()}
        return found
    if algorithms:
        dist.barrier()
        found.recorded = _inner(Record(path / "record").average(Uniform()))
        found.pinned = {name.partition("@")[0] for name in json.loads((path / "record" / MANIFEST).read_text())["pins"]}
    if not resume:
        trainer.eval()
        dist.barrier()
        file = path / checkpoint
        if file.is_dir():
            file = path / f"whole-{dist.get_rank()}.pt"
            dcp_to_torch_save(path / checkpoint, file)
        found.loadable = torch.load(file, weights_only=False)["state"]["model"]
        found.loadable = {name.removeprefix("module."): tensor for name, tensor in found.loadable.items()}
    return found.end(model.net, ema.algorithm)

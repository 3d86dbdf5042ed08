"""Scripts in frameworks that train on several processes; ``ranks.Ranks`` runs them.

Each trains ``EPOCHS`` epochs of ``STEPS`` steps, evaluates and saves at the end of each, and returns a ``Found``.
"""

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
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from polyak import EMA
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
    """What a script came to, for the test to compare between ranks and runs.

    Args:
        weights: At the end, whole, by canonical name.
        average: The same of the average.
        want: The average after each step, of the parameters in order, by the formula.
        evaluated: The first layer's weight, in each evaluation.
        loadable: What this framework's users load from the checkpoint of the first epoch.
        lines: How often the distance of the average was logged.
        files: What is in the checkpoint of the first epoch.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)
    want: list[list[Tensor]] = field(default_factory=list)
    evaluated: list[Tensor] = field(default_factory=list)
    loadable: dict[str, Tensor] = field(default_factory=dict)
    lines: int = 0
    files: list[str] = field(default_factory=list)

    def watch(self, model: nn.Sequential) -> None:
        """Note with which weights the model is evaluated."""

        def note(layer: nn.Linear, inputs: Any, output: Any) -> None:
            if not model.training:
                self.evaluated.append(full(layer.weight))

        model[0].register_forward_hook(note)

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Work out the average."""

        def after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            now = [full(p).double() for group in optimizer.param_groups for p in group["params"]]
            last = self.want[-1] if self.want else now
            self.want.append([DECAY * a + (1 - DECAY) * w for a, w in zip(last, now, strict=True)])

        optimizer.register_step_post_hook(after)

    def end(self, model: nn.Module, ema: EMA) -> "Found":
        reshard(model)
        self.weights = {name: full(tensor) for name, tensor in model.named_parameters()}
        ema._agree()
        self.average = {name: full(tensor) for name, tensor in ema._shadow.averaged_tensors().items()}
        return self


class Odd(EMA):
    """Averages that a wrong value gets into on one rank."""

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict()

    def apply(self, event: Any, state: Any, logger: Any) -> None:
        super().apply(event, state, logger)
        if self.num_updates == 2 and dist.get_rank() == 1:
            next(iter(self._shadow.averages.values())).view(-1)[0] += 1


def ema_for(kind: str) -> EMA:
    options = {"mesh": init_device_mesh("cpu", (dist.get_world_size(),))} if kind == "ddp, divided average" else {}
    return (Odd if kind == "ddp, disagreeing" else EMA)("2ba", **options)


def environment() -> None:
    """Say what a launcher would say."""
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "OMP_NUM_THREADS": "1"}
    warnings.simplefilter("ignore")


def listed(folder: Path) -> list[str]:
    dist.barrier()
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def data(seed: int = 0, batches: int = STEPS) -> Any:
    return loops.dataset(batches * dist.get_world_size(), seed=seed)


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
            if kind.startswith("fsdp"):
                shard(self.net, self.device_mesh["data_parallel"])

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.net(batch[0])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            optimizer = optimizer_of(self)
            found.follow(optimizer)
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
        found.files = listed(path)
        trainer.validate(module, loaders[1], verbose=False)
        if fsdp and parts:
            found.loadable = _load_distributed_checkpoint(path / "epoch=0.ckpt")["state_dict"]
        else:
            found.loadable = torch.load(path / "epoch=0.ckpt", weights_only=True)["state_dict"]
        found.loadable = {name.removeprefix("net."): tensor for name, tensor in found.loadable.items()}
    return found.end(module, ema)

"""Lightning's ``Trainer`` and Fabric, held to the contract, and what goes wrong there without care."""

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import loops
import pytest
import torch
from host_contract import HostContract, Plan, Probe, Session, Watched, net_of, of_net
from torch import Tensor, nn
from torch.utils.data import DataLoader

from polyak import EMA, Event, MismatchError, PlanWarning, Recorder, attach
from polyak.shadow import loan_of
from polyak.trainer.batches import num_samples

lightning = pytest.importorskip("lightning", minversion="2.6")

from lightning.pytorch import LightningModule, Trainer  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint  # noqa: E402

from polyak.hosts.lightning import Averaging  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        ".*does not have many workers",
        ".*`isinstance.treespec, LeafSpec.` is deprecated",  # Lightning with torch 2.13
        ".*Checkpoint directory .* exists and is not empty",
        ".*smaller than the logging interval",
        "The dirpath has changed from",
        "You defined a `validation_step` but have no `val_dataloader`",
    )
]


class Module(LightningModule):
    """What a user writes."""

    def __init__(self, net: nn.Module, plan: Plan) -> None:
        super().__init__()
        self.net, self.plan = net, plan

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        return nn.functional.cross_entropy(self.net(inputs), targets)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.plan.optimizer(self.net)


def trainer_for(folder: Path, plan: Plan, *callbacks: Any, **options: Any) -> Trainer:
    return Trainer(
        **{
            "max_epochs": plan.epochs,
            "accumulate_grad_batches": plan.accumulate,
            "callbacks": list(callbacks),
            "num_sanity_val_steps": 0,
            "default_root_dir": folder,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        | options
    )


class LightningSession:
    def __init__(self, net: nn.Module, algorithm: EMA, folder: Path, plan: Plan) -> None:
        self.folder, self.plan, self.module = folder, plan, Module(net, plan)
        saves: list[Any] = []
        if plan.save_every:
            saves.append(ModelCheckpoint(folder, "epoch-{step}", save_top_k=-1, save_on_train_epoch_end=True))
            if plan.save_every % plan.steps:
                saves.append(ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=plan.save_every))
        averaging = Averaging(algorithm, num_samples=num_samples)
        self.trainer = trainer_for(folder, plan, averaging, *saves)

    def fit(self, resume: Path | None = None) -> None:
        evaluated = [self.plan.eval_loader] if self.plan.evaluate else []
        self.trainer.fit(self.module, self.plan.loader, *evaluated, ckpt_path=resume)

    def evaluate(self) -> None:
        self.trainer.validate(self.module, self.plan.eval_loader, verbose=False)

    def predict(self) -> None:
        self.trainer.predict(self.module, self.plan.eval_loader)

    def save(self) -> Path:
        self.trainer.save_checkpoint(self.folder / "by-hand.ckpt")
        return self.folder / "by-hand.ckpt"

    def checkpoint(self, step: int) -> Path:
        return self.folder / f"{'' if step % self.plan.steps else 'epoch-'}step={step}.ckpt"


class LightningHost:
    lacks: Mapping[str, str] = {
        "mid-epoch": "Lightning resumes inside an epoch only with a loader that has a state, and torch's has none"
    }
    golden = """
        init fit_start
        epoch_start batch_end
        batch_end epoch_end eval_before_all eval_start eval_end eval_after_all save_start save_end
        epoch_start batch_end
        batch_end epoch_end eval_before_all eval_start eval_end eval_after_all save_start save_end
        fit_end
    """

    def session(self, net: nn.Module, algorithm: EMA, folder: Path, plan: Plan) -> Session:
        return LightningSession(net, algorithm, folder, plan)

    def loadable(self, saved: Path) -> Mapping[str, Tensor]:
        return Module.load_from_checkpoint(saved, net=net_of(), plan=Plan(), strict=False).state_dict()


HOST = LightningHost()


class TestContract(HostContract):
    host = HOST

"""The native trainer, held to the contract itself: what the others are compared with."""

from collections.abc import Mapping
from pathlib import Path

import loops
import torch
from host_contract import HostContract, Plan, Session, num_tokens
from torch import Tensor, nn
from torch.utils.data import DataLoader

from polyak import EMA, CheckpointSaver, Trainer
from polyak.trainer.loggers import Destination


class Kept(Destination):
    def __init__(self) -> None:
        self.lines: list[Mapping[str, float]] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self.lines.append(metrics)


class NativeSession:
    def __init__(self, net: nn.Module, algorithm: EMA, folder: Path, plan: Plan) -> None:
        self.folder, self.log = folder, Kept()
        loader = DataLoader(plan.data, batch_size=loops.BATCH * plan.accumulate, shuffle=plan.shuffle)
        self.options = {
            "model": net,
            "train_dataloader": loader,
            "max_duration": f"{plan.epochs}ep",
            "eval_dataloader": plan.eval_loader if plan.evaluate else None,
            "grad_accum": plan.accumulate,
            "algorithms": algorithm,
            "optimizers": plan.optimizer(net),
            "loss": nn.functional.cross_entropy,
            "loggers": self.log,
            "eval_weights": plan.eval_weights,
            "precision": "amp_fp16" if plan.scaled else "fp32",
            "num_tokens": num_tokens if plan.counted else None,
            "progress_bar": False,
            "callbacks": [CheckpointSaver(folder, f"{plan.save_every}ba")] if plan.save_every else [],
        }
        self.plan = plan
        self.trainer: Trainer | None = None

    def fit(self, resume: Path | None = None) -> None:
        self.trainer = self.trainer or Trainer(load_path=resume, **self.options)
        self.trainer.fit()

    def evaluate(self) -> None:
        self.trainer.eval(self.plan.eval_loader)

    def predict(self) -> None:
        self.trainer.predict(self.plan.eval_loader)

    def save(self) -> Path:
        self.trainer.save_checkpoint(self.folder / "by-hand.pt")
        return self.folder / "by-hand.pt"

    def logged(self, name: str) -> list[float]:
        return [line[name] for line in self.log.lines if name in line]

    def checkpoint(self, step: int) -> Path:
        (found,) = self.folder.glob(f"ep{(step - 1) // self.plan.steps}-ba{step}.pt")
        return found


class NativeHost:
    lacks: Mapping[str, str] = {}
    losses = "eval/loss", "eval_raw/loss"
    uncounted = ("tok", "iter")
    known_late = uncounted
    golden = """
        init before_load after_load fit_start iteration_start
        epoch_start batch_start batch_end batch_checkpoint
        batch_start batch_end batch_checkpoint save_start save_end
        epoch_end eval_before_all eval_start eval_end eval_after_all epoch_checkpoint
        epoch_start batch_start batch_end batch_checkpoint
        batch_start batch_end batch_checkpoint save_start save_end
        epoch_end eval_before_all eval_start eval_end eval_after_all epoch_checkpoint save_start save_end
        fit_end
    """

    def session(self, net: nn.Module, algorithm: EMA, folder: Path, plan: Plan) -> Session:
        return NativeSession(net, algorithm, folder, plan)

    def loadable(self, saved: Path) -> Mapping[str, Tensor]:
        return torch.load(saved, weights_only=True)["model"]


HOST = NativeHost()


class TestContract(HostContract):
    host = HOST

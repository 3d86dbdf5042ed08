"""Ignite's engines, held to the contract, and what goes wrong there without care."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from host_contract import HostContract, Plan, Session, net_of
from torch import Tensor, nn

from polyak import EMA
from polyak.trainer.batches import num_samples

pytest.importorskip("ignite", minversion="0.5.5")

from ignite.engine import Engine, Events, create_supervised_evaluator, create_supervised_trainer  # noqa: E402
from ignite.handlers import Checkpoint, DiskSaver  # noqa: E402

from polyak.hosts.ignite import Averaging  # noqa: E402


class IgniteSession:
    def __init__(self, net: nn.Module, algorithm: EMA, folder: Path, plan: Plan) -> None:
        self.folder, self.plan = folder, plan
        optimizer, accumulate = plan.optimizer(net), plan.accumulate
        loss = nn.functional.cross_entropy
        self.trainer = create_supervised_trainer(net, optimizer, loss, gradient_accumulation_steps=accumulate)
        self.evaluator, self.predictor = create_supervised_evaluator(net), create_supervised_evaluator(net)
        if plan.evaluate:
            self.trainer.add_event_handler(Events.EPOCH_COMPLETED, self.evaluate)
        self.averaging = Averaging(
            algorithm,
            self.trainer,
            net,
            optimizer,
            evaluators=[self.evaluator],
            predictors=[self.predictor],
            gradient_accumulation_steps=accumulate,
            num_samples=num_samples,
        )
        self.objects = {"model": net, "optimizer": optimizer, "trainer": self.trainer, "averaging": self.averaging}
        self.saver = Checkpoint(self.objects, DiskSaver(folder, require_empty=False), n_saved=None)
        if plan.save_every:
            # At the end of an epoch, after its evaluation.
            every, save = plan.save_every * accumulate, self.averaging.saves(self.saver)
            self.trainer.add_event_handler(
                Events.ITERATION_COMPLETED(
                    event_filter=lambda _, step: step % every == 0 and step % (plan.steps * accumulate) != 0
                ),
                save,
            )
            self.trainer.add_event_handler(Events.EPOCH_COMPLETED, save)

    def fit(self, resume: Path | None = None) -> None:
        if resume:
            Checkpoint.load_objects(self.objects, torch.load(resume, weights_only=True))
        else:
            self.trainer.state.max_epochs = None  # from the beginning, also after a run that failed
        self.trainer.run(self.plan.loader, max_epochs=self.plan.epochs)

    def evaluate(self) -> None:
        self.evaluator.run(self.plan.eval_loader)

    def predict(self) -> None:
        self.predictor.run(self.plan.eval_loader)

    def save(self) -> Path:
        saver = Checkpoint(self.objects, DiskSaver(self.folder, require_empty=False), filename_prefix="by-hand")
        self.averaging.saves(saver)(self.trainer)
        return saver.last_checkpoint

    def checkpoint(self, step: int) -> Path:
        return self.folder / f"checkpoint_{step * self.plan.accumulate}.pt"


class IgniteHost:
    lacks: Mapping[str, str] = {
        "mid-epoch": "Ignite resumes inside an epoch only with a loader that has a state, and torch's has none"
    }
    golden = """
        init fit_start
        epoch_start batch_end
        batch_end epoch_end eval_start eval_end save_start save_end
        epoch_start batch_end
        batch_end epoch_end eval_start eval_end save_start save_end
        fit_end
    """

    def session(self, net: nn.Module, algorithm: EMA, folder: Path, plan: Plan) -> Session:
        return IgniteSession(net, algorithm, folder, plan)

    def loadable(self, saved: Path) -> Mapping[str, Tensor]:
        net = net_of()
        Checkpoint.load_objects({"model": net}, saved)
        return net.state_dict()


HOST = IgniteHost()


class TestContract(HostContract):
    host = HOST

"""Loops with Accelerate, held to the contract, and to what only they can get wrong."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import loops
import pytest
import torch
from host_contract import HostContract, Plan, Run, Session, net_of, of_net
from safetensors.torch import load_file
from torch import Tensor, nn

from polyak import EMA, Event, LoanError, Record, Recorder

accelerate = pytest.importorskip("accelerate")
from polyak.hosts.accelerate import attach  # noqa: E402


class AccelerateSession:
    """A script as its users write it."""

    def __init__(self, net: nn.Module, algorithms: Any, folder: Path, plan: Plan) -> None:
        self.folder, self.plan = folder, plan
        self.accelerator = accelerate.Accelerator(
            cpu=True,
            gradient_accumulation_steps=plan.accumulate,
            dataloader_config=accelerate.DataLoaderConfiguration(use_seedable_sampler=plan.shuffle),
        )
        self.net, self.optimizer, self.loader, self.eval_loader = self.accelerator.prepare(
            net, plan.optimizer(net), plan.loader, plan.eval_loader
        )
        self.attached = attach(
            algorithms,
            self.accelerator,
            self.net,
            self.optimizer,
            max_duration=f"{plan.epochs}ep",
            steps_per_epoch=plan.steps,
            samples_per_step=loops.BATCH * plan.accumulate,
        )
        self.done = 0

    def fit(self, resume: Path | None = None) -> None:
        if resume is not None:
            self.accelerator.load_state(resume)
            self.done = int(resume.name.removeprefix("state-"))
        for epoch in range(self.done // self.plan.steps, self.plan.epochs):
            self.loader.set_epoch(epoch)
            skip = self.done % self.plan.steps
            loader = self.accelerator.skip_first_batches(self.loader, skip * self.plan.accumulate)
            for inputs, labels in loader if skip else self.loader:
                with self.accelerator.accumulate(self.net):
                    self.accelerator.backward(nn.functional.cross_entropy(self.net(inputs), labels))
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                if self.accelerator.sync_gradients:
                    self.after_step()
        self.attached.detach()

    def after_step(self) -> None:
        self.done += 1
        if self.plan.evaluate and self.done % self.plan.steps == 0:
            self.evaluate()
        if self.plan.save_every and self.done % self.plan.save_every == 0:
            self.accelerator.save_state(self.checkpoint(self.done))
            with self.attached.applied():
                self.accelerator.save_model(self.net, self.checkpoint(self.done) / "for-use")

    def evaluate(self) -> None:
        with self.attached.applied(), torch.no_grad():
            self.net.eval()
            try:
                for inputs, _ in self.eval_loader:
                    self.net(inputs)
            finally:
                self.net.train()

    predict = evaluate

    def save(self) -> Path:
        with self.attached.applied():
            self.accelerator.save_model(self.net, self.folder / "by-hand" / "for-use")
        return self.folder / "by-hand"

    def checkpoint(self, step: int) -> Path:
        return self.folder / f"state-{step}"


class AccelerateHost:
    lacks: Mapping[str, str] = {
        "random mid-epoch": "skip_first_batches draws from the generators that load_state has just set, so the script "
        "would have to set them again after the first batch",
    }
    golden = """
        init fit_start
        batch_end batch_end epoch_end eval_start eval_end eval_start eval_end
        batch_end batch_end epoch_end eval_start eval_end eval_start eval_end
        fit_end
    """

    def session(self, net: nn.Module, algorithm: EMA, folder: Path, plan: Plan) -> Session:
        return AccelerateSession(net, algorithm, folder, plan)

    def loadable(self, saved: Path) -> Mapping[str, Tensor]:
        return load_file(saved / "for-use" / "model.safetensors")


HOST = AccelerateHost()


class TestContract(HostContract):
    host = HOST

"""Custom training loops: the contract of integrations, and what their users do in them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import loops
import pytest
import torch
from host_contract import HostContract, Plan, Session, net_of
from torch import Tensor, nn

from polyak import EMA, attach


class Log:
    """A logger as its users write one."""

    def __init__(self) -> None:
        self.lines: list[tuple[int | None, Mapping[str, float]]] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.lines.append((step, metrics))


class PlainSession:
    """A loop as its users write it, whose data come in the same order also after a stop inside an epoch."""

    def __init__(self, net: nn.Module, algorithms: Any, folder: Path, plan: Plan) -> None:
        self.folder, self.plan, self.log, self.scaler = folder, plan, Log(), plan.scaler
        self.net, self.optimizer = net, plan.optimizer(net)
        self.loader, self.eval_loader = plan.loader, plan.eval_loader
        self.done, self.epoch_rng = 0, torch.get_rng_state()
        self.attached = self.handle = self.attach(algorithms, **(plan.lengths if plan.counted else {}))

    def attach(self, algorithms: Any, **counts: Any) -> Any:
        return attach(algorithms, self.net, self.optimizer, logger=self.log, **counts)

    def fit(self, resume: Path | None = None) -> None:
        if resume:
            self.load(resume / "state.pt")
        while self.done < self.plan.epochs * self.plan.steps:
            self.train_epoch(self.done % self.plan.steps * self.plan.accumulate)
        self.attached.detach()

    def train_epoch(self, skip: int) -> None:
        now = torch.get_rng_state()
        if skip:
            torch.set_rng_state(self.epoch_rng)
        else:
            self.epoch_rng = now
        batches = iter(self.loader)
        for _ in range(skip):
            next(batches)
        if skip:
            torch.set_rng_state(now)
        self.optimizer.zero_grad()
        for number, (inputs, labels) in enumerate(batches, 1):
            self.backward(nn.functional.cross_entropy(self.net(inputs), labels) / self.plan.accumulate)
            if number % self.plan.accumulate == 0:
                self.step()
                self.optimizer.zero_grad()
                self.after_step()

    def backward(self, loss: Tensor) -> None:
        (self.scaler.scale(loss) if self.scaler else loss).backward()

    def step(self) -> None:
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()

    def after_step(self) -> None:
        self.done += 1
        if self.plan.evaluate and self.done % self.plan.steps == 0:
            self.evaluate()
            if self.plan.choice:
                self.run_evaluation()
        if self.plan.save_every and self.done % self.plan.save_every == 0:
            self.save_state(self.checkpoint(self.done))
            self.save_for_use(self.checkpoint(self.done))

    def evaluate(self) -> None:
        with self.attached.applied():
            self.run_evaluation()

    predict = evaluate

    @torch.no_grad()
    def run_evaluation(self) -> None:
        self.net.eval()
        try:
            for inputs, _ in self.eval_loader:
                self.net(inputs)
        finally:
            self.net.train()

    @property
    def state(self) -> dict[str, Any]:
        return {"model": self.net, "optimizer": self.optimizer, "average": self.attached}

    def save_state(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        random = {"now": torch.get_rng_state(), "epoch": self.epoch_rng}
        states = {name: one.state_dict() for name, one in self.state.items()}
        torch.save({**states, "done": self.done, "random": random}, folder / "state.pt")

    def load(self, path: Path) -> None:
        saved = torch.load(path, weights_only=True)
        for name, one in self.state.items():
            one.load_state_dict(saved[name])
        self.done, self.epoch_rng = saved["done"], saved["random"]["epoch"]
        torch.set_rng_state(saved["random"]["now"])

    def save_for_use(self, folder: Path) -> None:
        with self.attached.applied():
            torch.save(self.net.state_dict(), folder / "averaged.pt")

    def save(self) -> Path:
        self.save_for_use(self.folder)
        return self.folder

    def logged(self, name: str) -> list[float]:
        steps, lines = zip(*self.log.lines, strict=True)
        assert steps == (6, 12, 18)
        return [line[name] for line in lines]

    def checkpoint(self, step: int) -> Path:
        return self.folder / f"step-{step}"


class PlainHost:
    lacks: Mapping[str, str] = {}
    losses = None
    uncounted = ("sp", "tok", "sec", "iter", "ep", "dur")
    known_late = ()
    golden = """
        init fit_start
        batch_end batch_end epoch_end eval_start eval_end eval_start eval_end
        batch_end batch_end epoch_end eval_start eval_end eval_start eval_end
        fit_end
    """

    def session(self, net: nn.Module, algorithm: EMA, folder: Path, plan: Plan) -> Session:
        return PlainSession(net, algorithm, folder, plan)

    def loadable(self, saved: Path) -> Mapping[str, Tensor]:
        return torch.load(saved / "averaged.pt", weights_only=True)


HOST = PlainHost()


class TestContract(HostContract):
    host = HOST


# LoRA


def adapted(seed: int = 0) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return peft.get_peft_model(net_of(), config)


def test_adapters_alone_are_averaged_and_saved_as_adapters_and_resumed(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    plan, model, ema = Plan(save_every=9), adapted(), EMA("4ba")
    session = PlainSession(model, ema, tmp_path, plan)
    session.fit()
    held = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert ema.state_dict()["ema_model"].keys() == held
    assert any("lora_A" in name for name in held)
    training = loops.bits(model)
    with session.attached.applied():
        model.save_pretrained(tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {"adapter_config.json"}
    loaded = loops.bits(peft.PeftModel.from_pretrained(net_of(), tmp_path / "adapter"))
    average = loops.averaged(ema)
    assert not loops.differences({name: average[name] for name in held}, {name: loaded[name] for name in held})
    assert not loops.differences(training, loops.bits(model))
    assert loops.differences(training, average)
    again, other = adapted(seed=7), EMA("4ba")
    PlainSession(again, other, tmp_path / "again", plan).fit(session.checkpoint(9))
    assert not loops.differences([training, ema.state_dict()], [loops.bits(again), other.state_dict()])

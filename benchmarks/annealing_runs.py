"""The runs of ``annealing.py``: a constant rate with its averages and branches, and a cosine."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from annealing_tasks import Data, Task, losses
from torch import Tensor, nn
from torch.optim import Optimizer

from polyak import EMA, attach, polish
from polyak.profiles import Cooldown, HalfLife, Profile

CONSTANT, COSINE = "constant", "cosine"
RAW, SIXTEENTH = "raw", "T/16"
HALF_LIVES = (256, 128, 64, 32, 22.6, 16, 11.3, 8, 4, 2)
SPANS = (5, 10, 20, 40)  # of cooldowns, % of the run
POLISHED = (5, 10)
UNAVERAGED = 10  # polished from raw weights too, to tell what averaging gives
FACTOR = 0.3


def half_life(share: float) -> str:
    return f"T/{share:g}"


def profiles(steps: int) -> dict[str, Profile]:
    """Return the averages that each run is scored at."""
    found: dict[str, Profile] = {
        half_life(share): HalfLife(f"{steps / share}ba", unbiased=True) for share in HALF_LIVES
    }
    found |= {f"virtual {span} %": Cooldown(f"{steps * span // 100}ba") for span in SPANS}
    return found | {"virtual 20 %, 1-square": Cooldown(f"{steps // 5}ba", "1-square")}


@dataclass
class Training:
    """One run: what it trains, and in which order it sees the data."""

    task: Task
    data: Data
    batches: Tensor
    model: nn.Module
    optimizer: Optimizer

    @classmethod
    def start(cls, task: Task, rate: float, seed: int, folder: Path) -> "Training":
        torch.manual_seed(seed)
        model, data = task.network(), task.data()
        if task.begin is not None:
            model.load_state_dict(task.begin(folder))
        order = torch.Generator().manual_seed(1000 + seed)
        batches = torch.randint(len(data.train[0]), (task.steps, task.batch_size), generator=order)
        return cls(task, data, batches, model, task.optimizer(model.parameters(), rate))

    def branch(self) -> "Training":
        """Return a copy that trains on from here, on the same batches."""
        model = self.task.network()
        model.load_state_dict(self.model.state_dict())
        optimizer = self.task.optimizer(model.parameters(), 1.0)
        optimizer.load_state_dict(self.optimizer.state_dict())
        return Training(self.task, self.data, self.batches, model, optimizer)

    def step(self, step: int, rate: float | None) -> None:
        """Do one step; with a rate of None at the one that the optimizer has."""
        if rate is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
        x, y = self.data.train
        rows = self.batches[step]
        losses(self.model, x[rows], y[rows]).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def cool_down(self, begin: int, rate: float) -> "Training":
        """Train to the end at a rate that falls linearly to 0."""
        steps = self.task.steps
        for step in range(begin, steps):
            self.step(step, rate * (steps - step) / (steps - begin))
        return self

    def polish(self, begin: int, ema: EMA) -> "Training":
        schedule = polish(self.model, self.optimizer, ema, self.task.steps - begin, factor=FACTOR)
        for step in range(begin, self.task.steps):
            self.step(step, None)
            schedule.step()
        return self

    @torch.no_grad()
    def scores(self) -> dict[str, list[float]]:
        """Return the loss of each validation example, and the mean over the test examples."""
        validation, test = losses(self.model, *self.data.validation), losses(self.model, *self.data.test)
        return {"validation": [round(x, 5) for x in validation.tolist()], "test": [float(test.mean())]}


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def averages(run: Training, weights: Tensor) -> Iterator[tuple[str, dict]]:
    """Score the exact averages over the weights after every step."""
    steps = len(weights)
    scored = run.branch()
    for name, profile in profiles(steps).items():
        shares = [profile.decay(i + 1, steps) - profile.decay(i, steps) for i in range(steps)]
        average = torch.tensor(shares, dtype=torch.float32) @ weights
        with torch.no_grad():
            nn.utils.vector_to_parameters(average, scored.model.parameters())
        yield name, scored.scores()


def constant(task: Task, rate: float, seed: int, folder: Path) -> dict[str, dict]:
    """Train at a constant rate. Cooldowns and polishes branch from it, on the batches that it sees too."""
    run, steps, found = Training.start(task, rate, seed, folder), task.steps, {}
    weights = torch.empty(steps, sum(p.numel() for p in run.model.parameters()))
    ema = EMA(profile=HalfLife(f"{steps / 16}ba", unbiased=True))
    handle = attach(ema, run.model, run.optimizer)
    branches: dict[int, int] = {steps - steps * span // 100: span for span in SPANS}
    for step in range(steps):
        if (span := branches.get(step)) is not None:
            found[f"cooldown {span} %"] = run.branch().cool_down(step, rate).scores()
            if span in POLISHED:
                found[f"polish {span} %"] = run.branch().polish(step, ema).scores()
            if span == UNAVERAGED:
                found[f"polish {span} % of raw weights"] = run.branch().cool_down(step, FACTOR * rate).scores()
        run.step(step, rate * min(1.0, (step + 1) / task.warmup))
        weights[step] = flat(run.model)
    handle.detach()
    return found | {RAW: run.scores()} | dict(averages(run, weights))


def cosine(task: Task, rate: float, seed: int, folder: Path) -> dict[str, dict]:
    """Train with a cosine to 0, and average that, too."""
    run, steps = Training.start(task, rate, seed, folder), task.steps
    weights = torch.empty(steps, sum(p.numel() for p in run.model.parameters()))
    for step in range(steps):
        fall = (1 + math.cos(math.pi * max(0, step - task.warmup) / (steps - task.warmup))) / 2
        run.step(step, rate * min((step + 1) / task.warmup, fall))
        weights[step] = flat(run.model)
    return {RAW: run.scores()} | dict(averages(run, weights))


RUNS: dict[str, Callable[[Task, float, int, Path], dict[str, dict]]] = {CONSTANT: constant, COSINE: cosine}


class Cache:
    """What was run, as lines of JSON in a folder: a benchmark that is stopped resumes there."""

    def __init__(self, folder: Path, task: Task) -> None:
        self.task, self.folder = task, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / f"{task.name}-{task.steps}.jsonl"
        self.found: dict[tuple[str, float, int], dict[str, dict]] = {}
        if self.file.exists():
            for line in self.file.read_text(encoding="utf-8").splitlines():
                kind, rate, seed, scores = json.loads(line)
                self.found[kind, rate, seed] = scores

    def get(self, kind: str, rate: float, seed: int) -> dict[str, dict]:
        if (kind, rate, seed) not in self.found:
            scores = RUNS[kind](self.task, rate, seed, self.folder)
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps([kind, rate, seed, scores]) + "\n")
            self.found[kind, rate, seed] = scores
            print(f"{self.task.name}: {kind} {rate:g}, seed {seed}: {scores[RAW]['test'][0]:.4f}", flush=True)
        return self.found[kind, rate, seed]

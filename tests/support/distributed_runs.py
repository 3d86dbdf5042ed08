"""Jobs of ``ranks.Ranks`` for the tests of the trainer: the runs of ``loops`` on several ranks."""

import io
import itertools
import json
import os
import shutil
import signal
import time
import types
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import loops
import torch
import torch.distributed as dist
from sharded import Reference, full, unequal, weights
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from polyak import EMA, Callback, CheckpointSaver, Event, Recorder, Trainer
from polyak.cli import main
from polyak.sharding import copy_
from polyak.trainer import fitting
from polyak.training import rng

KINDS = ("ddp", "ddp, divided average", "fsdp2")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


class Centered(nn.Module):
    """Has a buffer that is updated in each forward pass, and is used in the output."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.1)
        return x - self.mean


def noisy_perceptron(seed: int) -> nn.Module:
    return loops.seeded(
        lambda: nn.Sequential(nn.Linear(6, 8), Centered(), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)), seed
    )


def build(kind: str | None, folder: Path, *, noisy: bool = False, model_seed: int = 0, **more: Any) -> Trainer:
    """Return a trainer with all features. Each rank has other initial weights; those of rank 0 count."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if kind == "ddp, divided average" else None
    make = more.pop("algorithm", None)
    algorithm = EMA(more.pop("half_life", "4ba"), mesh=mesh) if make is None else make()
    model = (noisy_perceptron if noisy else loops.perceptron)(model_seed + rank())
    if noisy:
        more["data"] = loops.Noisy()
    if kind == "sharded before":
        model = fully_shard(model)
        broadcast(model)
    elif kind is not None:
        more["parallelism"] = "fsdp2" if kind == "fsdp2" else "ddp"
    return loops.train(folder, ema=algorithm, model=model, shuffle=True, **more)


def broadcast(model: nn.Module) -> None:
    """Give all ranks the initial weights of rank 0."""
    whole = loops.perceptron()
    with torch.no_grad():
        for own, parameter in zip(model.parameters(), whole.parameters(), strict=True):
            copy_(own, parameter)


def averages(trainer: Trainer) -> dict[str, Tensor]:
    """Return the full averages, with the buffers of rank 0."""
    algorithm = trainer.state.algorithms[0]
    algorithm._average.agree()
    return {name: full(tensor) for name, tensor in algorithm._shadow.averaged_tensors().items()}


def held(trainer: Trainer) -> dict[str, Tensor]:
    """Return the full weights, with the buffers of rank 0."""
    trainer._context.group.share_buffers(trainer.state.model)
    return weights(trainer.state.model) if dist.is_initialized() else loops.bits(trainer.state.model)


def results(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """Return everything that a run leaves; the log on rank 0 only."""
    log = folder / "metrics.jsonl"
    return {
        "log": [json.loads(line) for line in log.read_text().splitlines()] if rank() == 0 else [],
        "weights": held(trainer),
        "averages": averages(trainer),
        "clock": trainer.state.timestamp.state_dict(),
        "loss": None if trainer.state.loss is None else float(trainer.state.loss),
        "metrics": trainer.eval(),
    }


def moments(trainer: Trainer) -> list[Tensor]:
    """Return the full state of the optimizer."""
    optimizer = trainer.state.optimizers[0]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [full(optimizer.state[p][name]) for p in parameters for name in ("step", "exp_avg", "exp_avg_sq")]


# Jobs


def trains(kind: str | None, folder: Path, *callbacks: Callback, **more: Any) -> dict[str, Any]:
    """Train to the end."""
    losses = Losses()
    trainer = build(kind, folder, callbacks=(losses, *callbacks), **more)
    trainer.fit()
    return results(trainer, folder) | {"losses": losses.losses, "draws": torch.rand(3)}


def trains_followed(kind: str, folder: Path, **more: Any) -> dict[str, Any]:
    """Train to the end; return the differences to the average of the full weights too."""
    follows = Follows()
    found = trains(kind, folder, follows, **more)
    assert follows.reference is not None
    return found | {"apart": unequal(found["averages"], follows.reference.averages)}


def polishes_from_a_record(kind: str | None, folder: Path, **more: Any) -> dict[str, Tensor]:
    """Train to the end, and return the weights."""
    trainer = build(kind, folder, **more)
    trainer.fit()
    return held(trainer)


class Losses(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def batch_end(self, state: Any, logger: Any) -> None:
        self.losses.append(float(state.loss))


class Follows(Callback):
    """Averages the full weights as the run does its shards, with a half-life of 4 batches."""

    reference: Reference | None = None

    def batch_end(self, state: Any, logger: Any) -> None:
        if self.reference is None:
            self.reference = Reference(state.model, None)
        else:
            self.reference.update_(state.model, 1 - 0.5**0.25)


RESUMED = loops.BEFORE_EPOCH_END, loops.EPOCH_END, loops.MID_EPOCH


def resumes(
    kind: str, folder: Path, at: Sequence[str] = RESUMED, **more: Any
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Train once without a stop, and resume from its checkpoints; return its results and the differences."""

    def random(trainer: Trainer) -> Any:
        return [rng.get_state(), trainer._context.stream.get_state()]

    # A save gives all ranks the buffers of rank 0, so that a run saves where the other one does.
    more |= {"max_duration": loops.RESUMED, "saves": loops.as_resumed}
    whole = build(kind, folder / "whole", **more)
    whole.fit()
    want = results(whole, folder / "whole") | {"random": random(whole)}
    found = {}
    for name in at:
        saved = folder / "whole" / "checkpoints" / (name if kind == "ddp" else name.removesuffix(".pt"))
        if rank() == 0:
            (folder / name).mkdir()
            shutil.copy(folder / "whole" / "metrics.jsonl", folder / name)
        dist.barrier()
        loops.disturb()
        resumed = build(kind, folder / name, load_path=saved, seed=99, model_seed=5, **more)
        resumed.fit()
        got = results(resumed, folder / name) | {"random": random(resumed)}
        if different := loops.differences(want, got):
            found[name] = different
    return want, found


def saves(kind: str | None, path: Path, folder: Path) -> dict[str, Any]:
    """Train, save inside an epoch, continue; return the saved state and the final state."""
    trainer = build(kind, folder, max_duration="7ba", saves=None)
    trainer.fit()
    trainer.save_checkpoint(path)
    saved = {"weights": held(trainer), "averages": averages(trainer), "moments": moments(trainer)}
    longer = build(kind, folder, max_duration="9ba", load_path=path, saves=None)
    longer.fit()
    return {"saved": saved, "end": held(longer)}


def loads(kind: str | None, path: Path, folder: Path) -> dict[str, Any]:
    """Load a checkpoint and continue; return the loaded state, the final state and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = build(kind, folder, max_duration="9ba", load_path=path, saves=None, model_seed=7)
    loaded = {"weights": held(trainer), "averages": averages(trainer), "moments": moments(trainer)}
    trainer.fit()
    said = [str(one.message) for one in caught if "world size" in str(one.message)]
    return {"loaded": loaded, "end": held(trainer), "said": said}


class Unseeded(list):
    """A loader with another order of batches on each rank."""

    def __iter__(self) -> Any:
        order = list(super().__iter__())
        return iter(order[rank() :] + order[: rank()])


def refused(what: str, folder: Path) -> str:
    """Call the trainer with bad arguments; return the error."""
    world, model, options = dist.get_world_size(), loops.perceptron(), dict[str, Any]()
    if what == "two kinds":
        model, options = DistributedDataParallel(model), {"parallelism": "fsdp2"}
    elif what == "tensor parallelism":
        model = parallelize_module(model, init_device_mesh("cpu", (world,)), {"0": ColwiseParallel()})
    elif what == "not all ranks":
        grid = init_device_mesh("cpu", (world, 1), mesh_dim_names=("others", "shards"))
        model = fully_shard(model, mesh=grid["shards"])
    elif what == "other arguments":
        options = {"parallelism": "ddp", "max_duration": f"{3 + rank()}ep"}
    elif what == "a step before":
        return _shards_after_a_step()
    try:
        loops.train(folder, model=model, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def _shards_after_a_step() -> str:
    model = loops.perceptron()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 6)).sum().backward()
    optimizer.step()
    try:
        Trainer(model=model, loss=cross_entropy, optimizers=optimizer, parallelism="fsdp2")
    except ValueError as error:
        return f"ValueError: {error}"
    return "nothing"


def fails_to_save(kind: str, path: Path, folder: Path) -> tuple[str, bool]:
    """Save where rank 0 cannot write; return the error, and whether the training weights are restored."""
    trainer = build(kind, folder, max_duration="4ba", saves=None)
    trainer.fit()
    before, said = held(trainer), "nothing"
    try:
        trainer.save_checkpoint(path)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    return said, unequal(before, held(trainer)) == []


def loads_damaged(kind: str, path: Path, folder: Path) -> str:
    """Return the error of a checkpoint that cannot be loaded."""
    try:
        build(kind, folder, load_path=path, saves=None)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def evaluates(kind: str | None) -> dict[str, float]:
    """Return metrics of seven samples in batches of three, in random order."""
    import torchmetrics.classification as theirs

    torch.manual_seed(50 + rank())
    model = loops.perceptron(1)
    data = torch.utils.data.Subset(loops.dataset(), range(7))
    options: dict[str, Any] = {} if kind is None else {"parallelism": kind}
    trainer = Trainer(
        model=model,
        loss=cross_entropy,
        eval_dataloader=DataLoader(data, batch_size=3, shuffle=True),
        metrics={
            "ours": loops.Accuracy(),
            "theirs": theirs.MulticlassAccuracy(num_classes=3, average="micro"),
            "of lists": theirs.MulticlassCalibrationError(num_classes=3),
        },
        progress_bar=False,
        **options,
    )
    return trainer.eval()


def predicts(kind: str | None) -> list[Tensor]:
    options: dict[str, Any] = {} if kind is None else {"parallelism": kind}
    trainer = Trainer(model=loops.perceptron(), loss=cross_entropy, progress_bar=False, **options)
    return trainer.predict(DataLoader(loops.dataset(2), batch_size=3))


def with_own_batches(kind: str | None, folder: Path, size: int) -> dict[str, Any]:
    """Train on each rank's batches by a ``DistributedSampler``, or in one process on all ranks' batches."""
    data = loops.dataset()

    def sampler(of: int) -> DistributedSampler:
        return DistributedSampler(data, num_replicas=size, rank=of, shuffle=True, seed=3)

    if kind is None:
        orders = [list(sampler(of)) for of in range(size)]
        joint = [[i for order in orders for i in order[at : at + 2]] for at in range(0, len(orders[0]), 2)]
        loader: Any = [(data.tensors[0][rows], data.tensors[1][rows]) for rows in joint]
    else:
        loader = DataLoader(data, batch_size=2, sampler=sampler(rank()))
    model = loops.perceptron()
    algorithm = EMA("8sp")
    # The clock of rank 1 is faster.
    ticks = itertools.count(step=1 + 100 * rank())
    fitting.time = types.SimpleNamespace(perf_counter=ticks.__next__)
    trainer = Trainer(
        model=model,
        train_dataloader=loader,
        max_duration="1ep",
        algorithms=algorithm,
        optimizers=torch.optim.Adam(model.parameters(), lr=0.02),
        loss=cross_entropy,
        num_tokens=lambda batch: 10 + rank(),
        progress_bar=False,
        **({} if kind is None else {"parallelism": kind}),
    )
    try:
        trainer.fit()
    finally:
        fitting.time = time
    now = trainer.state.timestamp
    clock = (now.batch.value, now.sample.value, now.token.value, now.total_wct.value)
    return {"weights": held(trainer), "averages": averages(trainer), "clock": clock}


def raw_figures(kind: str, folder: Path) -> tuple[float, float]:
    """Return the loss of the training weights with the buffers of rank 0, computed by hand and by the evaluation."""

    class Raw(Callback):
        def eval_before_all(self, state: Any, logger: Any) -> None:
            self.held = weights(state.model)

    raw = Raw()
    more = {"max_duration": "4ba", "saves": None, "eval_weights": "both", "callbacks": (raw,)}
    trainer = build(kind, folder, noisy=True, **more)
    trainer.fit()
    model = noisy_perceptron(0).eval()
    model.load_state_dict(raw.held)
    inputs, targets = loops.dataset(2, seed=5).tensors
    return cross_entropy(model(inputs), targets).item(), trainer.state.eval_metrics["eval_raw/loss"]


def mixes_samplers(path: Path, *, at: str) -> str:
    """Save with a ``DistributedSampler``, load without; return what is said."""

    def make(**options: Any) -> Trainer:
        model = loops.perceptron()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        common = {"loss": cross_entropy, "optimizers": optimizer, "progress_bar": False, "parallelism": "ddp"}
        return Trainer(model=model, max_duration=at, **common, **options)

    data = loops.dataset()
    first = make(train_dataloader=DataLoader(data, batch_size=2, sampler=DistributedSampler(data)))
    first.fit()
    first.save_checkpoint(path)
    try:
        make(train_dataloader=DataLoader(data, batch_size=4), load_path=path)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def records(kind: str | None, folder: Path, stops: tuple[int | None, ...] = (None,)) -> list[int]:
    """Record a run that stops at some batches and resumes; return where each part began."""
    began = []
    for stop in stops:
        model = loops.perceptron()
        raises = [] if stop is None else [loops.Raises(Event.BATCH_START, InterruptedError(), batch=stop)]
        options: dict[str, Any] = {} if kind is None else {"parallelism": kind}
        trainer = Trainer(
            model=model,
            train_dataloader=DataLoader(loops.dataset(), batch_size=loops.BATCH, shuffle=True),
            max_duration="2ep",
            algorithms=[EMA("4ba"), Recorder(folder / "record", "2ba")],
            optimizers=torch.optim.Adam(model.parameters(), lr=0.02),
            loss=cross_entropy,
            callbacks=[CheckpointSaver(folder / "checkpoints", "3ba"), *raises],
            autoresume=True,
            seed=1,
            progress_bar=False,
            **options,
        )
        began.append(trainer.state.timestamp.batch.value)
        with suppress(InterruptedError):
            trainer.fit()
    return began


def skips(kind: str, folder: Path) -> dict[str, Any]:
    """Train in 16 bits with NaN gradients on one rank at two batches."""
    calls = iter(range(1000))

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        bad = torch.is_grad_enabled() and next(calls) in (3, 4) and rank() == 1
        return cross_entropy(outputs.float(), targets) * (float("inf") if bad else 1.0)

    model = loops.perceptron()
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(loops.dataset(), batch_size=loops.BATCH, shuffle=True),
        max_duration="8ba",
        algorithms=EMA("2ba"),
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        loss=loss,
        precision="amp_fp16",
        seed=0,
        progress_bar=False,
        parallelism=kind,
    )
    trainer.fit()
    return {"batches": trainer.state.timestamp.batch.value, "drawn": next(calls), "weights": held(trainer)}


def differing(folder: Path) -> list[str]:
    """Return the warnings of batches in another order on each rank."""
    x, y = loops.dataset().tensors
    model = loops.perceptron()
    trainer = Trainer(
        model=model,
        train_dataloader=Unseeded(zip(x.split(4), y.split(4), strict=True)),
        max_duration="1ep",
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        loss=cross_entropy,
        progress_bar=False,
        parallelism="ddp",
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit()
    return [str(one.message) for one in caught]


class Killed(Callback):
    """Kills a rank's process at an event of a batch; appends a word to a file before that."""

    def __init__(self, event: Event, batch: int, victim: int, note: tuple[Path, str]) -> None:
        self._event, self._batch, self._victim, self._note = event, batch, victim, note

    def run_event(self, event: Event, state: Any, logger: Any) -> None:
        if event is self._event and state.timestamp.batch.value == self._batch and state.rank == self._victim:
            file, word = self._note
            with file.open("a", encoding="utf-8") as killed:
                killed.write(f"{word} ")
            os.kill(os.getpid(), signal.SIGKILL)


def killed(kind: str, folder: Path, out: Path, *callbacks: Callback) -> None:
    """Train to the end, resuming where possible; write the final state of each rank."""
    trainer = build(kind, folder, noisy=True, max_duration="2ep", autoresume=True, callbacks=callbacks)
    trainer.fit()
    out.mkdir(exist_ok=True)
    found = results(trainer, folder)
    del found["loss"]  # None if the run was complete before a restart
    torch.save(found, out / f"{kind}-{rank()}.pt")


def killed_once_each(folder: Path) -> None:
    """Train two runs, in each of which a rank is killed once, so that all ranks are restarted."""
    torch.set_num_threads(1)
    restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    # In the middle of an epoch, and where all ranks are about to write a checkpoint.
    for number, (kind, event, batch) in enumerate((("ddp", Event.BATCH_START, 8), ("fsdp2", Event.SAVE_START, 9))):
        callbacks = [Killed(event, batch, victim=1, note=(folder / "killed", kind))] if restarts == number else []
        killed(kind, folder / kind, folder / "results", *callbacks)


def demos(folder: Path) -> list[tuple[Any, str, str]]:
    """Run the demo longer than it ran, and shorter, which is refused; return each exit code and what was printed."""
    os.environ.pop("COLUMNS", None)  # each message is one line
    found = []
    for steps in (40, 20):
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as errors:
            try:
                code = main(["demo", "--steps", str(steps), "--out", str(folder)])
            except SystemExit as error:
                code = error.code
        found.append((code, out.getvalue(), errors.getvalue()))
    return found

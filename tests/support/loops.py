"""Small training runs: data, models, a trainer with all features, and the comparison of two runs."""

import json
import os
import random
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from polyak import EMA, Callback, CheckpointSaver, Event, JSONLinesLogger, Trainer

EPOCH = 6  # batches
BATCH = 4  # samples


def dataset(batches: int = EPOCH, *, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(batches * BATCH, 6, generator=generator)
    return TensorDataset(inputs, torch.randint(3, (batches * BATCH,), generator=generator))


class Noisy(Dataset):
    """Data with random transforms that use every global generator."""

    def __init__(self, batches: int = EPOCH) -> None:
        self._data = dataset(batches)

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, target = self._data[index]
        return inputs + 0.1 * torch.randn(6) + 0.1 * random.random() + 0.1 * float(np.random.rand()), target


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def perceptron(seed: int = 0) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), seed)


def noisy_perceptron(seed: int = 0) -> nn.Module:
    return seeded(
        lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)), seed
    )


# Where ``often`` saves, with six batches an epoch: at the last batch of an epoch, its end, and inside the next epoch.
BEFORE_EPOCH_END, EPOCH_END, MID_EPOCH = "ep0-ba6.pt", "ep1-ba6.pt", "ep1-ba9.pt"


def often(state: Any, event: Event) -> bool:
    """Save every third batch, and at the end of every epoch."""
    return event is Event.EPOCH_CHECKPOINT or state.timestamp.batch.value % 3 == 0


RESUMED = "14ba"  # the length of a run that is resumed from each of these: into the epoch after the last of them


def as_resumed(state: Any, event: Event) -> bool:
    """Save there alone."""
    return state.timestamp.batch.value in {6, 9}


def train(
    folder: Path,
    *,
    ema: EMA | None = None,
    model: nn.Module | None = None,
    data: Dataset | None = None,
    max_duration: str = "3ep",
    optimizer: str = "adam",
    shuffle: bool = False,
    generator_seed: int | None = None,
    num_workers: int = 0,
    seed: int = 1,
    saves: Any = often,
    callbacks: tuple[Callback, ...] = (),
    metrics: Mapping[str, Any] | None = None,
    **options: Any,
) -> Trainer:
    """Return a trainer with all features: a scheduler, evaluation, a log and checkpoints in ``folder``."""
    torch.set_num_threads(1)
    model = perceptron() if model is None else model
    generator = None if generator_seed is None else torch.Generator().manual_seed(generator_seed)
    loader = DataLoader(
        dataset() if data is None else data,
        batch_size=BATCH,
        shuffle=shuffle,
        generator=generator,
        num_workers=num_workers,
    )
    made = {
        "adam": lambda: torch.optim.Adam(model.parameters(), lr=0.02),
        "momentum": lambda: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    }[optimizer]()
    return Trainer(
        model=model,
        train_dataloader=loader,
        eval_dataloader=DataLoader(dataset(2, seed=5), batch_size=BATCH),
        max_duration=max_duration,
        algorithms=[] if ema is None else [ema],
        optimizers=made,
        schedulers=torch.optim.lr_scheduler.LambdaLR(made, lambda step: 0.95**step),
        step_schedulers_every_batch=True,
        loss=nn.functional.cross_entropy,
        metrics={"accuracy": Accuracy()} if metrics is None else metrics,
        callbacks=[*([CheckpointSaver(folder / "checkpoints", saves)] if saves else []), *callbacks],
        loggers=JSONLinesLogger(folder / "metrics.jsonl"),
        seed=seed,
        progress_bar=False,
        **options,
    )


class Accuracy:
    """A custom metric with the members of torchmetrics."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.right = self.seen = 0

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.right += int((outputs.argmax(1) == targets).sum())
        self.seen += len(targets)

    def compute(self) -> float:
        return self.right / self.seen


class Recorder(Callback):
    """Stores the training weights and the loss at the end of every batch, by its number."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, Tensor]] = {}
        self.losses: list[float] = []

    def batch_end(self, state: Any, logger: Any) -> None:
        del logger
        self.weights[state.timestamp.batch.value] = bits(state.model)
        self.losses.append(float(state.loss))


class Raises(Callback):
    """Raises at an event."""

    def __init__(self, at: Event, error: BaseException, *, batch: int = 0) -> None:
        self._at, self._error, self._batch = at, error, batch

    def run_event(self, event: Event, state: Any, logger: Any) -> None:
        del logger
        if event is self._at and state.timestamp.batch.value >= self._batch:
            raise self._error


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the tensors of a model."""
    return {name: tensor.detach().clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def averaged(ema: EMA) -> dict[str, Tensor]:
    assert ema.ema_model is not None
    return bits(ema.ema_model)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a nested container, tensors and arrays as lists of exact numbers."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}")
    elif isinstance(value, Tensor):
        yield path, (value.dtype, tuple(value.shape), value.tolist())
    elif isinstance(value, (list, tuple)):
        yield path + ".len", len(value)
        for i, inner in enumerate(value):
            yield from leaves(inner, f"{path}.{i}")
    else:
        yield path, value


def differences(one: Any, other: Any) -> list[str]:
    """Return the paths at which two nested containers differ, in any bit; wall clocks do not count."""
    a, b = dict(leaves(one)), dict(leaves(other))
    names = [name for name in a | b if not name.endswith("_wct")]
    return [name for name in names if name not in a or name not in b or a[name] != b[name]]


def everything(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """Return everything that a run leaves: its checkpoint, its log, and the result of an evaluation now."""
    trainer.save_checkpoint(folder / "end.pt")
    log = (folder / "metrics.jsonl").read_text()
    return {
        "checkpoint": torch.load(folder / "end.pt", weights_only=True),
        "log": [json.loads(line) for line in log.splitlines()],
        "eval": trainer.eval(),
    }


def disturb() -> None:
    """Set every global generator to a state that no run has."""
    torch.manual_seed(12345)
    random.seed(12345)
    np.random.seed(12345)


def resume_differences(
    build: Callable[..., Trainer], folder: Path, at: Sequence[str] = (BEFORE_EPOCH_END, EPOCH_END, MID_EPOCH)
) -> dict[str, list[str]]:
    """Train once without a stop, resume from its checkpoints, and return the differences."""
    options: dict[str, Any] = {"max_duration": RESUMED, "saves": as_resumed}
    whole = build(folder / "whole", **options)
    whole.fit()
    want = everything(whole, folder / "whole")
    found = {}
    for name in at:
        (folder / name).mkdir()
        shutil.copy(folder / "whole" / "metrics.jsonl", folder / name)
        disturb()
        resumed = build(folder / name, load_path=folder / "whole" / "checkpoints" / name, seed=99, **options)
        resumed.fit()
        if different := differences(want, everything(resumed, folder / name)):
            found[name] = different
    return found


class DiesWhileSaving(Callback):
    """Kills the process in the middle of writing the checkpoint of a batch."""

    def __init__(self, batch: int) -> None:
        self._batch = batch

    def batch_end(self, state: Any, logger: Any) -> None:
        del logger
        if state.timestamp.batch.value == self._batch:

            def half_saved(checkpoint: object, file: Any) -> None:
                del checkpoint
                file.write(b"half a checkpoint")
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)

            torch.save = half_saved


def train_until_killed(folder: Path, batch: int) -> None:
    """Run in a separate process, which kills itself."""
    killable(folder, callbacks=(DiesWhileSaving(batch),)).fit()


def killable(folder: Path, **options: Any) -> Trainer:
    return train(
        folder,
        ema=EMA("4ba"),
        model=noisy_perceptron(),
        data=Noisy(),
        shuffle=True,
        autoresume=True,
        saves="4ba",
        **options,
    )


def label(value: object) -> str:
    """Return an id for a parameter that is the same in every process: functions have addresses in their ``str``."""
    return re.sub(r"<function ([\w.<>]+) at 0x[0-9a-f]+>", r"\1", str(value))

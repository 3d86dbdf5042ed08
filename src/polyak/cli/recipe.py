"""The task of ``polyak demo``: handwritten digits, where some of the training labels are wrong."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from polyak.averaging.ema import EMA
from polyak.record.recorder import Recorder
from polyak.time import Time, TimeUnit
from polyak.trainer import Callback, Trainer
from polyak.trainer.loggers import Destination

NUM_TRAIN = 1000
NUM_VALIDATION = 297
RECORD_INTERVAL = Time(20, TimeUnit.BATCH)
WIDTHS = (64, 128, 128, 10)
HALF_LIFE = Time(100, TimeUnit.BATCH)


def cosine(elapsed: float) -> float:
    """Return the learning rate of a half-cosine schedule, relative to its start.

    Args:
        elapsed: The elapsed fraction of the run.
    """
    return (1 + math.cos(math.pi * elapsed)) / 2


@dataclass(frozen=True, slots=True)
class Digits:
    """The options of a training run. The half-life was fixed before any evaluation on the test set.

    Args:
        seed: The seed of all random numbers: the split, the wrong labels, the initial weights, the batches.
        steps: The number of SGD steps, above 0.
        half_life: The half-life of the average, in ``ba``, ``ep``, ``sp`` or ``dur``.
        flipped: The fraction of the training labels that are wrong; the test labels are correct.
        lr: The learning rate.
        batch_size: The number of digits in a batch.
        schedule: Returns the factor of ``lr`` for the elapsed fraction of the run; None for a constant rate.
    """

    seed: int = 0
    steps: int = 1000
    half_life: Time = HALF_LIFE
    flipped: float = 0.3
    lr: float = 0.2
    batch_size: int = 16
    schedule: Callable[[float], float] | None = None

    def clock(self, batch: int) -> float:
        """Return the clock after a batch, in the unit of the half-life.

        Args:
            batch: The number of batches.
        """
        epoch_length = math.ceil(NUM_TRAIN / self.batch_size)
        epochs, rest = divmod(batch, epoch_length)
        return {
            TimeUnit.BATCH: float(batch),
            TimeUnit.EPOCH: batch / epoch_length,
            TimeUnit.SAMPLE: float(epochs * NUM_TRAIN + min(rest * self.batch_size, NUM_TRAIN)),
            TimeUnit.DURATION: batch / self.steps,
        }[self.half_life.unit]


class Accuracy:
    """The fraction of inputs whose largest output is that of the target."""

    def __init__(self) -> None:
        self.reset()

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch.

        Args:
            outputs: One row per input.
            targets: The correct column of each row.
        """
        self._right += int((outputs.argmax(dim=1) == targets).sum())
        self._seen += len(targets)

    def compute(self) -> float:
        """Return the accuracy so far."""
        return self._right / self._seen

    def reset(self) -> None:
        """Start again from no inputs."""
        self._right = self._seen = 0


def load_data(digits: Digits) -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    """Return the digits for training, validation and test. Only training labels are wrong.

    Args:
        digits: The task.
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images, labels = torch.as_tensor(images, dtype=torch.float32) / 16, torch.as_tensor(labels, dtype=torch.int64)
    generator = torch.Generator().manual_seed(digits.seed)
    order = torch.randperm(len(labels), generator=generator)
    images, labels = images[order], labels[order]
    wrong = torch.randperm(NUM_TRAIN, generator=generator)[: round(digits.flipped * NUM_TRAIN)]
    labels[wrong] = (labels[wrong] + torch.randint(1, 10, wrong.shape, generator=generator)) % 10
    sizes = [NUM_TRAIN, NUM_VALIDATION, len(labels) - NUM_TRAIN - NUM_VALIDATION]
    train, validation, test = zip(images.split(sizes), labels.split(sizes), strict=True)
    return TensorDataset(*train), TensorDataset(*validation), TensorDataset(*test)


def build_model() -> nn.Module:
    """Return the network, initialized by torch's global generator."""
    layers = list[nn.Module]()
    for inputs, outputs in pairwise(WIDTHS):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@torch.no_grad()
def measure(state: Mapping[str, Tensor], data: TensorDataset) -> dict[str, float]:
    """Return the cross-entropy and the accuracy of a state of the network.

    Args:
        state: The state dict.
        data: The digits to evaluate on.
    """
    model = build_model()
    model.load_state_dict(state)
    inputs, targets = data.tensors
    outputs = model(inputs)
    accuracy = Accuracy()
    accuracy.update(outputs, targets)
    return {"loss": float(nn.functional.cross_entropy(outputs, targets)), "accuracy": accuracy.compute()}


def build_trainer(
    digits: Digits,
    *,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[Destination] = (),
    eval_interval: str = "10ba",
    record: Path | None = None,
    autoresume: bool = False,
    parallelism: Literal["ddp"] | None = None,
) -> tuple[Trainer, EMA]:
    """Return a trainer on the CPU, and its average.

    Args:
        digits: The task.
        callbacks: As for ``Trainer``.
        loggers: As for ``Trainer``.
        eval_interval: As for ``Trainer``. Raw and averaged weights are evaluated.
        record: The folder for a record of the run; None for no record.
        autoresume: As for ``Trainer``.
        parallelism: As for ``Trainer``.
    """
    train, _, test = load_data(digits)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(digits.seed)
        model = build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=digits.lr)
    schedulers = list[Any]()
    if digits.schedule is not None:
        schedule, steps = digits.schedule, digits.steps
        schedulers.append(torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step / steps)))
    metrics: dict[str, Any] = {"accuracy": Accuracy()}
    ema = EMA(half_life=digits.half_life, update_interval="1ba")
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(train, digits.batch_size, shuffle=True),
        eval_dataloader=[test.tensors],
        max_duration=Time(digits.steps, TimeUnit.BATCH),
        algorithms=ema if record is None else [ema, Recorder(record, RECORD_INTERVAL)],
        optimizers=optimizer,
        schedulers=schedulers,
        step_schedulers_every_batch=True,
        loss=nn.functional.cross_entropy,
        metrics=metrics,
        callbacks=callbacks,
        loggers=loggers,
        eval_interval=eval_interval,
        eval_weights="both",
        log_interval="10ba",
        device="cpu",
        seed=digits.seed,
        progress_bar=False,
        autoresume=autoresume,
        parallelism=parallelism,
    )
    return trainer, ema

"""The arguments of the trainer: ``Options`` as they were given, ``Checked`` as the parts of the trainer read them."""

import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from polyak.algorithm import Algorithm
from polyak.events import Event
from polyak.time import Time, TimeUnit
from polyak.trainer import batches, inputs
from polyak.trainer.callback import Callback
from polyak.trainer.evaluators import Evaluator, evaluation_question, evaluators_of
from polyak.trainer.intervals import Question, question
from polyak.trainer.loggers import Destination, ProgressBar
from polyak.trainer.metrics import Metric
from polyak.trainer.saver import CheckpointSaver
from polyak.trainer.state import Scheduler
from polyak.trainer.workers import Workers
from polyak.training.evalweights import EvalWeights, eval_weights_of


@dataclass(frozen=True)
class Options:
    """The arguments of ``Trainer``, with the same names and defaults."""

    model: nn.Module
    train_dataloader: Iterable[Any] | None = None
    max_duration: str | Time | int | None = None
    eval_dataloader: Iterable[Any] | Mapping[str, Iterable[Any]] | Evaluator | Sequence[Evaluator] | None = None
    algorithms: Algorithm | Sequence[Algorithm] | None = None
    optimizers: Optimizer | Sequence[Optimizer] | None = None
    schedulers: Scheduler | Sequence[Scheduler] | None = None
    loss: Callable[[Any, Any], Tensor] | None = None
    metrics: Mapping[str, Metric] | None = None
    train_metrics: Mapping[str, Metric] | None = None
    callbacks: Callback | Sequence[Callback] | None = None
    loggers: Destination | Sequence[Destination] | None = None
    eval_interval: str | Time | int | Question = "1ep"
    eval_weights: EvalWeights = "averaged"
    log_interval: str | Time | int = "1ba"
    device: str | torch.device | None = None
    precision: Literal["fp32", "amp_bf16", "amp_fp16"] = "fp32"
    parallelism: Literal["ddp", "fsdp2"] | None = None
    grad_accum: int = 1
    step_schedulers_every_batch: bool = False
    polish: str | Time | int | None = None
    seed: int | None = None
    deterministic_mode: bool = False
    run_name: str | None = None
    progress_bar: bool | None = None
    save_folder: str | Path | None = None
    save_interval: str | Time | int | Question | None = None
    save_num_checkpoints_to_keep: int | None = None
    load_path: str | Path | None = None
    load_weights_only: bool = False
    load_ignore_keys: Sequence[str] = ()
    autoresume: bool = False
    num_samples: Callable[[Any], int] = batches.num_samples
    num_tokens: Callable[[Any], int] | None = None

    def checked(self) -> "Checked":
        """Check the arguments, and return what the trainer needs.

        Raises:
            ArgumentError: If one has a wrong type or value, or some contradict each other.
            TimeError: If a time cannot be read, or its unit is not counted.
        """
        inputs.check_model(self.model, self.loss)
        for name, (holds, must) in inputs.PLAIN.items():
            given = getattr(self, name)
            inputs.require(holds(given), name, must, given)
        inputs.check_device(self.device)
        if self.train_dataloader is not None:
            inputs.check_loader("train_dataloader", self.train_dataloader)
        counted = inputs.counted_units(self.num_tokens)
        at = (Event.BATCH_END, Event.EPOCH_END)
        training, evaluation = inputs.metrics_of(self.model, self.metrics, self.train_metrics)
        duration = self.max_duration
        checked = Checked(
            given=self,
            workers=self._workers(),
            counted=counted,
            max_duration=None if duration is None else inputs.duration_of("max_duration", duration, counted),
            evaluators=evaluators_of(self.eval_dataloader),
            eval_weights=eval_weights_of(self.eval_weights, stacklevel=5),
            eval_due=evaluation_question(self.eval_interval, counted),
            log_due=question("log_interval", self.log_interval, at=at, counted=counted),
            train_metrics=training,
            eval_metrics=evaluation,
            run_name=self.run_name or f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}",
        )
        checked.savers(checked.run_name)
        return checked

    def _workers(self) -> Workers:
        workers = Workers.of(
            self.model,
            algorithms=self.algorithms,
            optimizers=self.optimizers,
            schedulers=self.schedulers,
            callbacks=self.callbacks,
            loggers=self.loggers,
        )
        if _shows_progress(self.progress_bar):
            workers.loggers.append(ProgressBar())
        return workers


@dataclass(frozen=True)
class Checked:
    """The checked arguments of ``Trainer``, and objects made from them.

    Args:
        given: The arguments as given, for those that need no change.
        workers: The objects that take part in training.
        counted: The units of time that are counted.
        max_duration: How long to train; None if it will be given to ``fit``.
        evaluators: The data to evaluate.
        eval_weights: Which weights are evaluated.
        eval_due: When evaluators without an interval run.
        log_due: When training is logged.
        train_metrics: The metrics of training, by name.
        eval_metrics: The metrics of evaluations, by name.
        run_name: As given, or made from the date.
    """

    given: Options
    workers: Workers
    counted: frozenset[TimeUnit]
    max_duration: Time | None
    evaluators: list[Evaluator]
    eval_weights: EvalWeights
    eval_due: Question
    log_due: Question
    train_metrics: dict[str, Any]
    eval_metrics: dict[str, Any]
    run_name: str

    def savers(self, run_name: str) -> list[Callback]:
        """Return the callback that saves to ``save_folder``, in a list; an empty list without ``save_folder``.

        Args:
            run_name: The same on all ranks; it replaces ``{run_name}`` in the folder.

        Raises:
            ArgumentError: If an argument for saving was given without ``save_folder``.
            TimeError: If the interval is not a time.
        """
        given = self.given
        interval, keep = given.save_interval, given.save_num_checkpoints_to_keep
        if given.save_folder is None:
            for name, value in (("save_interval", interval), ("save_num_checkpoints_to_keep", keep)):
                inputs.require(value is None, name, "given together with save_folder", value, "give save_folder")
            return []
        folder = str(given.save_folder).replace("{run_name}", run_name)
        return [CheckpointSaver(folder, "1ep" if interval is None else interval, keep=None if keep == -1 else keep)]


def _shows_progress(asked: bool | None) -> bool:
    if asked is not None:
        return asked
    try:
        from rich.console import Console  # noqa: PLC0415  an extra
    except ImportError:
        return False
    return Console(stderr=True).is_terminal

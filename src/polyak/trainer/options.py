"""The arguments of the trainer, and what is made of them before anything is changed."""

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
from polyak.trainer.evaluation import Evaluator, evaluation_question, evaluators_of
from polyak.trainer.loggers import Destination
from polyak.trainer.metrics import Metric
from polyak.trainer.progress import ProgressBar
from polyak.trainer.state import Question, Scheduler, question


@dataclass(frozen=True)
class Options:
    """The arguments of ``Trainer``, by its names and with its defaults."""

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
    eval_weights: Literal["averaged", "both"] = "averaged"
    log_interval: str | Time | int = "1ba"
    device: str | torch.device | None = None
    precision: Literal["fp32", "amp_bf16", "amp_fp16"] = "fp32"
    parallelism: Literal["ddp", "fsdp2"] | None = None
    grad_accum: int = 1
    step_schedulers_every_batch: bool = False
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
        """Return what is made of them.

        Raises:
            ArgumentError: If one is not what it must be, or some contradict each other.
            TimeError: If a time is not one.
        """
        inputs.check_model(self.model, self.loss)
        inputs.check_options(
            precision=self.precision,
            eval_weights=self.eval_weights,
            parallelism=self.parallelism,
            grad_accum=self.grad_accum,
            seed=self.seed,
            run_name=self.run_name,
            switches={
                "step_schedulers_every_batch": self.step_schedulers_every_batch,
                "deterministic_mode": self.deterministic_mode,
                "load_weights_only": self.load_weights_only,
                "autoresume": self.autoresume,
                "progress_bar": False if self.progress_bar is None else self.progress_bar,
            },
            functions={"num_samples": self.num_samples, "num_tokens": self.num_tokens},
        )
        inputs.check_device(self.device)
        inputs.check_path("load_path", self.load_path)
        inputs.check_ignored_keys(self.load_ignore_keys)
        inputs.check_batch_source(self.train_dataloader)
        workers = inputs.Workers.of(
            self.model,
            algorithms=self.algorithms,
            optimizers=self.optimizers,
            schedulers=self.schedulers,
            callbacks=self.callbacks,
            loggers=self.loggers,
        )
        if _shows_progress(self.progress_bar):
            workers.loggers.append(ProgressBar())
        counted = inputs.counted_units(self.num_tokens)
        at = (Event.BATCH_END, Event.EPOCH_END)
        training, evaluation = inputs.metrics_of(self.model, self.metrics, self.train_metrics)
        duration = self.max_duration
        return Checked(
            workers=workers,
            counted=counted,
            max_duration=None if duration is None else inputs.duration_of("max_duration", duration, counted),
            evaluators=evaluators_of(self.eval_dataloader),
            eval_due=evaluation_question(self.eval_interval, counted),
            log_due=question("log_interval", self.log_interval, at=at, counted=counted),
            train_metrics=training,
            eval_metrics=evaluation,
            savers=inputs.savers_of(self.save_folder, self.save_interval, self.save_num_checkpoints_to_keep),
            run_name=self.run_name or f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}",
        )


@dataclass(frozen=True)
class Checked:
    """What is made of the arguments.

    Args:
        workers: What works on the model and what follows it.
        counted: The units of time that are counted.
        max_duration: How long to train, if that is known.
        evaluators: What is evaluated.
        eval_due: When, where an evaluator has no interval of its own.
        log_due: When training is logged.
        train_metrics: By name.
        eval_metrics: By name.
        savers: Makes the callback of ``save_folder``, given the name of the run.
        run_name: As given, or made up.
    """

    workers: inputs.Workers
    counted: frozenset[TimeUnit]
    max_duration: Time | None
    evaluators: list[Evaluator]
    eval_due: Question
    log_due: Question
    train_metrics: dict[str, Any]
    eval_metrics: dict[str, Any]
    savers: Callable[[str], list[Callback]]
    run_name: str


def _shows_progress(asked: bool | None) -> bool:
    if asked is not None:
        return asked
    try:
        from rich.console import Console  # noqa: PLC0415  an extra
    except ImportError:
        return False
    return Console(stderr=True).is_terminal

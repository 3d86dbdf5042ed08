"""The training loop's front door: its arguments, and the parts that they make."""

import time
import uuid
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from polyak.algorithm import Algorithm
from polyak.errors import ArgumentError, LoanError, PlanWarning
from polyak.events import Event
from polyak.shadow import loan_of
from polyak.time import Time, Timestamp
from polyak.trainer import batches, checkpoint, inputs, parallel, prediction, rng
from polyak.trainer.callback import Callback
from polyak.trainer.checkpoint import CheckpointSaver
from polyak.trainer.engine import Engine
from polyak.trainer.epochs import Epochs, length_of
from polyak.trainer.evaluation import Evaluation, Evaluator, evaluation_question, evaluators_of
from polyak.trainer.fitting import Fitting
from polyak.trainer.forward import Forward
from polyak.trainer.loggers import Destination, Logger
from polyak.trainer.metrics import Metric, Metrics
from polyak.trainer.progress import ProgressBar
from polyak.trainer.saving import Checkpoints
from polyak.trainer.state import Question, Scheduler, TrainerState, question
from polyak.trainer.step import Step
from polyak.trainer.traininglog import TrainingLog


class Trainer:
    """Train a model, with algorithms such as ``EMA`` at the events of MosaicML Composer's trainer.

    One batch of the clock is one optimizer step: a step that mixed precision skips is not counted. Training resumes
    from a checkpoint bit for bit as if it had not stopped: weights, average, optimizers, schedulers, random numbers
    and the order of the data, also inside an epoch. (What persistent workers draw at random is excepted: they cannot be
    asked for their states.) After ``fit``, and after any exception, the model has its training weights.

    With ``parallelism`` the same script trains on one device or, started by ``torchrun``, on many. All ranks draw the
    same batches and each takes its part, so that a batch is the same whatever the number of ranks; if the loader's
    sampler is a ``DistributedSampler``, each rank's batch is its own and the batch of all is as many times as large.
    The loss and its gradient are means over the samples of that batch; the clock and all figures are the same on all
    ranks. The first rank logs and prints. Callbacks run on all ranks. See ``docs/distributed.md``.

    Args:
        model: Either any module, with ``loss``; or one with a method ``loss(outputs, batch)``, whose ``forward``
            takes the whole batch, and, as it likes, ``eval_forward(batch)`` and
            ``update_metric(batch, outputs, metric)``: a ``ComposerModel``.
        train_dataloader: Batches; for a plain module, pairs of inputs and targets.
        max_duration: How long to train: ``"10ep"``, ``"5000ba"``, ``"30m"``, or epochs as a number.
        eval_dataloader: Batches for evaluation, several loaders by label, or ``Evaluator`` objects.
        algorithms: Run at events, in order. Of those that lend an average there can be one.
        optimizers: One or several over the model's parameters.
        schedulers: Learning rate schedulers of torch.
        loss: Function of outputs and targets, for a plain module.
        metrics: For evaluation, by name: torchmetrics, or whatever has ``update(outputs, targets)``, ``compute`` and
            ``reset``; by default those of the model's ``get_metrics(is_train=False)``, if it has such a method.
        train_metrics: For training, computed on each batch that is logged; by default those of the model's
            ``get_metrics(is_train=True)``.
        callbacks: Run at events, after the algorithms.
        loggers: Where metrics go.
        eval_interval: Time between evaluations, or epochs as a number; there is one at the end too. 0 is never. Or a
            function of the state and the event (``BATCH_END``, ``EPOCH_END`` or ``FIT_END``) that says when.
        eval_weights: ``"averaged"`` evaluates as the algorithms have it; ``"both"`` also evaluates the training
            weights, as ``eval_raw``.
        log_interval: Time between logs of the training loss.
        device: Where to train; by default the GPU if there is one, and with ``parallelism`` that of ``LOCAL_RANK``.
        precision: ``"fp32"``, or automatic mixed precision as ``"amp_bf16"`` or ``"amp_fp16"``.
        parallelism: ``"ddp"``, each rank having the whole model, or ``"fsdp2"``, each having a shard of each tensor,
            its gradient and its optimizer state. The process group is begun if there is none. A model that is in
            ``DistributedDataParallel`` or under ``fully_shard`` already, in any way, is trained as it is.
        grad_accum: In how many microbatches each batch, or each rank's part of it, is run.
        step_schedulers_every_batch: Whether schedulers step with batches instead of epochs.
        seed: For all global random number generators, set here.
        deterministic_mode: Whether torch is to use deterministic algorithms alone, from now on in this process.
        run_name: Of this run, as ``state.run_name``; one with the date by default.
        progress_bar: Whether to show one; None shows it on a terminal where rich is installed.
        save_folder: Where to save checkpoints, as by a ``CheckpointSaver`` among ``callbacks``; ``{run_name}`` in it
            stands for the run's name.
        save_interval: As for ``CheckpointSaver``; with ``save_folder``.
        save_num_checkpoints_to_keep: As its ``keep``, -1 for all; with ``save_folder``.
        load_path: A checkpoint to resume from.
        load_weights_only: Whether to take only the weights from ``load_path``: the averaged ones, if there are any.
        load_ignore_keys: What not to take from ``load_path``: entries such as ``"optimizers"``, ``"algorithms"`` and
            ``"timestamp"``, and tensors as ``"model/head.*"``; Composer's ``"state/"`` before them is allowed.
        autoresume: Whether to resume from the newest checkpoint of ``save_folder``, or of the ``CheckpointSaver`` among
            ``callbacks``, if there is one. A damaged one is warned of, and the one before it is taken; if all are, that
            is an error.
        num_samples: Function of a batch: how many samples it has; by default the first dimension of its first tensor.
        num_tokens: Function of a batch: how many tokens it has; needed for times in ``tok``.

    Raises:
        ArgumentError: If an argument is not what it must be, or arguments contradict each other.
        TimeError: If a time is not one.
        ValueError: If an optimizer has a state already when the model is sharded.
        ShardingError: If the ranks were given other arguments.
        CheckpointError: If the checkpoint to load is not one, or is one of another set-up.

    Attributes:
        state: What algorithms and callbacks see.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> data = [(torch.randn(8, 4), torch.randint(2, (8,))) for _ in range(5)]
        >>> trainer = Trainer(
        ...     model=model,
        ...     train_dataloader=data,
        ...     max_duration="2ep",
        ...     optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        ...     loss=nn.functional.cross_entropy,
        ... )
        >>> trainer.fit()
        >>> trainer.state.timestamp.batch
        Time(10, 'ba')

    References:
        ``composer.Trainer``.
    """

    def __init__(
        self,
        model: nn.Module,
        train_dataloader: Iterable[Any] | None = None,
        max_duration: str | Time | int | None = None,
        eval_dataloader: Iterable[Any] | Mapping[str, Iterable[Any]] | Evaluator | Sequence[Evaluator] | None = None,
        *,
        algorithms: Algorithm | Sequence[Algorithm] | None = None,
        optimizers: Optimizer | Sequence[Optimizer] | None = None,
        schedulers: Scheduler | Sequence[Scheduler] | None = None,
        loss: Callable[[Any, Any], Tensor] | None = None,
        metrics: Mapping[str, Metric] | None = None,
        train_metrics: Mapping[str, Metric] | None = None,
        callbacks: Callback | Sequence[Callback] | None = None,
        loggers: Destination | Sequence[Destination] | None = None,
        eval_interval: str | Time | int | Question = "1ep",
        eval_weights: Literal["averaged", "both"] = "averaged",
        log_interval: str | Time | int = "1ba",
        device: str | torch.device | None = None,
        precision: Literal["fp32", "amp_bf16", "amp_fp16"] = "fp32",
        parallelism: Literal["ddp", "fsdp2"] | None = None,
        grad_accum: int = 1,
        step_schedulers_every_batch: bool = False,
        seed: int | None = None,
        deterministic_mode: bool = False,
        run_name: str | None = None,
        progress_bar: bool | None = None,
        save_folder: str | Path | None = None,
        save_interval: str | Time | int | Question | None = None,
        save_num_checkpoints_to_keep: int | None = None,
        load_path: str | Path | None = None,
        load_weights_only: bool = False,
        load_ignore_keys: Sequence[str] = (),
        autoresume: bool = False,
        num_samples: Callable[[Any], int] = batches.num_samples,
        num_tokens: Callable[[Any], int] | None = None,
    ) -> None:
        # What is given, checked before anything is changed.
        inputs.check_model(model, loss)
        inputs.check_options(
            precision=precision,
            eval_weights=eval_weights,
            parallelism=parallelism,
            grad_accum=grad_accum,
            seed=seed,
            run_name=run_name,
            switches={
                "step_schedulers_every_batch": step_schedulers_every_batch,
                "deterministic_mode": deterministic_mode,
                "load_weights_only": load_weights_only,
                "autoresume": autoresume,
                "progress_bar": bool(progress_bar) if progress_bar is None else progress_bar,
            },
            functions={"num_samples": num_samples, "num_tokens": num_tokens},
        )
        inputs.check_device(device)
        inputs.check_path("load_path", load_path)
        inputs.check_ignored_keys(load_ignore_keys)
        inputs.check_batch_source(train_dataloader)
        made = inputs.Parts.of(
            model,
            algorithms=algorithms,
            optimizers=optimizers,
            schedulers=schedulers,
            callbacks=callbacks,
            loggers=loggers,
        )
        evaluators, counted = evaluators_of(eval_dataloader), inputs.counted_units(num_tokens)
        duration = None if max_duration is None else inputs.duration_of("max_duration", max_duration, counted)
        log_due = question("log_interval", log_interval, at=(Event.BATCH_END, Event.EPOCH_END), counted=counted)
        eval_due = evaluation_question(eval_interval, counted)
        own_metrics = inputs.metrics_of(model, metrics, train_metrics)
        name = run_name or f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
        made.callbacks += inputs.savers_of(save_folder, save_interval, save_num_checkpoints_to_keep, name)

        # The process and the ranks.
        if deterministic_mode:
            rng.use_deterministic_algorithms()
        if seed is not None:
            rng.seed_all(seed)
        self._group = parallel.start(parallelism, model, device)
        if parallel.kind_of(model) is None:
            model.to(self._group.device)
        model = parallel.spread(model, self._group, made.optimizers)
        self._seed = torch.initial_seed()

        # The parts.
        self._algorithms, self._callbacks = made.algorithms, made.callbacks
        self._data = rng.Stream(train_dataloader)
        self.state = TrainerState(
            model,
            duration,
            made.optimizers,
            made.schedulers,
            self._algorithms,
            self.save_checkpoint,
            timestamp=Timestamp(epoch_length=length_of(train_dataloader)),
            train_dataloader=train_dataloader,
            rank=self._group.rank,
            counted=counted,
            run_name=self._group.first(name),
            seed=self._seed,
        )
        destinations = [*made.loggers, *([ProgressBar()] if _shows_progress(progress_bar) else [])]
        self.logger = Logger(self.state, destinations if self._group.rank == 0 else [])
        self.state.callbacks = [*self._callbacks, *self.logger.destinations]
        self._engine = Engine(self.state, self.logger)
        self._forward = Forward(self.state, loss, precision, self._group.device)
        self._epochs = Epochs(train_dataloader, self.state, self._data, self._group, self._fire)
        for_training, for_evaluation = (Metrics(each, self._group) for each in own_metrics)
        self._step = Step(
            self.state,
            self._forward,
            self._group,
            self._fire,
            metrics=for_training,
            precision=precision,
            grad_accum=grad_accum,
            epochs=self._epochs,
            num_samples=num_samples,
            schedule_batches=step_schedulers_every_batch,
        )
        self._evaluation = Evaluation(
            self._engine,
            self.state,
            self._forward,
            self._group,
            self.logger,
            evaluators=evaluators,
            metrics=for_evaluation,
            count=num_samples,
            due=eval_due,
            both=eval_weights == "both",
        )
        self._fitting = Fitting(
            self._engine,
            self.state,
            epochs=self._epochs,
            stream=self._data,
            step=self._step,
            evaluation=self._evaluation,
            log=TrainingLog(self.state, self.logger, log_due, for_training),
            group=self._group,
            num_samples=num_samples,
            num_tokens=num_tokens,
        )
        self._checkpoints = Checkpoints(
            self.state,
            self._fire,
            self._group,
            stream=self._data,
            epochs=self._epochs,
            step=self._step,
            evaluation=self._evaluation,
            draw_anew=self._draw_anew,
        )
        self._fitted = self._closed = False
        if self._group.ranks:
            self._agree()
            self._part_random_numbers()

        # Where it begins.
        self._fire(Event.INIT)
        self.state.sharded = self._is_sharded()
        found = self._group.first(self._saved_checkpoints() if autoresume else [])
        self.state.found_no_checkpoint = autoresume and not found and load_path is None
        self._fire(Event.BEFORE_LOAD)
        if found:
            self._checkpoints.load(*checkpoint.read_newest(found, self._group))
        elif load_path is not None:
            load = self._checkpoints.load_weights if load_weights_only else self._checkpoints.load
            load(Path(load_path), checkpoint.read(Path(load_path), self._group), load_ignore_keys)
        self._fire(Event.AFTER_LOAD)

    def _fire(self, event: Event) -> None:
        self._engine.fire(event)

    # Ranks

    def _agree(self) -> None:
        assert self._group.ranks is not None
        self._group.ranks.agree(
            "the run",
            {
                "max_duration": str(self.state.max_duration),
                "batches in an epoch": self.state.timestamp.epoch_length,
                "number of optimizers": len(self.state.optimizers),
                "number of algorithms": len(self._algorithms),
                "batches of its own by DistributedSampler": self._epochs.own_batches,
            },
        )

    def _part_random_numbers(self) -> None:
        """Let all ranks draw one order of the data, and each other numbers in the model."""
        self._seed = self._group.first(self._seed)
        shared = self._group.first(self._data.get_state())
        if not self._epochs.own_batches:
            self._data.set_apart(shared)
        self._draw_anew()

    def _draw_anew(self) -> None:
        where = f"{self._seed} {self._group.rank} {self.state.timestamp.batch.value}"
        rng.seed_all(zlib.crc32(where.encode()))

    def _is_sharded(self) -> bool:
        if self._group.kind is None:
            return False
        return self._group.kind == "fsdp2" or any(checkpoint.has_shards(a.state_dict()) for a in self._algorithms)

    # Training

    def fit(
        self,
        train_dataloader: Iterable[Any] | None = None,
        duration: str | Time | int | None = None,
        *,
        reset_time: bool = False,
    ) -> None:
        """Train until ``max_duration``, or for ``duration`` from now, and evaluate at the end.

        After an exception inside a batch, the trainer stands where the last batch ended: call ``fit`` or
        ``save_checkpoint``, and nothing is lost.

        Args:
            train_dataloader: Instead of the trainer's from now on; it begins a new epoch.
            duration: How much longer to train; a number counts epochs.
            reset_time: Whether to set the clock back to the start. Weights, optimizers and schedulers stay.

        Raises:
            ArgumentError: If an argument is not what it must be.
            ValueError: If there is no ``train_dataloader``, ``max_duration`` or optimizer.
            LoanError: If the model holds an average.
        """
        if train_dataloader is not None:
            self._use_data(train_dataloader)
        if reset_time:
            self._reset_time()
        if duration is not None:
            longer = inputs.duration_of("duration", duration, self.state.counted)
            self.state.max_duration = self.state.timestamp.get(longer.unit) + longer
        missing = {
            "train_dataloader": self._epochs.loader is None,
            "max_duration": self.state.max_duration is None,
            "optimizers": not self.state.optimizers,
        }
        if any(missing.values()):
            raise ValueError(f"training needs {', '.join(name for name, absent in missing.items() if absent)}")
        if loan := loan_of(self.state.model):
            raise LoanError(f"training must begin with training weights: {loan.holder} has lent its average")
        self.state.stopping = False
        if self._fitted and self.state.finished:
            warnings.warn(
                f"fit() has nothing to train: the run has reached its max_duration, {self.state.max_duration}; give "
                "fit(duration=) to train longer, or reset_time=True to train anew",
                PlanWarning,
                stacklevel=2,
            )
        self._fitted = True
        self._fitting.run()

    def _use_data(self, train_dataloader: Iterable[Any]) -> None:
        inputs.check_batch_source(train_dataloader)
        if self._epochs.completed:
            self.state.timestamp = self.state.timestamp.to_next_epoch()
        self._data.generators = rng.generators_of(train_dataloader)
        self._epochs.use(train_dataloader)
        self.state.train_dataloader = train_dataloader
        self.state.timestamp = replace(self.state.timestamp, epoch_length=length_of(train_dataloader))

    def _reset_time(self) -> None:
        length = self.state.timestamp.epoch_length
        self.state.timestamp = self.state.previous_timestamp = Timestamp(epoch_length=length)
        self._epochs.completed = 0
        self._evaluation.evaluated_at = {}

    def eval(
        self,
        eval_dataloader: Iterable[Any] | Mapping[str, Iterable[Any]] | Evaluator | Sequence[Evaluator] | None = None,
    ) -> dict[str, float]:
        """Evaluate now, and return the metrics by name.

        Args:
            eval_dataloader: As for ``Trainer``; by default those of the trainer.

        Raises:
            ArgumentError: If it is not what it must be.
            ValueError: If there are no batches.
        """
        evaluators = self.state.evaluators if eval_dataloader is None else evaluators_of(eval_dataloader)
        if not evaluators:
            raise ValueError("an evaluation needs eval_dataloader, here or in Trainer(...)")
        try:
            self._fire(Event.EVAL_STANDALONE_START)
            metrics = self._evaluation.run(evaluators)
            self._fire(Event.EVAL_STANDALONE_END)
        except BaseException:
            self._fire(Event.EXCEPTION)
            raise
        return metrics

    def predict(self, dataloader: Iterable[Any]) -> list[Any]:
        """Return the outputs for each batch, from the averaged weights if there are any. Each rank runs all batches.

        Args:
            dataloader: Batches as the model takes them; of a pair, a plain module gets the first, its inputs.
        """
        return prediction.predict(self._engine, self.state, self._forward, self._group, dataloader)

    def close(self) -> None:
        """Let callbacks and loggers finish; the trainer is not used after that. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        for callback in self.state.callbacks:
            callback.close(self.state, self.logger)
        for callback in self.state.callbacks:
            callback.post_close()

    def save_checkpoint(self, path: str | Path) -> None:
        """Write a checkpoint of the run; it is complete or not there. All ranks must call this.

        It is a file, or a folder where the model or an average is divided over ranks.

        Args:
            path: Where.

        Raises:
            ShardingError: On the other ranks, if rank 0 could not write; on rank 0, what went wrong.
        """
        self._checkpoints.save(path)

    def _saved_checkpoints(self) -> list[Path]:
        for callback in self._callbacks:
            if isinstance(callback, CheckpointSaver):
                return callback.newest_first()
        raise ArgumentError(
            "autoresume needs save_folder, or a CheckpointSaver among the callbacks, to know where to look"
        )


def _shows_progress(asked: bool | None) -> bool:
    if asked is not None:
        return asked
    try:
        from rich.console import Console  # noqa: PLC0415  an extra
    except ImportError:
        return False
    return Console(stderr=True).is_terminal

"""``Trainer``: the native training loop."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from polyak.algorithm import Algorithm
from polyak.averaging.swap import swap_of
from polyak.errors import LoanError
from polyak.events import Event
from polyak.time import Time
from polyak.trainer import batches, inputs
from polyak.trainer.callback import Callback
from polyak.trainer.context import Context
from polyak.trainer.epochs import Epochs
from polyak.trainer.evaluation import Evaluation
from polyak.trainer.evaluators import Evaluator, evaluators_of
from polyak.trainer.fitting import Fitting
from polyak.trainer.intervals import Question
from polyak.trainer.loggers import Destination
from polyak.trainer.metrics import Metric
from polyak.trainer.options import Options
from polyak.trainer.polish import Polish
from polyak.trainer.saving import Checkpoints
from polyak.trainer.state import Scheduler
from polyak.trainer.step import Step
from polyak.training.evalweights import EvalWeights


class Trainer:
    """Train a model, with algorithms such as ``EMA`` at the events of MosaicML Composer's trainer.

    One batch of the clock is one optimizer step: a step that mixed precision skips is not counted. A run that resumes
    from a checkpoint has the same bits as a run that did not stop: weights, average, optimizers, schedulers, random
    numbers and the order of the data, also inside an epoch. (The random numbers of persistent workers are an exception,
    since their states cannot be read.) After ``fit``, and after any exception, the model has its training weights.

    With ``parallelism`` the same script trains on one device or, started by ``torchrun``, on many. All ranks draw the
    same batches, and each trains on its share, so that a batch does not depend on the number of ranks. If the loader's
    sampler is a ``DistributedSampler``, each rank draws its own batches, which together are the batch of the step.
    The loss and its gradient are means over the samples of that batch. The clock and all metrics are the same on all
    ranks. Rank 0 logs and prints. Callbacks run on all ranks. See ``docs/distributed.md``.

    Args:
        model: Either any module, together with ``loss``; or a ``ComposerModel``, which has a method
            ``loss(outputs, batch)``, whose ``forward`` takes the whole batch, and which may have
            ``eval_forward(batch)`` and ``update_metric(batch, outputs, metric)``.
        train_dataloader: Batches; for a plain module, pairs of inputs and targets.
        max_duration: How long to train: ``"10ep"``, ``"5000ba"``, ``"30m"``, or epochs as a number.
        eval_dataloader: Batches for evaluation, several loaders by label, or ``Evaluator`` objects.
        algorithms: Run at events, in order. At most one may swap an average in.
        optimizers: One or several over the model's parameters.
        schedulers: Learning rate schedulers of torch.
        loss: Function of outputs and targets, for a plain module.
        metrics: For evaluation, by name: torchmetrics, or objects with ``update(outputs, targets)``, ``compute`` and
            ``reset``; by default those of the model's ``get_metrics(is_train=False)``, if it has such a method.
        train_metrics: For training, computed on each batch that is logged; by default those of the model's
            ``get_metrics(is_train=True)``.
        callbacks: Run at events, after the algorithms.
        loggers: Where metrics go.
        eval_interval: Time between evaluations, or epochs as a number; the model is also evaluated at the end. With 0
            it is never evaluated. Or a function of the state and the event (``BATCH_END``, ``EPOCH_END`` or
            ``FIT_END``) that returns whether to evaluate.
        eval_weights: ``"averaged"`` evaluates the average, if there is one; ``"raw"`` the training weights; ``"both"``
            the average, as ``eval``, and the training weights, as ``eval_raw``.
        log_interval: Time between logs of the training loss.
        device: Where to train; by default the GPU if there is one, and with ``parallelism`` that of ``LOCAL_RANK``.
        precision: ``"fp32"``, or automatic mixed precision as ``"amp_bf16"`` or ``"amp_fp16"``.
        parallelism: ``"ddp"``: each rank has the full model; or ``"fsdp2"``: each rank has a shard of each tensor, of
            its gradient and of its optimizer state. The process group is initialized if it is not. A model that is in
            ``DistributedDataParallel`` or under ``fully_shard`` already is trained as it is.
        grad_accum: The number of microbatches of each batch, or of each rank's share of it.
        step_schedulers_every_batch: Whether schedulers step with batches instead of epochs.
        polish: How long, at the end of the run, to continue from the average: ``"5%"`` or a time; a number is one of
            steps. The average is loaded into the model, the optimizers keep their state, and their rates fall from 0.3
            of their current value to 0. The average is evaluated before it, as ``polish/before/...``, and the weights
            after it, as ``polish/after/...``. Once it has begun, evaluations, predictions and checkpoints use the
            training weights, since they are the result. It needs an ``EMA`` among ``algorithms``; without one, it takes
            the average that ``Record.recommend`` recommends for a ``Recorder``.
        seed: For all global random number generators, set here.
        deterministic_mode: Whether torch uses only deterministic algorithms, from now on in this process.
        run_name: The name of this run, as ``state.run_name``; made from the date by default.
        progress_bar: Whether to show one; None shows one on a terminal if rich is installed.
        save_folder: Where to save checkpoints, as by a ``CheckpointSaver`` among ``callbacks``; ``{run_name}`` in it
            is replaced by the run's name.
        save_interval: As for ``CheckpointSaver``; with ``save_folder``.
        save_num_checkpoints_to_keep: As its ``keep``, -1 for all; with ``save_folder``.
        load_path: A checkpoint to resume from.
        load_weights_only: Whether to load only weights from ``load_path``: the averaged ones, if there is an average.
        load_ignore_keys: What not to load from ``load_path``: entries such as ``"optimizers"``, ``"algorithms"`` and
            ``"timestamp"``, and tensors as ``"model/head.*"``; Composer's ``"state/"`` before them is allowed.
        autoresume: Whether to resume from the newest checkpoint of ``save_folder``, or of the ``CheckpointSaver`` among
            ``callbacks``, if there is one. If it is damaged, a warning says so and the one before it is loaded; if all
            are damaged, an error is raised.
        num_samples: Function of a batch: how many samples it has; by default the first dimension of its first tensor.
        num_tokens: Function of a batch: how many tokens it has; needed for times in ``tok``.

    Raises:
        ArgumentError: If an argument has a wrong type or value, or arguments contradict each other.
        TimeError: If a time cannot be read, or its unit is not counted.
        ValueError: If an optimizer has a state when the model is sharded.
        ShardingError: If the ranks were given different arguments.
        CheckpointError: If the checkpoint to load is not one, or is that of another model or other optimizers.

    Attributes:
        state: The state that algorithms and callbacks read.
        logger: Where they log.

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
        eval_weights: EvalWeights = "averaged",
        log_interval: str | Time | int = "1ba",
        device: str | torch.device | None = None,
        precision: Literal["fp32", "amp_bf16", "amp_fp16"] = "fp32",
        parallelism: Literal["ddp", "fsdp2"] | None = None,
        grad_accum: int = 1,
        step_schedulers_every_batch: bool = False,
        polish: str | Time | int | None = None,
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
        # All arguments, by name.
        checked = Options(**{name: value for name, value in locals().items() if name != "self"}).checked()
        self._context = Context.of(checked)
        self.state, self.logger = self._context.state, self._context.logger
        self._epochs = Epochs(self._context, train_dataloader, num_samples)
        self._step = Step(self._context, self._epochs, checked)
        self._evaluation = Evaluation(self._context, checked)
        phase = Polish(self._context, self._step, self._evaluation, checked.given.polish)
        self._fitting = Fitting(self._context, self._epochs, self._step, self._evaluation, phase, checked)
        self._checkpoints = Checkpoints(self._context, self._epochs, self._step, self._evaluation, phase)
        self._closed = False
        self._checkpoints.begin(checked.given)

    # Training

    def fit(
        self,
        train_dataloader: Iterable[Any] | None = None,
        duration: str | Time | int | None = None,
        *,
        reset_time: bool = False,
    ) -> None:
        """Train until ``max_duration``, or for ``duration`` from now, and evaluate at the end.

        After an exception inside a batch, the trainer is as it was at the end of the batch before: ``fit`` continues
        from there, and ``save_checkpoint`` saves that state.

        Args:
            train_dataloader: Replaces the trainer's; a new epoch begins.
            duration: How much longer to train; a number is one of epochs.
            reset_time: Whether to set the clock back to the start. Weights, optimizers and schedulers stay.

        Raises:
            ArgumentError: If an argument has a wrong type or value.
            TimeError: If ``duration`` cannot be read, or its unit is not counted.
            ValueError: If there is no ``train_dataloader``, ``max_duration`` or optimizer.
            LoanError: If the model holds an average.
        """
        if train_dataloader is not None:
            self._epochs.use(inputs.check_loader("train_dataloader", train_dataloader))
        if reset_time:
            self._fitting.reset_time()
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
        if swap := swap_of(self.state.model):
            raise LoanError(f"training must begin with training weights: {swap.owner} has swapped its average in")
        self._fitting.run()

    def eval(
        self,
        eval_dataloader: Iterable[Any] | Mapping[str, Iterable[Any]] | Evaluator | Sequence[Evaluator] | None = None,
    ) -> dict[str, float]:
        """Evaluate now, and return the metrics by name.

        Args:
            eval_dataloader: As for ``Trainer``; by default those of the trainer.

        Raises:
            ArgumentError: If it cannot be evaluated.
            ValueError: If there are no batches.
        """
        evaluators = self.state.evaluators if eval_dataloader is None else evaluators_of(eval_dataloader)
        if not evaluators:
            raise ValueError("an evaluation needs eval_dataloader, here or in Trainer(...)")
        try:
            self._context.loop.fire(Event.EVAL_STANDALONE_START)
            metrics = self._evaluation.run(evaluators)
            self._context.loop.fire(Event.EVAL_STANDALONE_END)
        except BaseException:
            self._context.loop.fire(Event.EXCEPTION)
            raise
        return metrics

    def predict(self, dataloader: Iterable[Any]) -> list[Any]:
        """Return the outputs for each batch, from the averaged weights if there are any. Each rank runs all batches.

        Args:
            dataloader: Batches as the model takes them; a plain module gets the first of a pair, its inputs.
        """
        return self._evaluation.predict(dataloader)

    def close(self) -> None:
        """Close callbacks and loggers; do not use the trainer after that. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        for callback in self.state.callbacks:
            callback.close(self.state, self.logger)
        for callback in self.state.callbacks:
            callback.post_close()

    def save_checkpoint(self, path: str | Path) -> None:
        """Write a checkpoint of the run; it is complete or absent. A collective: all ranks must call it.

        It is a file, or a folder if the model or an average is sharded over ranks.

        Args:
            path: Where to write it.

        Raises:
            CheckpointError: If an optimizer has a state for a parameter that was removed from it.
            ShardingError: On the other ranks, if rank 0 could not write. Rank 0 raises the error itself.
        """
        self._checkpoints.save(path)

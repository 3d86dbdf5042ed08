"""The training loop."""

import math
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from polyak.algorithm import Algorithm, dispatch
from polyak.errors import CheckpointError, LoanError, PlanWarning
from polyak.events import Event
from polyak.select import unwrap
from polyak.swap import swap_of
from polyak.time import Time, Timestamp, TimeUnit, as_span
from polyak.trainer import batches, checkpoint, parallel, rng
from polyak.trainer.callback import Callback
from polyak.trainer.checkpoint import CheckpointSaver
from polyak.trainer.evaluation import Evaluator, Metric, drawing_alike, eval_mode
from polyak.trainer.loggers import Destination, Logger
from polyak.trainer.progress import ProgressBar
from polyak.trainer.state import Scheduler, TrainerState, countable, every

T = TypeVar("T")

_PRECISIONS = {"fp32": None, "amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}
_MOST_SKIPPED = 100
_END = object()


class Trainer:
    """Train a model, with algorithms such as ``EMA`` at the events of MosaicML Composer's trainer.

    One batch of the clock is one optimizer step: a step that mixed precision skips is not counted. Training goes on
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
        max_duration: How long to train: ``"10ep"``, ``"5000ba"``, ``"30m"``.
        eval_dataloader: Batches for evaluation, or several loaders by name.
        algorithms: Run at events, in order. Of those that lend an average there can be one.
        optimizers: One or several over the model's parameters.
        schedulers: Learning rate schedulers of torch.
        loss: Function of outputs and targets, for a plain module.
        metrics: For evaluation, by name: torchmetrics, or whatever has ``update(outputs, targets)``, ``compute`` and
            ``reset``.
        callbacks: Run at events, after the algorithms.
        loggers: Where metrics go.
        eval_interval: Time between evaluations; there is one at the end too.
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
        progress_bar: Whether to show one; None shows it on a terminal where rich is installed.
        load_path: A checkpoint to go on from.
        autoresume: Whether to go on from the newest checkpoint of the ``CheckpointSaver`` among ``callbacks``, if it
            has one.
        num_samples: Function of a batch: how many samples it has; by default the first dimension of its first tensor.
        num_tokens: Function of a batch: how many tokens it has; needed for times in ``tok``.

    Raises:
        ValueError: If arguments contradict each other, or an optimizer has a state already when the model is sharded.
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
        max_duration: str | Time | None = None,
        eval_dataloader: Iterable[Any] | Mapping[str, Iterable[Any]] | None = None,
        *,
        algorithms: Algorithm | Sequence[Algorithm] | None = None,
        optimizers: Optimizer | Sequence[Optimizer] | None = None,
        schedulers: Scheduler | Sequence[Scheduler] | None = None,
        loss: Callable[[Any, Any], Tensor] | None = None,
        metrics: Mapping[str, Metric] | None = None,
        callbacks: Callback | Sequence[Callback] | None = None,
        loggers: Destination | Sequence[Destination] | None = None,
        eval_interval: str | Time = "1ep",
        eval_weights: Literal["averaged", "both"] = "averaged",
        log_interval: str | Time = "1ba",
        device: str | torch.device | None = None,
        precision: Literal["fp32", "amp_bf16", "amp_fp16"] = "fp32",
        parallelism: Literal["ddp", "fsdp2"] | None = None,
        grad_accum: int = 1,
        step_schedulers_every_batch: bool = False,
        seed: int | None = None,
        progress_bar: bool | None = None,
        load_path: str | Path | None = None,
        autoresume: bool = False,
        num_samples: Callable[[Any], int] = batches.num_samples,
        num_tokens: Callable[[Any], int] | None = None,
    ) -> None:
        _check(model, loss, _listed(algorithms))
        if grad_accum < 1:
            raise ValueError(f"grad_accum must be at least 1 (got {grad_accum})")
        if eval_weights not in ("averaged", "both"):
            raise ValueError(f"eval_weights must be 'averaged' or 'both' (got {eval_weights!r})")
        if precision not in _PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(_PRECISIONS)} (got {precision!r})")
        if seed is not None:
            rng.seed_all(seed)

        self._group = parallel.start(parallelism, model, device)
        self._device = self._group.device
        if parallel.kind_of(model) is None:
            model.to(self._device)
        model = parallel.spread(model, self._group, _listed(optimizers))
        self._algorithms, self._callbacks = _listed(algorithms), _listed(callbacks)
        self._train_loader = train_dataloader
        self._eval_loaders = _by_label(eval_dataloader)
        self._evaluator = Evaluator(dict(metrics.items()) if metrics else {}, self._group, num_samples)
        self._loss = loss
        self._eval_both = eval_weights == "both"
        self._eval_due = _each("eval_interval", eval_interval)
        self._log_due = _each("log_interval", log_interval)
        self._autocast_to = _PRECISIONS[precision]
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=precision == "amp_fp16")
        self._grad_accum = grad_accum
        self._schedule_batches = step_schedulers_every_batch
        self._count_samples, self._count_tokens = num_samples, num_tokens
        self._drawn = 0  # batches of this epoch, with those whose step was skipped
        self._skipped_in_a_row = 0
        self._epoch_rng: dict[str, Any] | None = None
        self._evaluated_at: Time | None = None  # the batch

        self.state = TrainerState(
            model,
            _duration(max_duration, tokens=num_tokens is not None),
            _listed(optimizers),
            _listed(schedulers),
            self._algorithms,
            self.save_checkpoint,
            Timestamp(epoch_length=_length(train_dataloader)),
            rank=self._group.rank,
        )
        destinations = [*_listed(loggers), *([ProgressBar()] if _shows_progress(progress_bar) else [])]
        self.logger = Logger(self.state, destinations if self._group.rank == 0 else [])
        self._data = rng.Stream(train_dataloader)
        self._own_batches = parallel.divides_itself(train_dataloader)
        self._seed = torch.initial_seed()
        if self._group.ranks:
            self._agree()
            self._part_random_numbers()

        self._fire(Event.INIT)
        self.state.sharded = self._is_sharded()
        if autoresume:
            load_path = self._group.first(self._newest_checkpoint() or load_path)
        self._fire(Event.BEFORE_LOAD)
        if load_path is not None:
            self._load(Path(load_path))
        self._fire(Event.AFTER_LOAD)

    def _fire(self, event: Event) -> None:
        dispatch(event, self.state, self._algorithms, self.logger)
        for callback in (*self._callbacks, *self.logger.destinations):
            callback.run_event(event, self.state, self.logger)

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
                "batches of its own by DistributedSampler": self._own_batches,
            },
        )

    def _part_random_numbers(self) -> None:
        """Let all ranks draw one order of the data, and each other numbers in the model."""
        self._seed = self._group.first(self._seed)
        shared = self._group.first(self._data.get_state())
        if not self._own_batches:
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

    def fit(self) -> None:
        """Train until ``max_duration``, and evaluate at the end.

        Raises:
            ValueError: If there is no ``train_dataloader``, ``max_duration`` or optimizer.
            LoanError: If the model holds an average.
        """
        missing = {
            "train_dataloader": self._train_loader is None,
            "max_duration": self.state.max_duration is None,
            "optimizers": not self.state.optimizers,
        }
        if any(missing.values()):
            raise ValueError(f"training needs {', '.join(name for name, absent in missing.items() if absent)}")
        if loan := swap_of(self.state.model):
            raise LoanError(f"training must begin with training weights: {loan.holder} has lent its average")
        try:
            self._fire(Event.FIT_START)
            self.state.model.train()
            while not self.state.finished:
                self._train_epoch()
            self._fire(Event.FIT_END)
            if self._evaluated_at != self.state.timestamp.batch:
                self._evaluate()
        except BaseException:
            self._fire(Event.EXCEPTION)
            raise

    def _train_epoch(self) -> None:
        if self._drawn == 0:
            self._fire(Event.EPOCH_START)
        began = time.perf_counter()
        for batch in self._rest_of_epoch():
            self._drawn += 1
            self._fire(Event.BATCH_START)
            stepped = self._train_batch(batch)
            self.state.previous_timestamp = self.state.timestamp
            self.state.timestamp = self._after(batch, time.perf_counter() - began, steps=int(stepped))
            self._log_training_if_due(Event.BATCH_END)
            self._fire(Event.BATCH_END)
            self._evaluate_if_due(Event.BATCH_END)
            self._fire(Event.BATCH_CHECKPOINT)
            began = time.perf_counter()
            if self.state.finished:
                break
        if not self.state.finished or self._drawn == self.state.timestamp.epoch_length:
            self._end_epoch()

    def _after(self, batch: Any, seconds: float, steps: int) -> Timestamp:
        """Return the moment after a batch: the same on all ranks, by the first one's clock."""
        samples, tokens = self._count_samples(batch), self._count_tokens(batch) if self._count_tokens else 0
        if self._group.ranks:
            first = self._group.rank == 0
            own = (samples, tokens) if first or self._own_batches else (0, 0)
            samples, tokens, seconds = self._group.totals(*own, seconds if first else 0.0)
        return self.state.timestamp.to_next_batch(
            samples=int(samples), tokens=int(tokens), seconds=seconds, steps=steps
        )

    def _rest_of_epoch(self) -> Iterator[Any]:
        """Yield the batches of this epoch that are not drawn yet, in the order in which they would have come."""
        loader = self._train_loader
        assert loader is not None
        for sampler in (getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
            for one in (sampler, getattr(sampler, "sampler", None)):
                if hasattr(one, "set_epoch"):
                    one.set_epoch(self.state.timestamp.epoch.value)
        skip, now = self._drawn, self._data.get_state()
        if skip:
            # The order and the random transforms of an epoch follow from the generators' states at its beginning.
            assert self._epoch_rng is not None
            self._data.set_state(self._epoch_rng)
        else:
            self._epoch_rng = now
        with self._data.drawn():
            iterator = iter(loader)
        for drawn in range(skip):
            with self._data.drawn():
                if next(iterator, _END) is _END:
                    raise CheckpointError(
                        f"the data must be those of the checkpoint, which was saved after {skip} batches of an epoch "
                        f"(got a train_dataloader that gives {drawn})"
                    )
        if skip:
            self._data.set_state(now)
        empty = skip == 0
        while True:
            with self._data.drawn():
                batch = next(iterator, _END)
            if batch is _END:
                break
            if empty:
                self._compare(batch)
            empty = False
            yield batch
        if empty:
            raise ValueError("train_dataloader must give at least one batch an epoch (it gave none)")

    def _compare(self, batch: Any) -> None:
        """Warn if the ranks, which must draw the same batches, do not."""
        if self._group.ranks and not self._own_batches:
            sums = self._group.each(batches.checksum(batch))
            if len(set(sums)) > 1:
                warnings.warn(
                    "all ranks must draw the same batches, of which each takes its part, and the first of this epoch "
                    f"differs (checksums by rank: {sums}): if the order does, samples are left out; seed it alike on "
                    "all ranks, or give the loader a DistributedSampler",
                    PlanWarning,
                    stacklevel=2,
                )

    def _train_batch(self, batch: Any) -> bool:
        """Run a batch; return whether the weights were moved."""
        for optimizer in self.state.optimizers:
            optimizer.zero_grad()
        where = {} if self._own_batches else {"rank": self._group.rank, "size": self._group.size}
        parts = batches.shares(batch, self._grad_accum, self._count_samples, **where)
        total: Tensor | None = None
        for i, (part, factor) in enumerate(parts):
            with self._gradients_kept_here(i + 1 < len(parts)):
                _, loss = self._step(batches.to_device(part, self._device))
                if factor != 1:
                    loss = loss * factor
                self._scaler.scale(loss).backward()
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        self.state.loss = self._group.mean(total)
        scale = self._scaler.get_scale()
        for optimizer in self.state.optimizers:
            self._scaler.step(optimizer)
        self._scaler.update()
        stepped = self._scaler.get_scale() >= scale
        self._skipped_in_a_row = 0 if stepped else self._skipped_in_a_row + 1
        if self._skipped_in_a_row == _MOST_SKIPPED:
            raise RuntimeError(
                f"gradients must be finite, and those of the last {_MOST_SKIPPED} batches were not: no step was made; "
                "look at the loss, or use precision='amp_bf16'"
            )
        if stepped and self._schedule_batches:
            self._step_schedulers()
        return stepped

    def _gradients_kept_here(self, kept: bool) -> AbstractContextManager[object]:
        """Return a context in which no gradients are sent to other ranks, if they are to be kept."""
        model = self.state.model
        return model.no_sync() if kept and isinstance(model, DistributedDataParallel) else nullcontext()

    def _step(self, batch: Any, *, evaluating: bool = False) -> tuple[Any, Tensor]:
        """Return the outputs and the loss of a batch."""
        model: Any = self.state.model
        with self._autocast():
            if self._loss is not None:
                inputs, targets = batch
                outputs = model(inputs)
                return outputs, self._loss(outputs, targets)
            inner: Any = unwrap(model)
            outputs = inner.eval_forward(batch) if evaluating and hasattr(inner, "eval_forward") else model(batch)
            return outputs, inner.loss(outputs, batch)

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self._device.type, dtype=self._autocast_to) if self._autocast_to else nullcontext()

    def _step_schedulers(self) -> None:
        for scheduler in self.state.schedulers:
            scheduler.step()

    def _log_training_if_due(self, event: Event) -> None:
        if not self._log_due(self.state, event) or not self.logger.destinations:
            return
        assert self.state.loss is not None
        metrics = {"train/loss": float(self.state.loss)}
        metrics |= {
            f"lr{i or ''}": float(optimizer.param_groups[0]["lr"]) for i, optimizer in enumerate(self.state.optimizers)
        }
        self.logger.log_metrics(metrics)

    def _end_epoch(self) -> None:
        if not self._schedule_batches:
            self._step_schedulers()
        self.state.previous_timestamp = self.state.timestamp
        self.state.timestamp = self.state.timestamp.to_next_epoch()
        self._drawn = 0
        self._log_training_if_due(Event.EPOCH_END)
        self._fire(Event.EPOCH_END)
        self._evaluate_if_due(Event.EPOCH_END)
        self._fire(Event.EPOCH_CHECKPOINT)

    # Evaluation

    def _evaluate_if_due(self, event: Event) -> None:
        if self._eval_loaders and self._eval_due(self.state, event):
            self._evaluate()

    def _evaluate(self) -> None:
        if not self._eval_loaders:
            return
        self._fire(Event.EVAL_BEFORE_ALL)
        self._run_evaluations(self._eval_loaders)
        self._fire(Event.EVAL_AFTER_ALL)
        self._evaluated_at = self.state.timestamp.batch

    def _run_evaluations(self, loaders: Mapping[str, Iterable[Any]]) -> dict[str, float]:
        metrics: dict[str, float] = {}
        self._group.share_buffers(self.state.model)
        for label, loader in loaders.items():
            if self._eval_both:
                metrics |= self._evaluate_on(loader, f"{label}_raw")
            self._fire(Event.EVAL_START)
            metrics |= self._evaluate_on(loader, label)
            self.state.eval_metrics = dict(metrics)
            self._fire(Event.EVAL_END)
        self.logger.log_metrics(metrics)
        return metrics

    def _evaluate_on(self, loader: Iterable[Any], label: str) -> dict[str, float]:
        found = self._evaluator.run(self.state.model, loader, lambda batch: self._step(batch, evaluating=True))
        return {f"{label}/{name}": value for name, value in found.items()}

    def eval(self, eval_dataloader: Iterable[Any] | Mapping[str, Iterable[Any]] | None = None) -> dict[str, float]:
        """Evaluate now, and return the metrics by name.

        Args:
            eval_dataloader: Batches, or several loaders by name; by default those of the trainer.

        Raises:
            ValueError: If there are no batches.
        """
        loaders = self._eval_loaders if eval_dataloader is None else _by_label(eval_dataloader)
        if not loaders:
            raise ValueError("an evaluation needs eval_dataloader, here or in Trainer(...)")
        try:
            self._fire(Event.EVAL_STANDALONE_START)
            metrics = self._run_evaluations(loaders)
            self._fire(Event.EVAL_STANDALONE_END)
        except BaseException:
            self._fire(Event.EXCEPTION)
            raise
        return metrics

    @torch.no_grad()
    def predict(self, dataloader: Iterable[Any]) -> list[Any]:
        """Return the outputs for each batch, from the averaged weights if there are any. Each rank runs all batches.

        Args:
            dataloader: Batches as the model takes them; of a pair, a plain module gets the first, its inputs.
        """
        model = self.state.model
        outputs = []
        try:
            self._fire(Event.PREDICT_START)
            with drawing_alike(dataloader, self._group), eval_mode(model), self._autocast():
                for batch in dataloader:
                    moved = batches.to_device(batch, self._device)
                    paired = self._loss is not None and isinstance(moved, (tuple, list))
                    outputs.append(model(moved[0] if paired else moved))
        finally:
            self._fire(Event.PREDICT_END)
        return outputs

    # Checkpoints

    def save_checkpoint(self, path: str | Path) -> None:
        """Write a checkpoint of the run; it is complete or not there. All ranks must call this.

        It is a file, or a folder where the model or an average is divided over ranks.

        Args:
            path: Where.

        Raises:
            ShardingError: On the other ranks, if the first could not write; on the first, what went wrong.
        """
        self.state.saving_to = Path(path)
        try:
            self._group.share_buffers(self.state.model)
            self._fire(Event.SAVE_START)
            checkpoint.write(
                {
                    **checkpoint.model_entries(self.state.model),
                    "optimizers": [optimizer.state_dict() for optimizer in self.state.optimizers],
                    "schedulers": [scheduler.state_dict() for scheduler in self.state.schedulers],
                    "scaler": self._scaler.state_dict(),
                    "algorithms": [(type(a).__qualname__, a.state_dict()) for a in self._algorithms],
                    "callbacks": [(type(c).__qualname__, c.state_dict()) for c in self._stateful_callbacks()],
                    "timestamp": self.state.timestamp.state_dict(),
                    "evaluated_at": self._evaluated_at.value if self._evaluated_at else None,
                    "eval_metrics": self.state.eval_metrics,
                    "drawn": self._drawn,
                    "skipped_in_a_row": self._skipped_in_a_row,
                    **self._random_states(),
                },
                Path(path),
                self._group,
            )
        finally:
            self._fire(Event.SAVE_END)
            self.state.saving_to = None

    def _random_states(self) -> dict[str, Any]:
        """Return the states of the ranks' generators, by rank; what all draw alike, once."""
        apart = self._data.apart
        return {
            "rng": self._group.to_first(rng.get_state(self._data.generators)),
            "epoch_rng": [self._epoch_rng] if apart else self._group.to_first(self._epoch_rng),
            "data_rng": self._data.get_state() if apart else None,
        }

    def _newest_checkpoint(self) -> Path | None:
        for callback in self._callbacks:
            if isinstance(callback, CheckpointSaver):
                return callback.latest()
        raise ValueError("autoresume needs a CheckpointSaver among the callbacks, to know where to look")

    def _stateful_callbacks(self) -> list[Callback]:
        return [*self._callbacks, *self.logger.destinations]

    def _load(self, path: Path) -> None:
        saved = checkpoint.read(path, self._group)
        for name, ours in (("optimizers", self.state.optimizers), ("schedulers", self.state.schedulers)):
            if len(saved[name]) != len(ours):
                raise CheckpointError(
                    f"{path} must have as many {name} as the trainer, {len(ours)} (it has {len(saved[name])})"
                )
        weights = saved["model"] if saved["training_model"] is None else saved["training_model"]
        try:
            checkpoint.load_model(self.state.model, weights)
        except RuntimeError as error:
            raise CheckpointError(f"the model must be that of {path}: {error}") from error
        for optimizer, state in zip(self.state.optimizers, saved["optimizers"], strict=True):
            checkpoint.load_optimizer(optimizer, state)
        for scheduler, state in zip(self.state.schedulers, saved["schedulers"], strict=True):
            scheduler.load_state_dict(state)
        if saved["scaler"]:
            self._scaler.load_state_dict(saved["scaler"])
        _hand_out("algorithm", saved["algorithms"], self._algorithms, path)
        _hand_out("callback", saved["callbacks"], self._stateful_callbacks(), path)
        timestamp, length = Timestamp.from_state_dict(saved["timestamp"]), self.state.timestamp.epoch_length
        generators = self._data.generators
        had = len(saved["rng"][0]["generators"])
        if (saved["drawn"] and timestamp.epoch_length != length) or had != len(generators):
            raise CheckpointError(
                f"the data must be those of {path}, saved inside an epoch of {timestamp.epoch_length} batches with "
                f"{had} generators of the data loader's own (got {length} batches and "
                f"{len(generators)}); to go on with other data, load a checkpoint from the end of an epoch"
            )
        self.state.timestamp = self.state.previous_timestamp = replace(timestamp, epoch_length=length)
        self.state.eval_metrics = saved["eval_metrics"]
        if saved["evaluated_at"] is not None:
            self._evaluated_at = Time(saved["evaluated_at"], TimeUnit.BATCH)
        self._drawn, self._skipped_in_a_row = saved["drawn"], saved["skipped_in_a_row"]
        self._load_random_states(saved, path)

    def _load_random_states(self, saved: Mapping[str, Any], path: Path) -> None:
        own, of_epoch, of_data = saved["rng"], saved["epoch_rng"], saved["data_rng"]
        if len(own) == self._group.size and (of_data is not None) == self._data.apart:
            rng.set_state(own[self._group.rank], self._data.generators)
            self._epoch_rng = of_epoch[0 if self._data.apart else self._group.rank]
            if of_data is not None:
                self._data.set_state(of_data)
            return
        if saved["drawn"] and (self._own_batches or (of_data is None and len(own) > 1)):
            raise CheckpointError(
                "a checkpoint from inside an epoch that a DistributedSampler divides must be loaded by as many ranks, "
                f"with one ({path} was saved by {len(own)} ranks, and {self._group.size} load it); load one from the "
                "end of an epoch"
            )
        warnings.warn(
            f"{path} was saved by other ranks ({len(own)}) than go on ({self._group.size}): the order of the data goes "
            "on as it was, and what each rank draws at random besides, as in dropout, begins anew",
            PlanWarning,
            stacklevel=4,
        )
        if self._group.size > 1:
            self._draw_anew()
        self._data.set_state(of_data or own[0])
        self._epoch_rng = of_epoch[0]


def _listed(given: T | Sequence[T] | None) -> list[T]:
    if given is None:
        return []
    return list(given) if isinstance(given, Sequence) else [given]


def _by_label(loaders: Iterable[Any] | Mapping[str, Iterable[Any]] | None) -> Mapping[str, Iterable[Any]]:
    if isinstance(loaders, Mapping):
        return loaders
    return {} if loaders is None else {"eval": loaders}


def _length(loader: Any) -> int | None:
    """Return the number of batches in an epoch, if the loader knows it."""
    try:
        return len(loader)
    except TypeError:
        return None


def _each(name: str, interval: str | Time) -> Callable[[TrainerState, Event], bool]:
    return every(as_span(name, interval, above=0, whole=True), at=(Event.BATCH_END, Event.EPOCH_END))


def _duration(max_duration: str | Time | None, *, tokens: bool) -> Time | None:
    if max_duration is None:
        return None
    duration = countable(as_span("max_duration", max_duration, above=0, whole=True), tokens=tokens)
    if math.isinf(duration.value) or duration.unit is TimeUnit.DURATION:
        raise ValueError(f"max_duration must be finite, and in another unit than dur (got {duration})")
    return duration


def _check(model: nn.Module, loss: object, algorithms: Sequence[Algorithm]) -> None:
    own_loss = getattr(unwrap(model), "loss", None)
    if (loss is None) == (own_loss is None):
        raise ValueError(
            "give loss=, a function of (outputs, targets), for a plain module; a model with a method loss(outputs, "
            f"batch) needs none (got loss={loss!r} and a {type(model).__name__} whose loss is {own_loss!r})"
        )
    if sum(algorithm.lends for algorithm in algorithms) > 1:
        raise ValueError(
            "a model can hold one average at a time, so of the algorithms that lend one there can be one (got "
            f"{[algorithm for algorithm in algorithms if algorithm.lends]}); to compare averages, attach them apart"
        )


def _shows_progress(asked: bool | None) -> bool:
    if asked is not None:
        return asked
    try:
        from rich.console import Console  # noqa: PLC0415  an extra
    except ImportError:
        return False
    return Console(stderr=True).is_terminal


def _hand_out(
    kind: str, saved: Sequence[tuple[str, dict[str, Any]]], ours: Sequence[Algorithm | Callback], path: Path
) -> None:
    """Give each of ours the first saved state of its class that is left."""
    left = list(saved)
    for one in ours:
        for entry in left:
            if entry[0] == type(one).__qualname__:
                one.load_state_dict(entry[1])
                left.remove(entry)
                break
    if kind == "algorithm" and left:
        warnings.warn(
            f"{path} has the states of algorithms that this trainer has not: {', '.join(name for name, _ in left)}; "
            "training goes on from the training weights, without them",
            PlanWarning,
            stacklevel=4,
        )

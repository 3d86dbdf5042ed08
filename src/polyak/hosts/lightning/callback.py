"""``Averaging``: a callback for Lightning's ``Trainer``."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError:
    from pytorch_lightning import Callback

from polyak.algorithm import Algorithm, as_algorithms
from polyak.averaging.swap import swap_of
from polyak.errors import ArgumentError, PlanWarning
from polyak.events import Event
from polyak.hosts.lightning.evaluation import Evaluation, Weights, weights_of
from polyak.hosts.lightning.raw import evaluate_raw_first
from polyak.hosts.lightning.strategies import refuse_foreign
from polyak.sharding import whole
from polyak.tensors.slots import unwrap
from polyak.time import Time, TimeUnit
from polyak.training import rng, sharded
from polyak.training.handle import Handle
from polyak.training.loop import Loop
from polyak.training.sizes import BatchSizes
from polyak.training.state import LoopState
from polyak.training.steps import StepHooks
from polyak.training.uncountable import refuse_uncountable

_KEY = "polyak"


class Averaging(Handle, Callback):
    """Run ``EMA``, ``Recorder`` or other algorithms in a Lightning ``Trainer``.

    An optimizer step that moved weights is one batch of their clock; half-lives may be in ``ba``, ``ep``, ``dur`` and,
    if they are counted, ``sp`` and ``tok``. Validation, test and prediction run with the average, and the model has its
    training weights before and after. A checkpoint has the average as ``state_dict``, from which
    ``load_from_checkpoint`` takes it, and the training weights under ``polyak``, with which ``fit(ckpt_path=...)``
    resumes. Where a checkpoint is evaluated (``test(ckpt_path=...)``), the model has that checkpoint's average. This is
    also the handle of the average: ``model``, ``applied()``, ``save`` and more, once ``fit`` has begun.

    Args:
        algorithms: One or several; one of them at most may swap an average in.
        eval_weights: ``"averaged"``; ``"raw"`` to evaluate and predict with the training weights; or ``"both"``: then
            ``val_loss`` and other plain names are metrics of the average, which checkpoints have, and ``raw_val_loss``
            of the training weights. Or a list of the first two, one for each dataloader. It may be changed.
        num_samples: Function of a batch: how many samples it has; needed for times in ``sp``.
        num_tokens: Function of a batch: how many tokens it has; needed for times in ``tok``.
        optimizer: If there are several optimizers, the number of the one whose steps are counted.

    Raises:
        ArgumentError: If more than one algorithm swaps an average in, or ``eval_weights`` is not one of its values.
        TimeError: If a time is in a unit that is not counted, or ``ProfileError`` if that is a profile's.
    """

    def __init__(
        self,
        algorithms: Algorithm | Sequence[Algorithm],
        *,
        eval_weights: Weights = "averaged",
        num_samples: Callable[[Any], int] | None = None,
        num_tokens: Callable[[Any], int] | None = None,
        optimizer: int = 0,
    ) -> None:
        super().__init__()
        self.algorithms = as_algorithms(algorithms)
        self._eval_weights = weights_of(eval_weights)
        self._sizes = BatchSizes(num_samples, num_tokens)
        refuse_uncountable(self.algorithms, self._sizes.units)
        if not isinstance(optimizer, int) or isinstance(optimizer, bool) or optimizer < 0:
            raise ArgumentError(f"optimizer must be the number of an optimizer, from 0 (got {optimizer!r})")
        self._optimizer = optimizer
        self._trainer: Any = None
        self._loop: Loop | None = None
        self._hooks: StepHooks | None = None
        self._in_epoch = False
        self._evaluation = Evaluation()
        self._random: Mapping[str, Any] | None = None

    @property
    def eval_weights(self) -> Weights:
        """Which weights are evaluated."""
        return self._eval_weights

    @eval_weights.setter
    def eval_weights(self, eval_weights: Weights) -> None:
        self._eval_weights = weights_of(eval_weights)

    def _follows(self) -> Loop | None:
        return self._loop

    # Set-up

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Let the algorithms meet the model; refuse strategies under which they would average wrong weights.

        Args:
            trainer: Lightning's.
            pl_module: The model.
            stage: The stage that begins.

        Raises:
            NotImplementedError: Under DeepSpeed and FSDP1.
        """
        refuse_foreign(trainer.strategy)
        if stage == "fit" and (self._loop is None or unwrap(self._loop.state.model) is not unwrap(pl_module)):
            self._loop = Loop(self.algorithms, LoopState(pl_module), self, counts=self._sizes.units)
            self._loop.meet()
            self._evaluation.loop = self._loop
        if trainer is not self._trainer:
            self._trainer = trainer
            _surround_saving(trainer, lambda: self._loop)
            evaluate_raw_first(trainer, lambda: self.eval_weights == "both" and self._evaluation.has_average(trainer))

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics by the trainer's loggers.

        Args:
            metrics: The metrics, by name.
            step: Not used: the trainer's own is that of its other metrics.
        """
        del step
        if self._trainer.sanity_checking:
            return  # as Lightning itself
        for logger in self._trainer.loggers:
            logger.log_metrics(dict(metrics), step=self._trainer.global_step)

    # Training

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Note the model's wrapper; restore random numbers: Lightning draws from them before it trains."""
        del pl_module
        assert self._loop is not None
        self._loop.state.model = trainer.strategy.model
        if self._random is not None and trainer.world_size == 1:
            rng.set_state(self._random)
        self._random = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to count steps."""
        assert self._loop is not None
        self._stop_counting()
        _set_lengths(self._loop, trainer, pl_module)
        self._hooks = self._loop.count(_optimizer_of(trainer, self._optimizer), self._after_step)
        self._sizes.take()
        self._loop.fire(Event.FIT_START)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin an epoch."""
        assert self._loop is not None
        _set_lengths(self._loop, trainer, pl_module)
        self._loop.begin_epoch()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Count the samples and tokens of a batch."""
        del pl_module, batch_idx
        self._in_epoch = True
        self._sizes.add(batch, trainer.world_size)

    def _after_step(self) -> None:
        assert self._loop is not None
        self._loop.end_batch(**self._sizes.take())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End the epoch with its last batch: Lightning validates and saves before its own end of the epoch."""
        del pl_module, outputs, batch, batch_idx
        self._end_epoch(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """End an epoch that was cut short."""
        del pl_module
        self._end_epoch(trainer)

    def _end_epoch(self, trainer: Any) -> None:
        assert self._loop is not None
        if self._in_epoch and trainer.is_last_batch:
            self._in_epoch = False
            self._loop.end_epoch()

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """End training, after the last checkpoint."""
        del trainer, pl_module
        if self._loop is not None and self._stop_counting():
            self._loop.fire(Event.FIT_END)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Restore the training weights."""
        del trainer, pl_module, exception
        self._evaluation.abandon()
        self._stop_counting()
        if self._loop is not None:
            self._loop.fire(Event.EXCEPTION)

    def _stop_counting(self) -> bool:
        hooks, self._hooks = self._hooks, None
        return hooks is not None and hooks.remove()

    # Evaluation

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Swap the average in, if the first dataloader is evaluated with it."""
        del pl_module
        self._evaluation.begin_dataloaders(trainer, self.eval_weights, len(trainer.num_val_batches))

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Change the weights for another dataloader."""
        del trainer, pl_module, batch
        if batch_idx == 0:
            self._evaluation.choose(self.eval_weights, dataloader_idx)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Restore the training weights."""
        del trainer, pl_module
        self._evaluation.end()

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Swap the average in, if the first dataloader is evaluated with it."""
        del pl_module
        self._evaluation.begin_dataloaders(trainer, self.eval_weights, len(trainer.num_test_batches))

    on_test_batch_start = on_validation_batch_start
    on_test_end = on_validation_end

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Swap the average in."""
        del pl_module
        if self.eval_weights != "raw":
            self._evaluation.begin(trainer, Event.PREDICT_START, Event.PREDICT_END)

    on_predict_end = on_validation_end

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return a state that makes Lightning warn if the checkpoint is resumed without this callback."""
        return {"algorithms": [repr(algorithm) for algorithm in self.algorithms]}

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add the state of the algorithms, with the training weights.

        Args:
            trainer: Lightning's.
            pl_module: The model.
            checkpoint: The checkpoint to add to.
        """
        if self._loop is not None:
            swap = swap_of(pl_module)
            holds = f"averaged weights of {swap.owner}" if swap else "training weights"
            # In a folder it has been saved already; a file is written by rank 0.
            state = {} if _saves_folders(trainer) else whole(self._loop.state_dict())
            checkpoint[_KEY] = {**state, "state_dict_holds": holds, "rng": rng.get_state()}

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Resume with the training weights and the state of the algorithms, if the checkpoint is loaded for training.

        Args:
            trainer: Lightning's.
            pl_module: The model, which has the checkpoint's ``state_dict``.
            checkpoint: As loaded.
        """
        del pl_module
        if trainer.state.fn.value != "fit":
            return
        assert self._loop is not None
        if _KEY in checkpoint:
            if "algorithms" in checkpoint[_KEY]:
                self._loop.load_state_dict(checkpoint[_KEY])
            else:
                sharded.load(self._loop, Path(trainer.ckpt_path) / _KEY, weights=True)
            self._random = checkpoint[_KEY]["rng"]
        else:
            warnings.warn(
                f"the checkpoint was saved without this callback: {self.algorithms} and their clocks begin with it",
                PlanWarning,
                stacklevel=2,
            )


def _surround_saving(trainer: Any, loop_now: Callable[[], Loop | None]) -> None:
    """Fire events around each save: Lightning's hooks come too early to swap, and not if ``save_weights_only``."""
    save = trainer.save_checkpoint

    @wraps(save)
    def save_checkpoint(filepath: Any, *args: Any, **kwargs: Any) -> None:
        loop = loop_now()
        if loop is None:
            save(filepath, *args, **kwargs)
            return
        if _saves_folders(trainer):
            filepath = trainer.strategy.broadcast(filepath)
            sharded.save(loop, Path(filepath) / _KEY, weights=True)
        with loop.saving(None if "://" in str(filepath) else filepath):
            save(filepath, *args, **kwargs)

    trainer.save_checkpoint = save_checkpoint


def _optimizer_of(trainer: Any, number: int) -> Any:
    """Return one of the model's optimizers.

    Args:
        trainer: Lightning's.
        number: As given to ``Averaging``.

    Raises:
        ArgumentError: If there is none of that number.
    """
    if number >= len(trainer.optimizers):
        raise ArgumentError(
            f"optimizer must be the number of one of the model's {len(trainer.optimizers)} optimizers (got {number}); "
            "count from 0"
        )
    return trainer.optimizers[number]


def _set_lengths(loop: Loop, trainer: Any, pl_module: Any) -> None:
    """Set the lengths of an epoch and of the run, as far as they are known."""
    batches = trainer.num_training_batches
    # In manual optimization only the model knows when it steps.
    known = pl_module.automatic_optimization and math.isfinite(batches)
    length = math.ceil(batches / trainer.accumulate_grad_batches) if known else None
    loop.state.set_epoch_length(length)
    loop.state.max_duration = _duration(trainer, length)


def _duration(trainer: Any, epoch_length: int | None) -> Time | None:
    """Return the length of a run: the limit that is reached first."""
    epochs, steps = trainer.max_epochs, trainer.max_steps
    if epochs in (None, -1):
        return None if steps == -1 else Time(steps, TimeUnit.BATCH)
    if steps != -1 and epoch_length is not None and steps < epochs * epoch_length:
        return Time(steps, TimeUnit.BATCH)
    return Time(epochs, TimeUnit.EPOCH)


def _saves_folders(trainer: Any) -> bool:
    return getattr(trainer.strategy, "_save_distributed_checkpoint", False)

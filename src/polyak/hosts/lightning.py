"""The host for Lightning: ``Averaging``, a callback for its ``Trainer``, and ``attach`` for Fabric's loops."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

try:
    from lightning.fabric import Fabric, is_wrapped
    from lightning.pytorch import Callback
except ModuleNotFoundError:
    from lightning_fabric import Fabric, is_wrapped
    from pytorch_lightning import Callback

from polyak.algorithm import Algorithm, as_algorithms
from polyak.averaging.swap import swap_of
from polyak.errors import PlanWarning
from polyak.events import Event
from polyak.sharding import whole
from polyak.tensors.slots import unwrap
from polyak.time import Time, TimeUnit
from polyak.training import rng, sharded
from polyak.training.attached import Attached
from polyak.training.loop import Loop
from polyak.training.options import LoopOptions
from polyak.training.sizes import BatchSizes
from polyak.training.state import LoopState
from polyak.training.steps import StepHooks

_KEY = "polyak"
_FOREIGN = {"DeepSpeedStrategy", "FSDPStrategy", "XLAFSDPStrategy"}
_Weights = Literal["averaged", "training"]


def _refuse_foreign(strategy: Any) -> None:
    if foreign := _FOREIGN & {cls.__name__ for cls in type(strategy).__mro__}:
        raise NotImplementedError(
            f"each process must hold a model's parameters as they are for them to be averaged (got {', '.join(foreign)}"
            ", under which it does not); use ModelParallelStrategy with fully_shard, DDP or one device"
        )


class Averaging(Callback):
    """Run ``EMA``, ``Recorder`` or other algorithms in a Lightning ``Trainer``.

    An optimizer step that moved weights is one batch of their clock; half-lives may be in ``ba``, ``ep``, ``dur`` and,
    if they are counted, ``sp`` and ``tok``. Validation, test and prediction run with the average, and the model has its
    training weights before and after. A checkpoint has the average as ``state_dict``, where ``load_from_checkpoint``
    takes it from, and the training weights under ``polyak``, from which ``fit(ckpt_path=...)`` goes on. Where a
    checkpoint is evaluated (``test(ckpt_path=...)``), the model has that checkpoint's average.

    Args:
        algorithms: One or several; of those that lend an average there can be one.
        eval_weights: ``"averaged"``, or ``"training"`` to evaluate and predict with those; or a list of these, one for
            each dataloader that is validated or tested, so that ``["averaged", "training"]`` for the same dataloader
            given twice shows both. It may be changed.
        num_samples: Function of a batch: how many samples it has; needed for times in ``sp``.
        num_tokens: Function of a batch: how many tokens it has; needed for times in ``tok``.
        optimizer: Of several optimizers, which one's steps are counted.

    Raises:
        ValueError: If more than one algorithm lends an average, or ``eval_weights`` is none of its values.
    """

    def __init__(
        self,
        algorithms: Algorithm | Sequence[Algorithm],
        *,
        eval_weights: _Weights | Sequence[_Weights] = "averaged",
        num_samples: Callable[[Any], int] | None = None,
        num_tokens: Callable[[Any], int] | None = None,
        optimizer: int = 0,
    ) -> None:
        super().__init__()
        if not {"averaged", "training"}.issuperset([eval_weights] if isinstance(eval_weights, str) else eval_weights):
            raise ValueError(f"eval_weights must be 'averaged' or 'training', or a list of them (got {eval_weights!r})")
        self.algorithms = as_algorithms(algorithms)
        self.eval_weights = eval_weights
        self._sizes = BatchSizes(num_samples, num_tokens)
        self._optimizer = optimizer
        self._trainer: Any = None
        self._loop: Loop | None = None
        self._hooks: StepHooks | None = None
        self._in_epoch = False
        self._ends: list[Event] = []  # of the evaluation that goes on
        self._random: Mapping[str, Any] | None = None

    # Set-up

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Meet the model; refuse what would average wrong weights.

        Args:
            trainer: Lightning's.
            pl_module: The model.
            stage: What begins.

        Raises:
            NotImplementedError: Under DeepSpeed and the first FSDP.
        """
        _refuse_foreign(trainer.strategy)
        if stage == "fit" and (self._loop is None or unwrap(self._loop.state.model) is not unwrap(pl_module)):
            self._loop = Loop(self.algorithms, LoopState(pl_module), self, counts=self._sizes.units)
            self._loop.meet()
        if trainer is not self._trainer:
            self._trainer = trainer
            self._surround_saving(trainer)

    def _surround_saving(self, trainer: Any) -> None:
        # Lightning's own hooks come too early to lend without a copy, and not at all if `save_weights_only`.
        save = trainer.save_checkpoint

        @wraps(save)
        def save_checkpoint(filepath: Any, *args: Any, **kwargs: Any) -> None:
            if self._loop is None:
                save(filepath, *args, **kwargs)
                return
            if _saves_folders(trainer):
                filepath = trainer.strategy.broadcast(filepath)
                sharded.save(self._loop, Path(filepath) / _KEY, weights=True)
            with self._loop.saving(None if "://" in str(filepath) else filepath):
                save(filepath, *args, **kwargs)

        trainer.save_checkpoint = save_checkpoint

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Hand metrics to the trainer's loggers.

        Args:
            metrics: By name.
            step: Not used: the trainer's own is that of its other metrics.
        """
        del step
        if self._trainer.sanity_checking:
            return  # as Lightning itself
        for logger in self._trainer.loggers:
            logger.log_metrics(dict(metrics), step=self._trainer.global_step)

    # Training

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Meet the model in its wrapper; restore random numbers: Lightning draws from them before it trains."""
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
        self._tell_lengths(trainer, pl_module)
        self._hooks = self._loop.count(trainer.optimizers[self._optimizer], self._after_step)
        self._sizes.take()
        self._loop.fire(Event.FIT_START)

    def _tell_lengths(self, trainer: Any, pl_module: Any) -> None:
        assert self._loop is not None
        state, batches = self._loop.state, trainer.num_training_batches
        # In manual optimization only the model knows when it steps.
        known = pl_module.automatic_optimization and math.isfinite(batches)
        length = math.ceil(batches / trainer.accumulate_grad_batches) if known else None
        self._loop.set_epoch_length(length)
        state.max_duration = None
        if trainer.max_epochs not in (None, -1):
            state.max_duration = Time(trainer.max_epochs, TimeUnit.EPOCH)
        if trainer.max_steps != -1 and (
            state.max_duration is None or (length is not None and trainer.max_steps < trainer.max_epochs * length)
        ):
            state.max_duration = Time(trainer.max_steps, TimeUnit.BATCH)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin an epoch."""
        assert self._loop is not None
        self._tell_lengths(trainer, pl_module)
        self._loop.begin_epoch()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Count what is in a batch."""
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
        """Take back what is lent."""
        del trainer, pl_module, exception
        self._ends = []
        self._stop_counting()
        if self._loop is not None:
            self._loop.fire(Event.EXCEPTION)

    def _stop_counting(self) -> bool:
        hooks, self._hooks = self._hooks, None
        return hooks is not None and hooks.remove()

    # Evaluation

    def _begin(self, trainer: Any, start: Event, end: Event) -> None:
        # Not where a checkpoint is evaluated: the model has its weights.
        if self._loop is not None and (trainer.state.fn.value == "fit" or trainer.ckpt_path is None):
            self._ends = [end]
            self._loop.fire(start)

    def _end(self) -> None:
        while self._ends:
            assert self._loop is not None
            self._loop.fire(self._ends.pop(0))

    def _lend_for(self, dataloader: int) -> None:
        """See to it that the model has the weights with which a dataloader is to be evaluated."""
        choice = self.eval_weights if isinstance(self.eval_weights, str) else self.eval_weights[dataloader]
        if self._loop is None or not self._ends or (choice == "averaged") == (Event.EVAL_END in self._ends):
            return
        if choice == "averaged":
            self._ends.insert(0, Event.EVAL_END)
            self._loop.fire(Event.EVAL_START)
        else:
            self._loop.fire(self._ends.pop(0))

    def _begin_evaluation(self, trainer: Any, dataloaders: int) -> None:
        if not isinstance(self.eval_weights, str) and len(self.eval_weights) != dataloaders:
            raise ValueError(
                f"a list eval_weights must have an entry for each of the {dataloaders} dataloaders (got "
                f"{self.eval_weights!r}); or give it one value for all"
            )
        if trainer.state.fn.value == "fit":
            self._begin(trainer, Event.EVAL_BEFORE_ALL, Event.EVAL_AFTER_ALL)
        else:
            self._begin(trainer, Event.EVAL_STANDALONE_START, Event.EVAL_STANDALONE_END)
        self._lend_for(0)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Lend the average, if the first dataloader is to see it."""
        del pl_module
        self._begin_evaluation(trainer, len(trainer.num_val_batches))

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Change the weights for another dataloader."""
        del trainer, pl_module, batch
        if batch_idx == 0:
            self._lend_for(dataloader_idx)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Take the average back."""
        del trainer, pl_module
        self._end()

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Lend the average, if the first dataloader is to see it."""
        del pl_module
        self._begin_evaluation(trainer, len(trainer.num_test_batches))

    def on_test_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Change the weights for another dataloader."""
        self.on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """Take the average back."""
        self.on_validation_end(trainer, pl_module)

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Lend the average."""
        del pl_module
        if self.eval_weights != "training":
            self._begin(trainer, Event.PREDICT_START, Event.PREDICT_END)

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        """Take the average back."""
        self.on_validation_end(trainer, pl_module)

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return what makes Lightning warn if the checkpoint is resumed without this callback."""
        return {"algorithms": [repr(algorithm) for algorithm in self.algorithms]}

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add the state of the algorithms, with the training weights.

        Args:
            trainer: Lightning's.
            pl_module: The model.
            checkpoint: To be added to.
        """
        if self._loop is not None:
            swap = swap_of(pl_module)
            holds = f"averaged weights of {swap.holder}" if swap else "training weights"
            # Of a folder it has been saved already, and of a file the first process writes all.
            state = {} if _saves_folders(trainer) else whole(self._loop.state_dict())
            checkpoint[_KEY] = {**state, "state_dict_holds": holds, "rng": rng.get_state()}

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Go on with the training weights and the state of the algorithms, if the checkpoint is to be trained on.

        Args:
            trainer: Lightning's.
            pl_module: The model, which has the checkpoint's ``state_dict``.
            checkpoint: What was loaded.
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


def _saves_folders(trainer: Any) -> bool:
    return getattr(trainer.strategy, "_save_distributed_checkpoint", False)


class _FabricLogger:
    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._fabric.log_dict(metrics, step=step)


def attach(
    algorithms: Algorithm | Sequence[Algorithm],
    fabric: Fabric,
    model: nn.Module,
    optimizer: Optimizer | None,
    *,
    max_duration: Time | str | None = None,
    steps_per_epoch: int | None = None,
    samples_per_step: int = 0,
    tokens_per_step: int = 0,
) -> Attached:
    """Let algorithms follow a loop in Fabric; they log through its loggers.

    What this returns goes into what ``fabric.save`` saves, after the model. Evaluate under its ``applied()``, and save
    there what is for use.

    Args:
        algorithms: ``EMA``, ``Recorder`` or others, one or several.
        fabric: What set up the model.
        model: As ``fabric.setup`` returned it, or, on one device, as it was before.
        optimizer: As ``fabric.setup`` returned it, or as it was before; of several, the one that steps last in a batch.
            None if you call ``step`` of what this returns, once after each batch.
        max_duration: How long the loop will go on, for times in ``dur`` and for warnings about the plan.
        steps_per_epoch: Optimizer steps in an epoch, for times in ``ep``.
        samples_per_step: Samples in a step, of all processes, for times in ``sp``.
        tokens_per_step: Tokens in a step, of all processes, for times in ``tok``.

    Raises:
        NotImplementedError: Under DeepSpeed, FSDP and ``ModelParallelStrategy``.
        TimeError: If ``max_duration`` is no time.
        ValueError: If more than one of the algorithms lends an average.
    """
    _refuse_foreign(fabric.strategy)
    if type(fabric.strategy).__name__ == "ModelParallelStrategy":
        raise NotImplementedError(
            "Fabric saves from one process all that is no model or optimizer, and under ModelParallelStrategy each has "
            "a part of the average; use polyak.attach and torch.distributed.checkpoint, or DDP, or one device"
        )
    # Not its public `module`, which is inside of DDP.
    inner: Any = model._forward_module if is_wrapped(model) else model  # noqa: SLF001
    options = LoopOptions(
        max_duration=max_duration,
        steps_per_epoch=steps_per_epoch,
        samples_per_step=samples_per_step,
        tokens_per_step=tokens_per_step,
        logger=_FabricLogger(fabric),
    )
    return Attached(algorithms, inner, optimizer, options)

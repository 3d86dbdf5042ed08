"""One batch: forward and backward passes of its microbatches, then the optimizer step."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from polyak.events import Event
from polyak.trainer import batches
from polyak.trainer.epochs import Epochs
from polyak.trainer.forward import Forward, total_of
from polyak.trainer.metrics import Metrics
from polyak.trainer.parallel import Group
from polyak.trainer.state import TrainerState

_MOST_SKIPPED = 100


class Step:
    """Trains on one batch at a time, with Composer's events in between.

    Args:
        state: Its ``batch`` is trained on; ``outputs`` and ``loss`` are set.
        forward: Runs the model.
        group: Who trains together.
        fire: Called with each event.
        metrics: Of training.
        precision: As for ``Trainer``.
        grad_accum: In how many microbatches a batch is run.
        epochs: Knows whether each rank draws batches of its own.
        num_samples: Returns how many samples a batch has.
        schedule_batches: Whether schedulers step with batches.

    Attributes:
        scaler: Of gradients; does nothing unless the precision is ``amp_fp16``.
        skipped_in_a_row: How many of the last steps mixed precision has skipped.
    """

    def __init__(
        self,
        state: TrainerState,
        forward: Forward,
        group: Group,
        fire: Callable[[Event], None],
        *,
        metrics: Metrics,
        precision: str,
        grad_accum: int,
        epochs: Epochs,
        num_samples: Callable[[Any], int],
        schedule_batches: bool,
    ) -> None:
        self._state = state
        self._forward = forward
        self._group = group
        self._fire = fire
        self._metrics = metrics
        self._grad_accum = grad_accum
        self._epochs = epochs
        self._count_samples = num_samples
        self._schedule_batches = schedule_batches
        self.scaler = torch.amp.GradScaler(group.device.type, enabled=precision == "amp_fp16")
        self.skipped_in_a_row = 0

    def compute_gradients(self) -> None:
        """Run the state's batch forward and backward; its gradients are complete and unscaled afterwards."""
        state = self._state
        whole = state.batch
        where = {} if self._epochs.own_batches else {"rank": self._group.rank, "size": self._group.size}
        parts = batches.shares(whole, self._grad_accum, self._count_samples, **where)
        self._fire(Event.BEFORE_TRAIN_BATCH)
        for optimizer in state.optimizers:
            optimizer.zero_grad()
        self._metrics.reset()
        total: Tensor | None = None
        for i, (part, factor) in enumerate(parts):
            with self._gradients_kept_here(i + 1 < len(parts)):
                loss = self._run(part, factor)
            total = loss if total is None else total + loss
        assert total is not None
        state.batch, state.loss = whole, self._group.ranks.mean(total)
        if self.scaler.is_enabled():
            for optimizer in state.optimizers:
                self.scaler.unscale_(optimizer)
        self._fire(Event.AFTER_TRAIN_BATCH)

    def _run(self, part: Any, factor: float) -> Tensor:
        """Run a microbatch forward and backward; return its share of the loss."""
        state, fire = self._state, self._fire
        state.batch = batches.to_device(part, self._group.device)
        fire(Event.BEFORE_FORWARD)
        state.outputs = self._forward.outputs(state.batch)
        fire(Event.AFTER_FORWARD)
        fire(Event.BEFORE_LOSS)
        state.loss = self._forward.loss(state.outputs, state.batch)
        fire(Event.AFTER_LOSS)
        fire(Event.BEFORE_BACKWARD)
        loss = total_of(state.loss)
        if factor != 1:
            loss = loss * factor
        self.scaler.scale(loss).backward()
        fire(Event.AFTER_BACKWARD)
        if self._metrics:
            with torch.no_grad():
                outputs = self._forward.metric_outputs(state.batch, state.outputs)
                self._metrics.update(self._forward.inner, state.batch, outputs, counts=factor != 0)
        return loss.detach()

    def move(self) -> bool:
        """Make the optimizer step; return whether the weights were moved.

        Raises:
            RuntimeError: If the gradients of a hundred batches in a row had NaN or inf.
        """
        scale = self.scaler.get_scale()
        for optimizer in self._state.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        stepped = self.scaler.get_scale() >= scale
        self.skipped_in_a_row = 0 if stepped else self.skipped_in_a_row + 1
        if self.skipped_in_a_row == _MOST_SKIPPED:
            raise RuntimeError(
                f"gradients must be finite, and those of the last {_MOST_SKIPPED} batches were not: no step was made; "
                "look at the loss, or use precision='amp_bf16'"
            )
        if stepped and self._schedule_batches:
            self.step_schedulers()
        return stepped

    def end_epoch(self) -> None:
        """Let schedulers that step with epochs do so."""
        if not self._schedule_batches:
            self.step_schedulers()

    def step_schedulers(self) -> None:
        """Let all schedulers step."""
        for scheduler in self._state.schedulers:
            scheduler.step()

    def abandon(self) -> None:
        """Forget gradients and scales of a batch that was left by an exception."""
        for optimizer in self._state.optimizers:
            optimizer.zero_grad()
        if self.scaler.is_enabled() and self.scaler._scale is not None:  # noqa: SLF001
            self.scaler.update(self.scaler.get_scale())  # forgets which optimizers' gradients it has unscaled

    def _gradients_kept_here(self, kept: bool) -> AbstractContextManager[object]:
        """Return a context in which no gradients are sent to other ranks, if they are to be kept."""
        model = self._state.model
        return model.no_sync() if kept and isinstance(model, DistributedDataParallel) else nullcontext()

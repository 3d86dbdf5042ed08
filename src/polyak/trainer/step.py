"""``Step``: the forward and backward passes of a batch, and the optimizer step."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from polyak.events import Event
from polyak.trainer import batches
from polyak.trainer.context import Context
from polyak.trainer.epochs import Epochs
from polyak.trainer.forward import total_of
from polyak.trainer.metrics import Metrics
from polyak.trainer.options import Checked

_MOST_SKIPPED = 100


class Step:
    """Trains on one batch at a time, with Composer's events in between.

    Args:
        context: The context of the trainer. The state's ``batch`` is trained on; its ``outputs`` and ``loss`` are set.
        epochs: Where the batches come from.
        checked: The arguments of the trainer.

    Attributes:
        metrics: The training metrics.
        scaler: The scaler of gradients; it does nothing unless the precision is ``amp_fp16``.
        skipped_in_a_row: How many steps mixed precision has skipped since the last step that it has not.
        schedules: Whether schedulers step; they rest while an average is polished.
    """

    def __init__(self, context: Context, epochs: Epochs, checked: Checked) -> None:
        given = checked.given
        self._state = context.state
        self._forward = context.forward
        self._group = context.group
        self._fire = context.loop.fire
        self._epochs = epochs
        self._grad_accum = given.grad_accum
        self._num_samples = given.num_samples
        self._schedule_batches = given.step_schedulers_every_batch
        self.metrics = Metrics(checked.train_metrics, context.group)
        self.scaler = torch.amp.GradScaler(context.group.device.type, enabled=given.precision == "amp_fp16")
        self.skipped_in_a_row = 0
        self.schedules = True

    def compute_gradients(self) -> None:
        """Compute the gradients of the state's batch, complete and unscaled."""
        state = self._state
        full = state.batch
        where = {} if self._epochs.own_batches else {"rank": self._group.rank, "size": self._group.size}
        parts = batches.shares(full, self._grad_accum, self._num_samples, **where)
        self._fire(Event.BEFORE_TRAIN_BATCH)
        for optimizer in state.optimizers:
            optimizer.zero_grad()
        self.metrics.reset()
        total: Tensor | None = None
        for i, (part, factor) in enumerate(parts):
            with self._without_sync(i + 1 < len(parts)):
                loss = self._run(part, factor)
            total = loss if total is None else total + loss
        assert total is not None
        state.batch, state.loss = full, self._group.ranks.mean(total)
        if self.scaler.is_enabled():
            for optimizer in state.optimizers:
                self.scaler.unscale_(optimizer)
        self._fire(Event.AFTER_TRAIN_BATCH)

    def _run(self, part: Any, factor: float) -> Tensor:
        """Add the gradients of a microbatch; return its share of the loss."""
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
        if self.metrics:
            with torch.no_grad():
                outputs = self._forward.metric_outputs(state.batch, state.outputs)
                self.metrics.update(self._forward.inner, state.batch, outputs, counts=factor != 0)
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
                f"gradients must be finite (got NaN or inf in the last {_MOST_SKIPPED} batches, which made no step); "
                "check the loss, or use precision='amp_bf16'"
            )
        if stepped and self._schedule_batches:
            self.step_schedulers()
        return stepped

    def end_epoch(self) -> None:
        """Step the schedulers that step with epochs."""
        if not self._schedule_batches:
            self.step_schedulers()

    def step_schedulers(self) -> None:
        """Step all schedulers."""
        for scheduler in self._state.schedulers if self.schedules else ():
            scheduler.step()

    def abandon(self) -> None:
        """Discard the gradients and scales of a batch that an exception has left."""
        for optimizer in self._state.optimizers:
            optimizer.zero_grad()
        if self.scaler.is_enabled() and self.scaler._scale is not None:  # noqa: SLF001
            self.scaler.update(self.scaler.get_scale())  # clears its list of optimizers with unscaled gradients

    def _without_sync(self, without: bool) -> AbstractContextManager[object]:
        """Return a context in which DDP sends no gradients to other ranks, if asked for."""
        model = self._state.model
        return model.no_sync() if without and isinstance(model, DistributedDataParallel) else nullcontext()

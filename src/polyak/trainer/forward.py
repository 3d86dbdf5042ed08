"""``Forward``: computes outputs and loss of a model for a batch, with a loss function or methods of the model."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from polyak.errors import ArgumentError
from polyak.tensors.slots import unwrap
from polyak.trainer.state import TrainerState

PRECISIONS: Mapping[str, torch.dtype | None] = {"fp32": None, "amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}


class Forward:
    """Runs the model of a trainer's state on batches.

    Args:
        state: The state of the trainer, which has the model.
        loss: Function of outputs and targets for a plain module; None for a model with its own.
        precision: One of ``PRECISIONS``.
        device: Where the model is.
    """

    def __init__(
        self, state: TrainerState, loss: Callable[[Any, Any], Tensor] | None, precision: str, device: torch.device
    ) -> None:
        self._state = state
        self._loss = loss
        self._autocast_to = PRECISIONS[precision]
        self._device = device
        own_eval = getattr(self.inner, "eval_forward", None)
        self._reuses_outputs = own_eval is not None and len(inspect.signature(own_eval).parameters) > 1

    @property
    def inner(self) -> Any:
        """The model without wrappers."""
        return unwrap(self._state.model)

    def autocast(self) -> AbstractContextManager[object]:
        """Return the autocast context of the precision."""
        return torch.autocast(self._device.type, dtype=self._autocast_to) if self._autocast_to else nullcontext()

    def outputs(self, batch: Any) -> Any:
        """Return the outputs for a batch.

        Args:
            batch: The batch, on the device.
        """
        model: nn.Module = self._state.model
        with self.autocast():
            return model(_pair(batch)[0]) if self._loss is not None else model(batch)

    def loss(self, outputs: Any, batch: Any) -> Any:
        """Return the loss, or several in a mapping or a sequence.

        Args:
            outputs: The outputs for the batch.
            batch: The batch, on the device.
        """
        with self.autocast():
            if self._loss is not None:
                return self._loss(outputs, _pair(batch)[1])
            return self.inner.loss(outputs, batch)

    def eval_outputs(self, batch: Any) -> Any:
        """Return the outputs for a batch of an evaluation.

        Args:
            batch: The batch, on the device.
        """
        if self._loss is None and hasattr(self.inner, "eval_forward"):
            with self.autocast():
                return self.inner.eval_forward(batch)
        return self.outputs(batch)

    def metric_outputs(self, batch: Any, outputs: Any) -> Any:
        """Return the outputs that training metrics are updated with.

        Args:
            batch: The batch, on the device.
            outputs: The outputs of the forward pass in training.
        """
        if self._loss is None and self._reuses_outputs:
            with self.autocast():
                return self.inner.eval_forward(batch, outputs)
        return outputs

    def predict(self, batch: Any) -> Any:
        """Return the outputs for a batch that may have no targets.

        Args:
            batch: The batch, on the device; a plain module gets the first of a pair, its inputs.
        """
        paired = self._loss is not None and isinstance(batch, (tuple, list))
        with self.autocast():
            return self._state.model(batch[0] if paired else batch)


def total_of(loss: Any) -> Tensor:
    """Return the loss to minimize: of several, the one named ``"total"``, otherwise their sum.

    Args:
        loss: A tensor of one element, or several in a mapping or a sequence.

    Raises:
        ArgumentError: If it is something else.
    """
    if isinstance(loss, Mapping):
        loss = loss["total"] if "total" in loss else list(loss.values())
    if isinstance(loss, Sequence) and loss and all(isinstance(part, Tensor) for part in loss):
        loss = torch.stack([part.mean() for part in loss]).sum()
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ArgumentError(f"the loss must be a tensor of one element (got {got}); take its mean")
    return loss


def _pair(batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        got = f"{len(batch)} entries" if isinstance(batch, (tuple, list, Mapping)) else "no pair"
        raise ArgumentError(
            f"batches for a plain module must be pairs (inputs, targets) (got a {type(batch).__name__} with {got}); "
            "give the model a method loss(outputs, batch) for other batches"
        )
    return batch[0], batch[1]

"""Gradient clipping, by torch's functions, between the backward pass and the optimizer step."""

from typing import Literal

from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from polyak.algorithm import Algorithm, MetricLogger
from polyak.errors import ArgumentError
from polyak.events import Event, State


class GradientClipping(Algorithm):
    """Clip the gradients of each batch, unscaled and summed over its microbatches, before the optimizer step.

    Args:
        clipping_type: ``"norm"`` scales all gradients so that their norm together is at most the threshold;
            ``"value"`` clamps each element.
        clipping_threshold: Above 0.

    Raises:
        ArgumentError: If an argument is not one of these.

    Example:
        >>> GradientClipping("norm", 1.0)
        GradientClipping(clipping_type='norm', clipping_threshold=1.0)

    References:
        ``composer.algorithms.GradientClipping``.
    """

    def __init__(self, clipping_type: Literal["norm", "value"], clipping_threshold: float) -> None:
        if clipping_type not in ("norm", "value"):
            raise ArgumentError(f"clipping_type must be 'norm' or 'value' (got {clipping_type!r}); choose one of them")
        if isinstance(clipping_threshold, str) or not clipping_threshold > 0:
            raise ArgumentError(f"clipping_threshold must be a number above 0 (got {clipping_threshold!r})")
        self.clipping_type = clipping_type
        self.clipping_threshold = clipping_threshold

    def __repr__(self) -> str:
        return f"GradientClipping(clipping_type={self.clipping_type!r}, clipping_threshold={self.clipping_threshold!r})"

    def match(self, event: Event, state: State) -> bool:
        """Return whether the gradients of a batch are complete."""
        return event is Event.AFTER_TRAIN_BATCH

    def apply(self, event: Event, state: State, logger: MetricLogger) -> None:
        """Clip the gradients."""
        clip = clip_grad_norm_ if self.clipping_type == "norm" else clip_grad_value_
        clip(state.model.parameters(), self.clipping_threshold)

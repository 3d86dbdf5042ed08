"""Validates the average with torchtitan's validator, and the training weights before it if both are asked for."""

import logging
from collections.abc import Callable
from typing import Any

from torch import nn

from polyak.training.evalweights import refuse_raw_of_averaged


def validation(applied: Callable[..., Any], model: nn.Module, validator: Any, *, both: bool) -> Callable[..., Any]:
    """Return what runs instead of the validator's ``validate``.

    Args:
        applied: Returns a context in which the model has the average.
        model: The model in training.
        validator: The trainer's validator.
        both: Whether to validate with the training weights too.
    """

    def validate(inner: Any, model_parts: Any, step: int) -> None:
        if both:
            refuse_raw_of_averaged(model)
            metrics = validator.metrics_processor
            validator.metrics_processor = _Raw(metrics)
            try:
                inner(model_parts, step)
            finally:
                validator.metrics_processor = metrics
        with applied():
            inner(model_parts, step)

    return validate


class _Raw:
    """Logs validation with ``raw_`` before the names, and ``raw`` on the console, where torchtitan logs the loss."""

    def __init__(self, metrics: Any) -> None:
        object.__setattr__(self, "_metrics", metrics)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._metrics, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._metrics, name, value)

    def log_validation(self, loss: float, step: int, extra_metrics: dict[str, Any] | None = None) -> None:
        names = {f"raw_{name}": value for name, value in (extra_metrics or {}).items()}
        self._metrics.logger.log({"raw_validation_metrics/loss": loss, **names}, step)
        logging.getLogger().info(f"validate step: {step:2}  raw loss: {loss:7.4f}")

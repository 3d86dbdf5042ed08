"""Checks what a custom evaluation returns: a number, the values of single examples, or either of them by name."""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from torch import Tensor

from polyak.sweeping.direction import UNNAMED
from polyak.sweeping.results import EvaluationError

Value = float | Tensor | Sequence[float]
Evaluate = Callable[[dict[str, Tensor]], Value | Mapping[str, Value]]

_Measured = tuple[dict[str, float], dict[str, tuple[float, ...]]]


def measured(returned: Any, name: str) -> _Measured:
    """Return the metrics of an evaluation, and the values of single examples for those that have them.

    Args:
        returned: What the custom function returned.
        name: The name of the weights, for errors.

    Raises:
        EvaluationError: If it is of another type.

    Example:
        >>> measured({"loss": [1.0, 2.0]}, "raw")
        ({'loss': 1.5}, {'loss': (1.0, 2.0)})
    """
    metrics, examples = dict[str, float](), dict[str, tuple[float, ...]]()
    for metric, value in (returned if isinstance(returned, Mapping) else {UNNAMED: returned}).items():
        values = _values(value)
        if values is None:
            raise EvaluationError(_wrong(value, name, metric=None if metric == UNNAMED else str(metric)))
        mean = fmean(values)
        # An infinite loss is treated as NaN: it is never the best, whether lower or higher is better.
        metrics[str(metric)] = mean if math.isfinite(mean) else math.nan
        if math.isfinite(mean) and len(values) > 1:
            examples[str(metric)] = values
    if not metrics:
        raise EvaluationError(_wrong(returned, name, metric=None))
    return metrics, examples


def _values(value: Any) -> tuple[float, ...] | None:
    """Return a number as one value, and a list, array or tensor as its values; None if it is neither."""
    dimensions = getattr(value, "ndim", None)
    try:
        if dimensions == 1:
            value = value.tolist()
        if isinstance(value, Sequence) and not isinstance(value, str | bytes):
            return tuple(map(float, value)) or None
        return None if isinstance(value, str | bytes) else (float(value),)
    except (TypeError, ValueError, RuntimeError):
        return None


def _wrong(value: Any, name: str, *, metric: str | None) -> str:
    kind = "nothing" if value is None else "an empty dict" if value == {} else f"a {type(value).__name__}"
    if isinstance(value, Tensor):
        kind = f"a tensor of shape {' x '.join(map(str, value.shape))}"
    of = "" if metric is None else f" as {metric}"
    return (
        "an evaluation must return a number, or a dict of numbers by name; for an interval, the losses of single "
        f"examples in a list or a tensor of one dimension (got {kind}{of} for {name}); change the function"
    )

"""Metrics: torchmetrics, or whatever has their three methods, over one process or several."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from polyak.errors import ArgumentError
from polyak.trainer import batches
from polyak.trainer.parallel import Group


class Metric(Protocol):
    """The members of a metric that are used: those of torchmetrics."""

    @property
    def update(self) -> Callable[..., object]: ...
    @property
    def compute(self) -> Callable[[], Any]: ...
    @property
    def reset(self) -> Callable[[], object]: ...


class Metrics:
    """Several metrics, updated together.

    Metrics of torchmetrics combine the states of all ranks themselves. Other metrics are updated on every rank with the
    outputs of all ranks.

    Args:
        metrics: The metrics, by name.
        group: The processes that train together.
    """

    def __init__(self, metrics: Mapping[str, Metric], group: Group) -> None:
        self._metrics = dict(metrics.items())
        self._group = group

    def __bool__(self) -> bool:
        return bool(self._metrics)

    def of_names(self, patterns: Sequence[str] | None) -> "Metrics":
        """Return the metrics whose names match one of the regular expressions; all metrics for None.

        Args:
            patterns: Searched for in the names, in any case.

        Raises:
            ArgumentError: If one of them matches no name.
        """
        if patterns is None:
            return self
        for pattern in patterns:
            if not any(re.search(pattern, name, re.IGNORECASE) for name in self._metrics):
                raise ArgumentError(
                    f"metric_names must match metrics of the trainer or the model (got {pattern!r}); there are "
                    f"{', '.join(self._metrics) or 'none'}"
                )
        named = {
            name: metric
            for name, metric in self._metrics.items()
            if any(re.search(pattern, name, re.IGNORECASE) for pattern in patterns)
        }
        return Metrics(named, self._group)

    def reset(self) -> None:
        """Discard the states of all metrics."""
        for metric in self._metrics.values():
            if isinstance(metric, nn.Module):
                metric.to(self._group.device)
            metric.reset()

    def update(self, model: nn.Module, batch: Any, outputs: Any, *, counts: bool = True) -> None:
        """Update all metrics with the outputs for a batch. A collective: all ranks must call it.

        Args:
            model: Unwrapped; its ``update_metric(batch, outputs, metric)`` is used if it has one.
            batch: The batch, on the device.
            outputs: The outputs for the batch.
            counts: Whether the batch is part of this rank's data, not one that it runs because other ranks have more.
        """
        gathered = list[Metric]()
        for metric in self._metrics.values():
            if self._group.size > 1 and not _combines_itself(metric):
                gathered.append(metric)
            elif counts:
                _update(metric, model, batch, outputs)
        if not gathered:
            return
        # A tensor sent from a GPU would arrive on the GPU of that number.
        sent = batches.to_device((batch, outputs), torch.device("cpu")) if counts else None
        for seen in self._group.ranks.gather(sent):
            if seen is not None:
                for metric in gathered:
                    _update(metric, model, *batches.to_device(seen, self._group.device))

    def compute(self) -> dict[str, float]:
        """Return the figures by name; of a metric with several figures, each as ``metric/figure``.

        Raises:
            ArgumentError: If a metric computes something else than numbers.
        """
        found: dict[str, float] = {}
        for name, metric in self._metrics.items():
            value = metric.compute()
            values = (
                {f"{name}/{key}": one for key, one in value.items()} if isinstance(value, Mapping) else {name: value}
            )
            found |= {key: _number(key, one) for key, one in values.items()}
        return found


def _number(name: str, value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ArgumentError(
            f"the metric {name} must compute one number (got a tensor of shape {tuple(value.shape)}); choose an "
            "average over classes"
        )
    return float(value)


def _combines_itself(metric: Metric) -> bool:
    """Return whether a metric combines the states of all ranks itself, as those of torchmetrics do."""
    return all(callable(getattr(metric, name, None)) for name in ("sync", "unsync"))


def _update(metric: Metric, model: nn.Module, batch: Any, outputs: Any) -> None:
    own = getattr(model, "update_metric", None)
    if own is not None:
        own(batch, outputs, metric)
    else:
        metric.update(outputs, batch[1])

"""Metrics of a model over a data loader."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from polyak.select import unwrap
from polyak.trainer import batches, rng


class Metric(Protocol):
    """The members of a metric that are used: those of torchmetrics."""

    @property
    def update(self) -> Callable[..., object]: ...
    @property
    def compute(self) -> Callable[[], Any]: ...
    @property
    def reset(self) -> Callable[[], object]: ...


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode, and each of its modules back in its own afterwards.

    Args:
        model: Any.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class Evaluator:
    """Runs a model over a data loader and sums up.

    Args:
        metrics: By name.
        device: Where batches and metrics go.
        count: Returns how many samples a batch has, by which its loss weighs in.
    """

    def __init__(self, metrics: Mapping[str, Metric], device: torch.device, count: Callable[[Any], int]) -> None:
        self._metrics = metrics
        self._device = device
        self._count = count

    @torch.no_grad()
    def run(
        self, model: nn.Module, loader: Iterable[Any], step: Callable[[Any], tuple[Any, Tensor]]
    ) -> dict[str, float]:
        """Return the mean loss as ``loss``, and each metric by name.

        Evaluation does not change what training draws from its random number generators: how often one looks is no
        part of the experiment.

        Args:
            model: To be run in eval mode.
            loader: Batches.
            step: Returns the outputs and the loss of a batch.

        Raises:
            ValueError: If there are no batches.
        """
        total, samples = 0.0, 0
        for metric in self._metrics.values():
            if isinstance(metric, nn.Module):
                metric.to(self._device)
            metric.reset()
        with rng.preserved(rng.generators_of(loader)), eval_mode(model):
            for batch in loader:
                moved = batches.to_device(batch, self._device)
                outputs, loss = step(moved)
                total += float(loss) * self._count(moved)
                samples += self._count(moved)
                for metric in self._metrics.values():
                    _update(metric, unwrap(model), moved, outputs)
        if samples == 0:
            raise ValueError("an evaluation needs at least one batch (the data loader gave none)")
        return {"loss": total / samples} | {name: float(metric.compute()) for name, metric in self._metrics.items()}


def _update(metric: Metric, model: nn.Module, batch: Any, outputs: Any) -> None:
    own = getattr(model, "update_metric", None)
    if own is not None:
        own(batch, outputs, metric)
    else:
        metric.update(outputs, batch[1])

"""Metrics of a model over a data loader."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from polyak.select import unwrap
from polyak.trainer import batches, rng
from polyak.trainer.parallel import Group, divides_itself


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

    Of several ranks each runs its part of every batch, and all get the figures of the whole. Sums of losses are added.
    Metrics of torchmetrics put together what each rank has seen by themselves; all others are given every rank's
    outputs on every rank.

    Args:
        metrics: By name.
        group: Who evaluates together.
        count: Returns how many samples a batch has, by which its loss weighs in.
    """

    def __init__(self, metrics: Mapping[str, Metric], group: Group, count: Callable[[Any], int]) -> None:
        self._metrics = metrics
        self._group = group
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
                metric.to(self._group.device)
            metric.reset()
        with drawing_alike(loader, self._group), eval_mode(model):
            for batch in loader:
                part, counts = self._own_part(batch, loader)
                moved = batches.to_device(part, self._group.device)
                outputs, loss = step(moved)
                if counts:
                    total += float(loss) * self._count(moved)
                    samples += self._count(moved)
                self._update_metrics(unwrap(model), moved, outputs, counts=counts)
        total, samples = self._group.totals(total, samples)
        if samples == 0:
            raise ValueError("an evaluation needs at least one batch (the data loader gave none)")
        found = {name: float(metric.compute()) for name, metric in self._metrics.items()}
        # What follows from the figures must follow on all ranks.
        return self._group.first({"loss": total / samples, **found})

    def _own_part(self, batch: Any, loader: Iterable[Any]) -> tuple[Any, bool]:
        """Return what of a batch this rank runs, and whether that counts: all meet in each forward pass."""
        if self._group.size == 1 or divides_itself(loader):
            return batch, True
        parts = batches.split(batch, self._group.size)
        return (parts[self._group.rank], True) if self._group.rank < len(parts) else (parts[0], False)

    def _update_metrics(self, model: nn.Module, batch: Any, outputs: Any, *, counts: bool) -> None:
        gathered = list[Metric]()
        for metric in self._metrics.values():
            if self._group.size > 1 and not _sums_up_itself(metric):
                gathered.append(metric)
            elif counts:
                _update(metric, model, batch, outputs)
        if not gathered:
            return
        # What is sent from one GPU would arrive on that GPU.
        sent = batches.to_device((batch, outputs), torch.device("cpu")) if counts else None
        for seen in self._group.each(sent):
            if seen is not None:
                for metric in gathered:
                    _update(metric, model, *batches.to_device(seen, self._group.device))


@contextmanager
def drawing_alike(loader: object, group: Group) -> Iterator[None]:
    """Let all ranks draw the same in the block, and what is drawn in it not change what is drawn after it.

    Args:
        loader: That may draw, from the global generators or its own.
        group: The ranks.
    """
    generators = rng.generators_of(loader)
    with rng.preserved(generators):
        if group.size > 1:
            rng.set_state(group.first(rng.get_state(generators, gpu=False)), generators)
        yield


def _sums_up_itself(metric: Metric) -> bool:
    """Return whether a metric gathers over the ranks what it has seen, as those of torchmetrics do."""
    return all(callable(getattr(metric, name, None)) for name in ("sync", "unsync"))


def _update(metric: Metric, model: nn.Module, batch: Any, outputs: Any) -> None:
    own = getattr(model, "update_metric", None)
    if own is not None:
        own(batch, outputs, metric)
    else:
        metric.update(outputs, batch[1])

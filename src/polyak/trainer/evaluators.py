"""``Evaluator``: data to evaluate, with metrics and an interval; and the evaluators of ``eval_dataloader``."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from polyak.errors import ArgumentError
from polyak.events import Event
from polyak.time import Time, TimeUnit
from polyak.trainer.inputs import check_loader, described, require
from polyak.trainer.intervals import Question, question


class Evaluator:
    """Data to evaluate, with a label, metrics and an interval.

    Args:
        label: The prefix of the names of its metrics: ``label/accuracy``.
        dataloader: Batches.
        metric_names: Regular expressions; only metrics whose names match one are computed. None computes all.
        subset_num_batches: The largest number of batches to evaluate; None and -1 evaluate all.
        eval_interval: As for ``Trainer``; None for the trainer's.

    Raises:
        ArgumentError: If an argument is not what it must be.
        TimeError: If ``eval_interval`` is not a time.

    Example:
        >>> data = [(torch.zeros(2, 4), torch.zeros(2, dtype=torch.long))]
        >>> Evaluator(label="validation", dataloader=data, metric_names=["accuracy"], eval_interval="2ep").label
        'validation'

    References:
        ``composer.Evaluator``.
    """

    def __init__(
        self,
        *,
        label: str,
        dataloader: Iterable[Any],
        metric_names: Sequence[str] | None = None,
        subset_num_batches: int | None = None,
        eval_interval: "str | Time | int | Question | None" = None,
    ) -> None:
        if not isinstance(label, str) or not label:
            raise ArgumentError(f"the label of an evaluator must be a string, and not empty (got {described(label)})")
        if isinstance(metric_names, str) or not all(isinstance(name, str) for name in metric_names or ()):
            raise ArgumentError(f"metric_names must be a list of strings (got {metric_names!r})")
        if subset_num_batches is not None and (type(subset_num_batches) is not int or subset_num_batches < -1):
            raise ArgumentError(f"subset_num_batches must be a whole number or None (got {subset_num_batches!r})")
        self.label = label
        self.dataloader = check_loader(f"the dataloader of {label}", dataloader)
        self.metric_names = metric_names
        self.subset_num_batches = None if subset_num_batches == -1 else subset_num_batches
        self.eval_interval = eval_interval
        self.due = None if eval_interval is None else evaluation_question(eval_interval)

    def __repr__(self) -> str:
        return f"Evaluator(label={self.label!r})"

    def batches(self) -> Iterator[Any]:
        """Yield the batches to evaluate."""
        for i, batch in enumerate(self.dataloader):
            if self.subset_num_batches is not None and i >= self.subset_num_batches:
                return
            yield batch


def evaluators_of(given: Any) -> list[Evaluator]:
    """Return ``eval_dataloader`` as evaluators.

    Args:
        given: A loader, several by label, an evaluator or several, or None.

    Raises:
        ArgumentError: If it is not one of these, or two have the same label.
    """
    if given is None:
        return []
    if isinstance(given, Evaluator):
        return [given]
    if isinstance(given, Mapping):
        return [
            one if isinstance(one, Evaluator) else Evaluator(label=label, dataloader=one)
            for label, one in given.items()
        ]
    if isinstance(given, (list, tuple)) and any(isinstance(one, Evaluator) or _is_loader(one) for one in given):
        if len(given) == 1:
            return evaluators_of(given[0])
        unlabelled = [described(one) for one in given if not isinstance(one, Evaluator)]
        if unlabelled:
            raise ArgumentError(
                f"several loaders in eval_dataloader must have labels (got {', '.join(unlabelled)} in a list); give a "
                "mapping of labels to loaders, or a list of Evaluator(label=, dataloader=)"
            )
        labels = [one.label for one in given]
        if len(set(labels)) < len(labels):
            raise ArgumentError(f"the labels in eval_dataloader must differ (got {', '.join(map(repr, labels))})")
        return list(given)
    return [Evaluator(label="eval", dataloader=check_loader("eval_dataloader", given))]


def _is_loader(given: Any) -> bool:
    """Return whether an entry of a list is a loader, rather than a batch."""
    if isinstance(given, (torch.Tensor, Mapping, list, tuple, str)) or hasattr(given, "shape"):
        return False
    has_batches = hasattr(given, "__iter__") and (hasattr(given, "dataset") or not hasattr(given, "to"))
    return has_batches or isinstance(given, Dataset)


def evaluation_question(
    interval: "str | Time | int | Question", counted: frozenset[TimeUnit] | None = None
) -> Question:
    """Return a question that is true when an evaluation is due.

    Args:
        interval: A time, epochs as a number, 0 for never, or the question itself.
        counted: The units that are counted; None if that is not known yet.

    Raises:
        TimeError: If it is not one of these.
    """
    if type(interval) is int and interval == 0:
        return lambda state, event: False
    if not isinstance(interval, (str, int, Time)) and callable(interval):
        require(not isinstance(interval, type), "eval_interval", "a time or a function", interval)
        return interval
    due = question("eval_interval", interval, at=(Event.BATCH_END, Event.EPOCH_END), counted=counted)
    return lambda state, event: event is Event.FIT_END or due(state, event)

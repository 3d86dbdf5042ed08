"""Evaluation: of which data, when, and what comes out."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from polyak.errors import ArgumentError
from polyak.events import Event
from polyak.time import Time, TimeUnit
from polyak.trainer import batches
from polyak.trainer.engine import Engine
from polyak.trainer.forward import Forward, total_of
from polyak.trainer.inputs import check_loader, described, require
from polyak.trainer.loggers import Logger
from polyak.trainer.metrics import Metrics
from polyak.trainer.parallel import Group, divides_itself
from polyak.trainer.state import Question, TrainerState, question
from polyak.training import rng


class Evaluator:
    """Data to be evaluated, with a label, metrics and an interval of its own.

    Args:
        label: Stands before the names of its metrics: ``label/accuracy``.
        dataloader: Batches.
        metric_names: Regular expressions; the metrics whose names match one are computed. None stands for all.
        subset_num_batches: How many batches to evaluate at most; None and -1 stand for all.
        eval_interval: As for ``Trainer``, whose own it takes the place of.

    Raises:
        ArgumentError: If an argument is not what it must be.
        TimeError: If ``eval_interval`` is no time.

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
        """Yield the batches to be evaluated."""
        for i, batch in enumerate(self.dataloader):
            if self.subset_num_batches is not None and i >= self.subset_num_batches:
                return
            yield batch


def evaluators_of(given: Any) -> list[Evaluator]:
    """Return the evaluators that ``eval_dataloader`` stands for.

    Args:
        given: A loader, several by label, an evaluator or several, or None.

    Raises:
        ArgumentError: If it is none of these, or a label comes twice.
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
    """Return a question that is true where an evaluation is due.

    Args:
        interval: A time, epochs as a number, 0 for never, or the question itself.
        counted: The units that are counted, if that is known.

    Raises:
        TimeError: If it is none of these.
    """
    if type(interval) is int and interval == 0:
        return lambda state, event: False
    if not isinstance(interval, (str, int, Time)) and callable(interval):
        require(not isinstance(interval, type), "eval_interval", "a time or a function", interval)
        return interval
    due = question("eval_interval", interval, at=(Event.BATCH_END, Event.EPOCH_END), counted=counted)
    return lambda state, event: event is Event.FIT_END or due(state, event)


class Evaluation:
    """Runs evaluators where they are due, and keeps where they last ran.

    Args:
        engine: Fires the events.
        state: Its ``eval_metrics`` are set.
        forward: Runs the model.
        group: Who evaluates together. Each rank runs its part of every batch, and all get the figures of the whole.
        logger: Where the figures go.
        evaluators: Of the trainer.
        metrics: By name, for all evaluators.
        count: Returns how many samples a batch has, by which its loss weighs in.
        due: When to run evaluators that have no interval of their own.
        both: Whether to evaluate the training weights too.

    Attributes:
        evaluated_at: The batch of the last evaluation by label.
    """

    def __init__(
        self,
        engine: Engine,
        state: TrainerState,
        forward: Forward,
        group: Group,
        logger: Logger,
        *,
        evaluators: Sequence[Evaluator],
        metrics: Metrics,
        count: Callable[[Any], int],
        due: Question,
        both: bool,
    ) -> None:
        self._engine = engine
        self._state = state
        self._forward = forward
        self._group = group
        self._logger = logger
        self._metrics = metrics
        self._count = count
        self._due = due
        self._both = both
        self.evaluated_at: dict[str, int] = {}
        self.use(evaluators)

    def use(self, evaluators: Sequence[Evaluator]) -> None:
        """Evaluate other data from now on.

        Args:
            evaluators: Instead of those there are.

        Raises:
            ArgumentError: If one of them names metrics that there are not.
        """
        for evaluator in evaluators:
            self._metrics.of_names(evaluator.metric_names)
        self._state.evaluators = list(evaluators)

    def due_at(self, event: Event) -> list[Evaluator]:
        """Return the evaluators that are due; at the end of training, those that have not run at this batch.

        Args:
            event: ``BATCH_END``, ``EPOCH_END`` or ``FIT_END``.
        """
        now = int(self._state.timestamp.batch)
        return [
            one
            for one in self._state.evaluators
            if (one.due or self._due)(self._state, event)
            and not (event is Event.FIT_END and self.evaluated_at.get(one.label) == now)
        ]

    def run_in_training(self, evaluators: Sequence[Evaluator]) -> None:
        """Run evaluators in the course of training, and note that they have run at this batch.

        Args:
            evaluators: Which.
        """
        self._engine.fire(Event.EVAL_BEFORE_ALL)
        self.run(evaluators)
        self._engine.fire(Event.EVAL_AFTER_ALL)
        self.evaluated_at |= {one.label: int(self._state.timestamp.batch) for one in evaluators}

    def set_evaluated_at(self, saved: Mapping[str, int] | int) -> None:
        """Take over where a run was evaluated last.

        Args:
            saved: By label, or one batch for all, as earlier versions saved it.
        """
        every_label = {one.label: saved for one in self._state.evaluators} if isinstance(saved, int) else saved
        self.evaluated_at = dict(every_label)

    def run(self, evaluators: Sequence[Evaluator]) -> dict[str, float]:
        """Run evaluators now; return the figures by label and name.

        Args:
            evaluators: Which.
        """
        found: dict[str, float] = {}
        self._group.share_buffers(self._state.model)
        for evaluator in evaluators:
            with self._looking_at(evaluator):
                if self._both:
                    found |= self._run_on(evaluator, f"{evaluator.label}_raw", lambda event: None)
                self._engine.fire(Event.EVAL_START)
                found |= self._run_on(evaluator, evaluator.label, self._engine.fire)
                self._state.eval_metrics = dict(found)
                self._engine.fire(Event.EVAL_END)
        self._logger.log_metrics(found)
        return found

    @contextmanager
    def _looking_at(self, evaluator: Evaluator) -> Iterator[None]:
        """Let the state show the evaluator's data for the length of a block."""
        state = self._state
        before = state.dataloader, state.dataloader_label, state.batch, state.outputs
        state.dataloader, state.dataloader_label = evaluator.dataloader, evaluator.label
        try:
            yield
        finally:
            state.dataloader, state.dataloader_label, state.batch, state.outputs = before

    @torch.no_grad()
    def _run_on(self, evaluator: Evaluator, label: str, fire: Callable[[Event], None]) -> dict[str, float]:
        """Return the mean loss as ``loss`` and each metric by name.

        It does not change what training draws from its random number generators: how often one evaluates is no part of
        the experiment.
        """
        metrics = self._metrics.of_names(evaluator.metric_names)
        metrics.reset()
        total, samples, state = 0.0, 0, self._state
        with drawing_alike(evaluator.dataloader, self._group), eval_mode(state.model):
            for batch in evaluator.batches():
                part, counts = self._own_part(batch, evaluator.dataloader)
                state.batch = batches.to_device(part, self._group.device)
                fire(Event.EVAL_BATCH_START)
                fire(Event.EVAL_BEFORE_FORWARD)
                state.outputs = self._forward.eval_outputs(state.batch)
                fire(Event.EVAL_AFTER_FORWARD)
                loss = total_of(self._forward.loss(state.outputs, state.batch))
                if counts:
                    number = self._count(state.batch)
                    total += float(loss) * number
                    samples += number
                metrics.update(self._forward.inner, state.batch, state.outputs, counts=counts)
                fire(Event.EVAL_BATCH_END)
        total, samples = self._group.ranks.totals(total, samples)
        if samples == 0:
            raise ValueError(f"an evaluation needs at least one batch (the data loader of {label!r} gave none)")
        # What follows from the figures must follow on all ranks.
        figures = self._group.ranks.from_rank_0({"loss": total / samples, **metrics.compute()})
        return {f"{label}/{name}": value for name, value in figures.items()}

    def _own_part(self, batch: Any, loader: Iterable[Any]) -> tuple[Any, bool]:
        """Return what of a batch this rank runs, and whether that counts: all meet in each forward pass."""
        if self._group.size == 1 or divides_itself(loader):
            return batch, True
        parts = batches.split(batch, self._group.size)
        return (parts[self._group.rank], True) if self._group.rank < len(parts) else (parts[0], False)


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
            rng.set_state(group.ranks.from_rank_0(rng.get_state(generators, gpu=False)), generators)
        yield

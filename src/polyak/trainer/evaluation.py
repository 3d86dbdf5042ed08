"""``Evaluation``: runs the model in eval mode, on evaluators and for predictions."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from polyak.algorithm import dispatch
from polyak.events import Event
from polyak.trainer import batches
from polyak.trainer.context import Context
from polyak.trainer.evaluators import Evaluator
from polyak.trainer.forward import total_of
from polyak.trainer.metrics import Metrics
from polyak.trainer.options import Checked
from polyak.trainer.parallel import Group
from polyak.trainer.wrapping import divides_itself
from polyak.training import rng
from polyak.training.evalweights import refuse_raw_of_averaged


class Evaluation:
    """Runs the evaluators that are due, and predicts.

    Each rank runs its share of every batch of an evaluator; all ranks get the figures of the full batches.

    Args:
        context: The context of the trainer. The state's ``eval_metrics`` are set.
        checked: The arguments of the trainer.

    Raises:
        ArgumentError: If an evaluator names metrics that do not exist.

    Attributes:
        evaluated_at: The batch of the last evaluation by label.
    """

    def __init__(self, context: Context, checked: Checked) -> None:
        self._state = context.state
        self._loop = context.loop
        self._forward = context.forward
        self._group = context.group
        self._logger = context.logger
        self._metrics = Metrics(checked.eval_metrics, context.group)
        self._num_samples = checked.given.num_samples
        self._due = checked.eval_due
        self._weights = checked.eval_weights
        self.evaluated_at: dict[str, int] = {}
        for evaluator in checked.evaluators:
            self._metrics.of_names(evaluator.metric_names)
        self._state.evaluators = list(checked.evaluators)

    def due_at(self, event: Event) -> list[Evaluator]:
        """Return the evaluators that are due; at the end of training, only those that have not run at this batch.

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
        """Run evaluators during training, and note the batch at which they ran.

        Args:
            evaluators: The evaluators.
        """
        self._loop.fire(Event.EVAL_BEFORE_ALL)
        self.run(evaluators)
        self._loop.fire(Event.EVAL_AFTER_ALL)
        self.evaluated_at |= {one.label: int(self._state.timestamp.batch) for one in evaluators}

    def set_evaluated_at(self, saved: Mapping[str, int] | int) -> None:
        """Resume from the batches of the last evaluations.

        Args:
            saved: By label; or one batch for all, as earlier versions saved it.
        """
        every_label = {one.label: saved for one in self._state.evaluators} if isinstance(saved, int) else saved
        self.evaluated_at = dict(every_label)

    def run(self, evaluators: Sequence[Evaluator]) -> dict[str, float]:
        """Run evaluators now; return the figures by label and name.

        Args:
            evaluators: The evaluators.

        Raises:
            LoanError: If raw weights are to be evaluated while the model holds an average.
        """
        if self._weights == "both":
            refuse_raw_of_averaged(self._state.model)
        found: dict[str, float] = {}
        self._group.share_buffers(self._state.model)
        for evaluator in evaluators:
            with self._shown(evaluator):
                if self._weights == "both":
                    found |= self._run_on(evaluator, f"{evaluator.label}_raw", lambda event: None)
                fire = self._fire_unswapped if self._weights == "raw" else self._loop.fire
                fire(Event.EVAL_START)
                found |= self._run_on(evaluator, evaluator.label, fire)
                self._state.eval_metrics = dict(found)
                fire(Event.EVAL_END)
        self._logger.log_metrics(found)
        return found

    def figures(self, prefix: str) -> dict[str, float]:
        """Return the figures of the weights in the model by all evaluators, without events.

        Args:
            prefix: Before their labels.
        """
        found: dict[str, float] = {}
        self._group.share_buffers(self._state.model)
        for evaluator in self._state.evaluators:
            with self._shown(evaluator):
                found |= self._run_on(evaluator, f"{prefix}/{evaluator.label}", lambda event: None)
        return found

    def _fire_unswapped(self, event: Event) -> None:
        """Fire an event for all algorithms except those that would swap an average in."""
        others = [algorithm for algorithm in self._loop.algorithms if not algorithm.swaps]
        dispatch(event, self._state, others, self._logger)
        self._loop.notify(event)

    @torch.no_grad()
    def predict(self, dataloader: Iterable[Any]) -> list[Any]:
        """Return the outputs for each batch, in eval mode. Each rank runs all batches.

        Args:
            dataloader: Batches as the model takes them; the state's ``batch`` and ``outputs`` are set.
        """
        outputs: list[Any] = []
        fire, state = self._loop.fire, self._state
        with (
            self._loop.between(Event.PREDICT_START, Event.PREDICT_END),
            _same_random_numbers(dataloader, self._group),
            _eval_mode(state.model),
        ):
            for batch in dataloader:
                state.batch = batches.to_device(batch, self._group.device)
                fire(Event.PREDICT_BATCH_START)
                fire(Event.PREDICT_BEFORE_FORWARD)
                state.outputs = self._forward.predict(state.batch)
                fire(Event.PREDICT_AFTER_FORWARD)
                outputs.append(state.outputs)
                fire(Event.PREDICT_BATCH_END)
        return outputs

    @contextmanager
    def _shown(self, evaluator: Evaluator) -> Iterator[None]:
        """Show the evaluator's data in the state for a ``with`` block."""
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

        It does not change the random numbers of the training, whether and how often the model is evaluated.
        """
        metrics = self._metrics.of_names(evaluator.metric_names)
        metrics.reset()
        total, samples, state = 0.0, 0, self._state
        with _same_random_numbers(evaluator.dataloader, self._group), _eval_mode(state.model):
            for batch in evaluator.batches():
                part, counts = self._own_share(batch, evaluator.dataloader)
                state.batch = batches.to_device(part, self._group.device)
                fire(Event.EVAL_BATCH_START)
                fire(Event.EVAL_BEFORE_FORWARD)
                state.outputs = self._forward.eval_outputs(state.batch)
                fire(Event.EVAL_AFTER_FORWARD)
                loss = total_of(self._forward.loss(state.outputs, state.batch))
                if counts:
                    number = self._num_samples(state.batch)
                    total += float(loss) * number
                    samples += number
                metrics.update(self._forward.inner, state.batch, state.outputs, counts=counts)
                fire(Event.EVAL_BATCH_END)
        total, samples = self._group.ranks.totals(total, samples)
        if samples == 0:
            raise ValueError(f"an evaluation must have at least one batch (the data loader of {label!r} gave none)")
        # Decisions based on the metrics must be the same on all ranks.
        figures = self._group.ranks.from_rank_0({"loss": total / samples, **metrics.compute()})
        return {f"{label}/{name}": value for name, value in figures.items()}

    def _own_share(self, batch: Any, loader: Iterable[Any]) -> tuple[Any, bool]:
        """Return this rank's share of a batch, and whether it counts, since all ranks must run each forward pass."""
        if self._group.size == 1 or divides_itself(loader):
            return batch, True
        parts = batches.split(batch, self._group.size)
        return (parts[self._group.rank], True) if self._group.rank < len(parts) else (parts[0], False)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode for a ``with`` block; restore the mode of each of its modules after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _same_random_numbers(loader: object, group: Group) -> Iterator[None]:
    """Let all ranks draw the same random numbers in a ``with`` block, and restore the generators after it."""
    generators = rng.generators_of(loader)
    with rng.preserved(generators):
        if group.size > 1:
            rng.set_state(group.ranks.from_rank_0(rng.get_state(generators, gpu=False)), generators)
        yield

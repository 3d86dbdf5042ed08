"""The host for loops of one's own: it counts the steps of a torch optimizer by its step hooks."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import nn
from torch.optim import Optimizer

from polyak.algorithm import Algorithm, MetricLogger, NoLogger, dispatch
from polyak.errors import LoanError
from polyak.events import Event
from polyak.loop import LoopState, StepHooks
from polyak.select import unwrap
from polyak.shadow import loan_of
from polyak.time import Time, Timestamp, as_span


class Attached:
    """An algorithm at work in a loop of one's own; ``attach`` makes it.

    As a context manager it detaches at the end of the block.

    Args:
        algorithm: As given to ``attach``.
        optimizer: As given to ``attach``.
        state: What the algorithm sees.
        counts: Samples and tokens in a step.
        logger: As given to ``attach``.

    Attributes:
        algorithm: What is at work.
        timestamp: What has been counted.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        optimizer: Optimizer,
        state: LoopState,
        counts: tuple[int, int],
        logger: MetricLogger,
    ) -> None:
        self.algorithm = algorithm
        self._optimizer = optimizer
        self._state = state
        self._samples, self._tokens = counts
        self._logger = logger
        self._fitting = False
        dispatch(Event.INIT, state, [algorithm], logger)
        self._hooks = StepHooks(optimizer, self._after_step, self._before_step)

    @property
    def timestamp(self) -> Timestamp:
        """What has been counted so far."""
        return self._state.timestamp

    def _fire(self, event: Event) -> None:
        dispatch(event, self._state, [self.algorithm], self._logger)

    def _before_step(self) -> None:
        if not self._fitting:
            # Not in `attach`, so that a state can be loaded first.
            self._fitting = True
            self._fire(Event.FIT_START)

    def _after_step(self) -> None:
        self._state.timestamp = self.timestamp.to_next_batch(samples=self._samples, tokens=self._tokens)
        self._fire(Event.BATCH_END)
        if self.timestamp.epoch_length == self.timestamp.batch_in_epoch.value:
            self.end_epoch()

    def end_epoch(self) -> None:
        """Count the end of an epoch. It is called for you if ``steps_per_epoch`` was given."""
        self._state.timestamp = self.timestamp.to_next_epoch()
        self._fire(Event.EPOCH_END)

    @contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """Put the average in the model for the length of a ``with`` block, however that ends.

        Before averaging has begun, the model keeps its own weights.

        Raises:
            LoanError: If the model holds an average already.
        """
        if loan := loan_of(self._state.model):
            raise LoanError(f"a model can hold one average at a time, and {loan.holder} has lent its own already")
        try:
            self._fire(Event.EVAL_START)
            yield unwrap(self._state.model)
        finally:
            self._fire(Event.EVAL_END)

    def state_dict(self, path: str | Path | None = None) -> dict[str, Any]:
        """Return the state of the algorithm and the clock, to be saved beside the model's and the optimizer's.

        Args:
            path: Where it will be saved, if an algorithm is to keep what it refers to as long as that is there.
        """
        self._state.saving_to = None if path is None else Path(path)
        try:
            return {"algorithm": self.algorithm.state_dict(), "timestamp": self.timestamp.state_dict()}
        finally:
            self._state.saving_to = None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned. Load the model's and the optimizer's states before.

        Args:
            state: As saved.

        Raises:
            MismatchError: If names or shapes differ from the model's.
        """
        self.algorithm.load_state_dict(state["algorithm"])
        saved = Timestamp.from_state_dict(state["timestamp"])
        self._state.timestamp = replace(saved, epoch_length=self.timestamp.epoch_length)

    def detach(self) -> None:
        """Stop counting. The algorithm keeps what it has."""
        if self._hooks.remove():
            self._fire(Event.FIT_END)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._fire(Event.EXCEPTION)
        self.detach()


def attach(
    algorithm: Algorithm,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    max_duration: Time | str | None = None,
    steps_per_epoch: int | None = None,
    samples_per_step: int = 0,
    tokens_per_step: int = 0,
    logger: MetricLogger | None = None,
) -> Attached:
    """Let an algorithm follow a training loop of one's own.

    One step of the optimizer is one batch. Steps that mixed precision skips, and steps without gradients, do not
    count. Give the numbers below for the units that your half-life needs; batches need none.

    Args:
        algorithm: ``EMA``, or another.
        model: The model in training. In its ``DistributedDataParallel``, or sharded by ``fully_shard`` or tensor
            parallelism, all ranks must lend the average at the same moments, and are compared then.
        optimizer: The optimizer of its parameters; of several, the one whose steps are to be counted.
        max_duration: How long the loop will go on, for times in ``dur`` and for warnings about the plan.
        steps_per_epoch: Steps in an epoch, for times in ``ep``.
        samples_per_step: Samples in a step, for times in ``sp``.
        tokens_per_step: Tokens in a step, for times in ``tok``.
        logger: Where the algorithm may log.

    Raises:
        TimeError: If ``max_duration`` is no time.

    Example:
        >>> import torch
        >>> from polyak import EMA, attach
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> ema = attach(EMA(half_life="10ba"), model, optimizer)
        >>> for _ in range(20):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(4, 2)).square().mean().backward()
        ...     optimizer.step()
        >>> with ema.applied():
        ...     loss = model(torch.ones(4, 2)).square().mean()
    """
    duration = None if max_duration is None else as_span("max_duration", max_duration, above=0)
    state = LoopState(model, Timestamp(epoch_length=steps_per_epoch), duration)
    return Attached(algorithm, optimizer, state, (samples_per_step, tokens_per_step), logger or NoLogger())

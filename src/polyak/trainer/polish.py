"""``Polish``: the phase at the end of a run that continues from the average, at a low rate that falls to 0."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from polyak.averaging.schedule import convert
from polyak.errors import ArgumentError, CheckpointError
from polyak.polishing import FACTOR
from polyak.time import Time, TimeUnit, as_span
from polyak.trainer.context import Context
from polyak.trainer.evaluation import Evaluation
from polyak.trainer.polish_start import PolishStart
from polyak.trainer.step import Step


def span_of(polish: str | Time | int) -> Time:
    """Return the length of a polish.

    Args:
        polish: As for ``Trainer``.

    Raises:
        ArgumentError: If it is not a percentage above 0 and below 100.
        TimeError: If it is not a time above 0.
    """
    if not isinstance(polish, str) or not polish.strip().endswith("%"):
        return as_span("polish", polish, above=0, steps=True)
    try:
        share = float(polish.strip()[:-1]) / 100
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise ArgumentError(f"polish must be above 0 % and below 100 % of the run (got {polish!r}); give such as '5%'")
    return Time(share, TimeUnit.DURATION)


class Polish:
    """Loads the average into the model near the end of a run, and sets the learning rates from there on.

    From then on, schedulers are paused, and evaluations, predictions and checkpoints use the training weights.

    Args:
        context: The context of the trainer.
        step: The trainer's step, whose schedulers are paused.
        evaluation: Evaluates before and after.
        polish: As for ``Trainer``; None for no such phase.

    Raises:
        ArgumentError: If there is no average to polish.
        TimeError: If ``polish`` is not a time above 0.
    """

    def __init__(self, context: Context, step: Step, evaluation: Evaluation, polish: str | Time | int | None) -> None:
        self._state, self._loop, self._logger = context.state, context.loop, context.logger
        self._step, self._evaluation = step, evaluation
        self._span = None if polish is None else span_of(polish)
        self._share, self._length = 0.0, ""  # of the run, known once that begins
        self._began: float | None = None  # elapsed share of the run
        self._rates: list[list[float]] = []
        self._before: dict[str, float] | None = None
        self._start = None if self._span is None else PolishStart(context)

    def start_run(self) -> None:
        """Check that the polish fits into the run.

        Raises:
            ArgumentError: If it does not, or there will be no average.
        """
        if self._span is None or self._start is None:
            return
        length, state = self._state.max_duration, self._state
        assert length is not None
        span = convert(self._span, length.unit, state)
        if self._span.unit is TimeUnit.DURATION:
            span = float(self._span) * float(length)
        if span is None or span >= float(length):
            what = "shorter than the run" if span else "in the unit of max_duration, or a percentage"
            raise ArgumentError(f"polish must be {what} (got {self._span} of {length}); give such as '5%'")
        share = span / float(length)
        if self._began is not None and (share, str(length)) != (self._share, self._length):
            raise ArgumentError(
                f"a polish that has begun must keep its length and that of the run (got {self._span} of {length}, and "
                f"it is {self._share:.3g} of {self._length}); to train longer, make a new Trainer with the weights"
            )
        self._share, self._length = share, str(length)
        self._start.check(share, self._span)

    @property
    def is_due(self) -> bool:
        """Whether the polish begins now."""
        return self._span is not None and self._began is None and self._elapsed() >= 1 - self._share - 1e-12

    def begin(self) -> None:
        """Load the average into the model. Nothing must interrupt this.

        Raises:
            LoanError: If averaging has not begun.
            RecordError: If the record that has the average cannot be read.
        """
        assert self._start is not None
        self._start.load()
        self._rates = [[float(group["lr"]) for group in one.param_groups] for one in self._state.optimizers]
        self._began = self._elapsed()
        self._follow()

    @property
    def wants_figures(self) -> bool:
        """Whether the average must be evaluated: the polish has begun, and no batch of it is trained."""
        evaluated = self._before is not None or not self._state.evaluators
        return self._began is not None and not evaluated and self._elapsed() == self._began

    def measure_before(self) -> None:
        """Evaluate the average and log the figures."""
        self._before = self._measure("before")

    def measure_after(self) -> None:
        """Evaluate what the polish has made and log the figures."""
        if self._began is not None and self._state.evaluators and self._state.finished and not self._state.stopping:
            self._measure("after")

    def _measure(self, when: str) -> dict[str, float]:
        found = self._evaluation.figures(f"polish/{when}")
        self._logger.log_metrics(found)
        return found

    def set_rates(self) -> None:
        """Set the learning rates of the next batch, if it is one of the polish."""
        if self._began is None:
            return
        self._set(FACTOR * max(0.0, 1 - (self._elapsed() - self._began) / (1 - self._began)))

    def _set(self, factor: float) -> None:
        for optimizer, rates in zip(self._state.optimizers, self._rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(factor * rate)
                else:
                    group["lr"] = factor * rate

    def reset(self) -> None:
        """Begin again: the clock was set back. The rates are those from before the polish."""
        if self._began is not None:
            self._set(1.0)
        self._began = self._before = None
        self._follow()

    def state_dict(self) -> dict[str, Any] | None:
        """Return what a resumed run depends on; None before the polish."""
        if self._began is None:
            return None
        return {
            "began": self._began,
            "share": self._share,
            "length": self._length,
            "rates": self._rates,
            "before": self._before,
        }

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Resume from what ``state_dict`` returned.

        Args:
            state: The saved state.

        Raises:
            CheckpointError: If the run was being polished, and this trainer does not polish.
        """
        if state is not None and self._span is None:
            raise CheckpointError(
                f"a run that is being polished must be resumed with polish= (it began at {state['began']:.1%} of the "
                f"run); give polish='{100 * state['share']:g}%'"
            )
        if state is None:
            self._began = self._before = None
        else:
            self._began, self._share, self._length = state["began"], state["share"], state["length"]
            self._before, self._rates = state["before"], [list(rates) for rates in state["rates"]]
        self._follow()

    def _follow(self) -> None:
        self._loop.swapping = self._step.schedules = self._began is None

    def _elapsed(self) -> float:
        return float(self._state.timestamp.elapsed(TimeUnit.DURATION, self._state.max_duration))

"""``Watch``: evaluates the averages of a record inside the run that records it, and logs the metrics."""

import json
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from polyak.algorithm import Algorithm, MetricLogger, check_event
from polyak.errors import ArgumentError, PlanWarning, PolyakError, RecordError
from polyak.events import Event, State, refuse_uncounted
from polyak.record import Record, Recorder
from polyak.sharding import OneProcess, communicator_of
from polyak.sweeping.returned import Evaluate
from polyak.tensors.slots import unwrap
from polyak.time import Time, TimeUnit, as_span
from polyak.training import rng
from polyak.watching.log import Log
from polyak.watching.moment import COOLDOWNS, HALF_LIVES, Moment, check_options, read_moment


class Watch(Algorithm):
    """Log what the run would score with its averages, while it trains: raw, averaged, and as if annealed now.

    Goes after its ``Recorder`` in the list of algorithms. At each interval the weights are evaluated as ``polyak
    watch`` does in another process: a half-life of a sixteenth of the run so far, the best of a few half-lives, and
    virtual cooldowns of 10 and 20 %; and the raw weights, where each process holds all of them. The function is given
    copies of the weights: it loads them into a model of its own, never into the one in training. The states of the
    random number generators are restored afterwards, so that training is the same with and without this. Of several
    ranks, rank 0 evaluates and the others wait.

    The logger gets ``watch/METRIC/raw``, ``newest``, ``sixteenth``, ``best_half_life``, ``cooldown_10`` and
    ``cooldown_20``. If the first evaluation fails, its error is raised; later ones give a warning.

    Args:
        record: The ``Recorder`` of this run.
        evaluate: As for ``sweep``.
        interval: The time between evaluations.
        results: A JSON Lines file that keeps them; a report in the same folder shows it.
        half_lives: Shares of the run so far.
        cooldowns: Shares of the run so far.
        metric: As for ``sweep``.
        maximize: As for ``sweep``.
        minimize: As for ``sweep``.

    Raises:
        ArgumentError: If ``record`` is not a ``Recorder``, ``evaluate`` cannot be called, or a length is not a share.
        EvaluationError: If ``maximize`` and ``minimize`` contradict each other.
        TimeError: If ``interval`` is not a time, or not above 0.

    Attributes:
        moments: What was evaluated, oldest first.

    Example:
        >>> import copy, torch
        >>> from torch import nn
        >>> from polyak import Recorder, Watch, attach
        >>> model = nn.Linear(2, 1)
        >>> net, x, y = copy.deepcopy(model), torch.randn(64, 2), torch.randn(64, 1)
        >>> def loss(state):
        ...     net.load_state_dict(state)
        ...     return {"loss": nn.functional.mse_loss(net(x), y).item()}
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> recorder = Recorder(interval="2ba")
        >>> watch = Watch(recorder, loss, "50ba")
        >>> with attach([recorder, watch], model, optimizer):
        ...     for _ in range(100):
        ...         optimizer.zero_grad()
        ...         nn.functional.mse_loss(model(torch.randn(8, 2)), torch.randn(8, 1)).backward()
        ...         optimizer.step()
        >>> [moment.updates for moment in watch.moments]
        [50, 100]
        >>> sorted(watch.moments[-1].numbers())[-4:]
        ['watch/loss/cooldown_20', 'watch/loss/newest', 'watch/loss/raw', 'watch/loss/sixteenth']
    """

    def __init__(
        self,
        record: Recorder,
        evaluate: Evaluate,
        interval: str | Time | int = Time(1 / 20, TimeUnit.DURATION),  # noqa: B008  it is immutable
        *,
        results: str | Path | None = None,
        half_lives: Sequence[float] = HALF_LIVES,
        cooldowns: Sequence[float] = COOLDOWNS,
        metric: str | None = None,
        maximize: bool | None = None,
        minimize: bool | None = None,
    ) -> None:
        if not isinstance(record, Recorder):
            raise ArgumentError(f"record must be the Recorder of this run (got {record!r})")
        shares = {"half_lives": half_lives, "cooldowns": cooldowns}
        better = {"maximize": maximize, "minimize": minimize}
        check_options(evaluate, **shares, **better)
        self.interval = as_span("interval", interval, above=0, steps=True)
        self.moments = list[Moment]()
        self._record = record
        self._evaluate = evaluate
        self._results = None if results is None else Path(results).absolute()
        self._options: dict[str, Any] = {**shares, "metric": metric, **better}
        self._passed: int | None = None  # intervals that had ended at the last evaluation
        self._ranks: Any = OneProcess()

    def __repr__(self) -> str:
        return f"Watch({self._record!r}, interval={self.interval})"

    def match(self, event: Event, state: State) -> bool:
        """Return whether to act: where the run starts, where an interval has ended, and at the end of the run."""
        check_event(event, "Watch")
        if event is Event.BATCH_END:
            return self._passed is None or self._intervals(state) > self._passed
        return event in {Event.INIT, Event.FIT_START, Event.FIT_END}

    def apply(self, event: Event, state: State, logger: MetricLogger) -> None:
        """Evaluate the averages, and log the metrics."""
        if event is Event.INIT:
            self._ranks = communicator_of(state.model)
            return
        now = self._intervals(state)
        if event is Event.FIT_START or self._passed is None:
            self._passed = now if self._passed is None else min(now, self._passed)
            return
        self._passed = now
        with rng.preserved():
            moment = self._ranks.on_rank_0(lambda: self._read(event, state), "evaluate averages of the record")
        if moment is not None:
            self.moments = [one for one in self.moments if one.updates < moment.updates] + [moment]
            logger.log_metrics(moment.numbers(), int(state.timestamp.batch))

    def _intervals(self, state: State) -> int:
        return state.timestamp.intervals(self.interval, state.max_duration)

    def _read(self, event: Event, state: State) -> Moment | None:
        try:
            record = self._record.record
            if not self._due(record, ended=event is Event.FIT_END):
                return None
            # After the run the model may hold other weights; the record then has the raw ones.
            raw = None if event is Event.FIT_END or not self._ranks.replicas else lambda: _copies(state)
            moment = read_moment(record, self._evaluate, raw=raw, **self._options)
            with Log(self._results) as log:
                log.add(moment)
        except (PolyakError, OSError) as error:
            if not self.moments and not isinstance(error, RecordError):
                raise
            warnings.warn(f"the averages of this moment were not evaluated: {error}", PlanWarning, stacklevel=2)
            return None
        return moment

    def _due(self, record: Record, *, ended: bool) -> bool:
        """Return whether there is something to evaluate; at the end of the run, more than at the last evaluation."""
        if not record.segments:
            return False
        return not (ended and self.moments and self.moments[-1].updates == record.segments[-1].end.updates)

    def refuse_uncounted(self, state: State, counted: Collection[TimeUnit]) -> None:
        """Refuse an interval that the loop does not count; see ``Algorithm``."""
        refuse_uncounted(f"interval='{self.interval}'", self.interval.unit, state, counted)

    def state_dict(self) -> dict[str, Any]:
        """Return when the last evaluation was, and the results so far."""
        moments = json.dumps([one.to_plain() for one in self.moments])
        return {"repr": repr(self), "passed": -1 if self._passed is None else self._passed, "moments": moments}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from what ``state_dict`` returned.

        Args:
            state: The saved state.
        """
        self._passed = None if state["passed"] < 0 else int(state["passed"])
        self.moments = [Moment.from_plain(one) for one in json.loads(state["moments"])]


def _copies(state: State) -> dict[str, Tensor]:
    weights = unwrap(state.model).state_dict()
    return {name: one.detach().to("cpu", copy=True) for name, one in weights.items() if isinstance(one, Tensor)}

"""``Averaging`` for Ignite: the algorithms follow a trainer engine; evaluators and checkpoints get the average."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine, Events
from ignite.metrics import Metric
from torch import nn
from torch.optim import Optimizer

from polyak.algorithm import Algorithm, as_algorithms
from polyak.events import Event
from polyak.time import Time, TimeUnit
from polyak.training import rng
from polyak.training.evalweights import EvalWeights, eval_weights_of, refuse_raw_of_averaged
from polyak.training.handle import Handle
from polyak.training.loop import Loop
from polyak.training.sizes import BatchSizes
from polyak.training.state import LoopState
from polyak.training.steps import StepHooks
from polyak.training.uncountable import refuse_uncountable


class _Logger:
    def __init__(self, trainer: Engine) -> None:
        self._trainer = trainer

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        del step  # a logger of Ignite's takes the engine's
        self._trainer.state.metrics.update(metrics)


class Averaging(Handle):
    """Run ``EMA``, ``Recorder`` or other algorithms in an Ignite trainer.

    An optimizer step that moved weights is one batch of their clock; half-lives may be in ``ba``, ``ep``, ``dur`` and,
    if they are counted, ``sp`` and ``tok``. What they log becomes metrics of the trainer's state, where Ignite's
    loggers find them. Put this object among a ``Checkpoint``'s ``to_save``, after the model. It is also the handle of
    the average: ``model``, ``applied()``, ``save`` and more.

    Args:
        algorithms: One or several; one of them at most may swap an average in.
        trainer: The engine whose process function trains.
        model: The model in training.
        optimizer: If there are several optimizers, the one whose steps are to be counted.
        evaluators: Engines that evaluate with the average, unless ``eval_weights`` says otherwise.
        predictors: Engines that predict with the average.
        gradient_accumulation_steps: Iterations in an optimizer step, for times in ``ep`` and ``dur``.
        num_samples: Function of a batch: how many samples it has; needed for times in ``sp``.
        num_tokens: Function of a batch: how many tokens it has; needed for times in ``tok``.
        eval_weights: Which weights the evaluators use: ``"averaged"``, ``"raw"`` (the training weights) or ``"both"``.
            With both, metrics with plain names are those of the average, which ``saves`` saves; those of the training
            weights are computed before, without other handlers, and named ``raw_...``.

    Raises:
        ArgumentError: If more than one algorithm swaps an average in.
        TimeError: If a time of an algorithm is in a unit that is not counted.
        ProfileError: If a profile is in such a unit.

    Attributes:
        algorithms: As given.
    """

    def __init__(
        self,
        algorithms: Algorithm | Sequence[Algorithm],
        trainer: Engine,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        evaluators: Sequence[Engine] = (),
        predictors: Sequence[Engine] = (),
        gradient_accumulation_steps: int = 1,
        num_samples: Callable[[Any], int] | None = None,
        num_tokens: Callable[[Any], int] | None = None,
        eval_weights: EvalWeights = "averaged",
    ) -> None:
        eval_weights = eval_weights_of(eval_weights)
        self.algorithms = as_algorithms(algorithms)
        self._sizes = BatchSizes(num_samples, num_tokens)
        self._loop = Loop(self.algorithms, LoopState(model), _Logger(trainer), counts=self._sizes.units)
        refuse_uncountable(self.algorithms, self._sizes.units)
        self._loop.meet()
        self._optimizer = optimizer
        self._accumulates = gradient_accumulation_steps
        self._hooks: StepHooks | None = None
        self._iteration: int | None = None  # in the epoch, if one has begun
        self._fitting = self._interrupted = False
        self._random: Mapping[str, Any] | None = None
        self._follow(trainer)
        for engine in evaluators if eval_weights != "raw" else ():
            self._swap_in(engine, Event.EVAL_START, Event.EVAL_END, raw_first=eval_weights == "both")
        for engine in predictors:
            self._swap_in(engine, Event.PREDICT_START, Event.PREDICT_END)

    def _follows(self) -> Loop:
        return self._loop

    # Training

    def _follow(self, trainer: Engine) -> None:
        for event, handler in {
            Events.STARTED: self._on_started,
            Events.EPOCH_STARTED: self._on_epoch_started,
            # Inside an epoch a resumable loader draws random numbers until it has given its first batch.
            Events.GET_BATCH_COMPLETED: self._restore_random,
            Events.ITERATION_STARTED: self._on_iteration_started,
            Events.ITERATION_COMPLETED: self._on_iteration_completed,
            Events.EPOCH_COMPLETED: self._end_epoch,
            Events.INTERRUPT: self._on_interrupt,
        }.items():
            trainer.add_event_handler(event, handler)
        run = trainer.run

        # Wrapped, because a handler of EXCEPTION_RAISED would swallow the exception, and COMPLETED may be skipped.
        @wraps(run)
        def run_and_count(*args: Any, **kwargs: Any) -> Any:
            if not self._interrupted:
                # An engine that was terminated begins a new epoch, whatever the number of its iteration.
                self._iteration = 0 if trainer.should_terminate else None
            self._interrupted = False
            self._hooks = self._loop.count(self._optimizer, self._after_step)
            try:
                result = run(*args, **kwargs)
                if self._fitting and not self._interrupted:
                    self._fitting = False
                    self._loop.fire(Event.FIT_END)
            except BaseException:
                self._fitting = False
                self._loop.fire(Event.EXCEPTION)
                raise
            finally:
                self._hooks.remove()
            return result

        trainer.run = run_and_count

    def _on_started(self, trainer: Engine) -> None:
        state = self._loop.state
        if trainer.state.max_epochs is not None:
            state.max_duration = Time(trainer.state.max_epochs, TimeUnit.EPOCH)
        elif trainer.state.max_iters is not None:
            state.max_duration = Time(trainer.state.max_iters // self._accumulates, TimeUnit.BATCH)
        length = trainer.state.epoch_length
        steps = length // self._accumulates if length and length % self._accumulates == 0 else None
        self._loop.state.set_epoch_length(steps)
        if self._random is not None and hasattr(trainer.state, "rng_states"):
            # A DeterministicEngine sets its own before the order of the data is drawn, which changes that order.
            trainer.state.rng_states = None
        self._sizes.take()
        self._fitting = True
        self._loop.fire(Event.FIT_START)

    def _on_epoch_started(self, trainer: Engine) -> None:
        length = trainer.state.epoch_length
        if self._iteration is None:
            self._iteration = trainer.state.iteration % length if length else 0
        if self._iteration == 0:
            self._loop.begin_epoch()
            # The loader's iterator, which draws from these, is made after this.
            self._restore_random()

    def _restore_random(self) -> None:
        if self._random is not None and idist.get_world_size() == 1:
            rng.set_state(self._random)
        self._random = None

    def _on_iteration_started(self, trainer: Engine) -> None:
        self._sizes.add(trainer.state.batch, idist.get_world_size())

    def _after_step(self) -> None:
        self._loop.end_batch(**self._sizes.take())

    def _on_iteration_completed(self, trainer: Engine) -> None:
        # Not only at EPOCH_COMPLETED: other handlers of that event find the epoch ended, whatever their order.
        self._iteration = (self._iteration or 0) + 1
        if self._iteration == trainer.state.epoch_length:
            self._end_epoch()

    def _end_epoch(self) -> None:
        if self._iteration:
            self._iteration = 0
            self._loop.end_epoch()

    def _on_interrupt(self) -> None:
        self._interrupted = True

    # Swaps

    def _swap_in(self, engine: Engine, start: Event, end: Event, *, raw_first: bool = False) -> None:
        run = engine.run

        # Wrapped, because an engine that is terminated or interrupted may never complete.
        @wraps(run)
        def run_with_average(*args: Any, **kwargs: Any) -> Any:
            if raw_first:
                refuse_raw_of_averaged(self._loop.state.model)
            raw = _raw_metrics(engine, run, *args, **kwargs) if raw_first else {}
            engine.state.metrics.update(raw)
            with self._loop.between(start, end):
                return run(*args, **kwargs)

        engine.run = run_with_average

    def saves(self, checkpoint: Callable[[Engine], object]) -> Callable[[Engine], None]:
        """Return a handler that saves with the average in the model of ``to_save``.

        The training weights are in the state of this object, from which ``Checkpoint.load_objects`` resumes.

        Args:
            checkpoint: An Ignite ``Checkpoint``, or any handler that saves.
        """

        def save(engine: Engine) -> None:
            with self._loop.saving():
                checkpoint(engine)

        return save

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the algorithms, of the clock and of the random numbers."""
        return {**self._loop.state_dict(), "rng": rng.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from what ``state_dict`` returned, with the training weights if the model had the average then.

        Args:
            state: The saved state.
        """
        self._loop.load_state_dict(state)
        self._random = state["rng"]


def _raw_metrics(engine: Engine, run: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Run an evaluator on the training weights, with only the handlers of metrics; return the metrics as ``raw_...``.

    Other handlers, such as ``Checkpoint`` and ``EarlyStopping``, act only on the metrics of the average.
    """
    handlers = engine._event_handlers  # noqa: SLF001  it has no public list of them
    of_metrics = {event: [one for one in added if _is_metric(one[0])] for event, added in handlers.items()}
    before = dict(engine.state.metrics)
    engine._event_handlers = defaultdict(list, of_metrics)  # noqa: SLF001
    try:
        engine.state.metrics = dict[str, Any]()
        with rng.preserved():
            run(*args, **kwargs)
        return {f"raw_{name}": value for name, value in engine.state.metrics.items()}
    finally:
        engine._event_handlers, engine.state.metrics = handlers, before  # noqa: SLF001


def _is_metric(handler: Callable[..., Any]) -> bool:
    return isinstance(getattr(handler, "__self__", None), Metric)

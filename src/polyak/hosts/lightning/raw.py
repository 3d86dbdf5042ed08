"""Evaluates the raw weights in a pass of their own, before Lightning's evaluation of the average."""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from polyak.training import rng
from polyak.training.evalweights import refuse_raw_of_averaged

# Before the name of a metric of the raw weights.
PREFIX = "raw_"


def evaluate_raw_first(trainer: Any, wanted: Callable[[], bool]) -> None:
    """Let validation and test run on the raw weights first, if that is wanted.

    In that pass callbacks are not called, so that none saves or stops by it. Its metrics are the trainer's, with
    ``raw_`` before their names, when the callbacks of the second pass are called, and go to the loggers after it.

    Args:
        trainer: Lightning's.
        wanted: Whether an evaluation that is about to begin is to have both passes.
    """
    for loop in (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop):
        loop.run = _twice(trainer, loop, loop.run, wanted)


def _twice(trainer: Any, loop: Any, run: Callable[[], Any], wanted: Callable[[], bool]) -> Callable[[], Any]:
    @functools.wraps(run)
    def run_twice() -> Any:
        if trainer.sanity_checking or not wanted():
            return run()
        refuse_raw_of_averaged(trainer.strategy.model)
        shown, logged = _raw_metrics(trainer, loop, run)
        trainer.callback_metrics.update(shown)
        result = run()
        trainer._logger_connector.log_metrics(logged)  # noqa: SLF001
        return result

    return run_twice


def _raw_metrics(trainer: Any, loop: Any, run: Callable[[], Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Evaluate the raw weights; return what callbacks are shown of their metrics, and what is logged."""
    with rng.preserved(), _alone(trainer, loop):
        run()
        shown, logged = trainer.callback_metrics, trainer.logged_metrics
    return _prefixed(shown), _prefixed(logged)


@contextmanager
def _alone(trainer: Any, loop: Any) -> Iterator[None]:
    """Run a loop for a ``with`` block without callbacks, logs, printed results and traces in its progress."""
    connector, progress = trainer._logger_connector, copy.deepcopy(loop.batch_progress)  # noqa: SLF001
    kept = {name: getattr(connector, name) for name in _METRICS}
    callbacks, verbose, restarting = trainer.callbacks, loop.verbose, loop.restarting
    seen = copy.copy(loop._seen_batches_per_dataloader)  # noqa: SLF001
    trainer.callbacks, loop.verbose, loop.restarting = list[Any](), False, False
    connector.reset_metrics()
    connector.log_metrics = functools.partial(_keep, connector)
    try:
        yield
    finally:
        del connector.log_metrics  # the class has its own
        vars(connector).update(kept)
        trainer.callbacks, loop.verbose, loop.restarting = callbacks, verbose, restarting
        loop.batch_progress, loop._seen_batches_per_dataloader = progress, seen  # noqa: SLF001


def _keep(connector: Any, metrics: Mapping[str, Any], step: int | None = None) -> None:
    """Keep what would go to the loggers, instead of ``log_metrics``."""
    del step
    connector._logged_metrics.update(metrics)  # noqa: SLF001


_METRICS = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")


def _prefixed(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{PREFIX}{name}": value for name, value in metrics.items()}

"""Loggers for experiment trackers: Weights & Biases, and MLflow."""

import os
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from polyak.algorithm import MetricLogger
from polyak.errors import ArgumentError, CheckpointError, MissingExtraError
from polyak.trainer.loggers import Destination
from polyak.trainer.state import TrainerState


def _import(library: str, logger: str) -> Any:
    try:
        return import_module(library)
    except ImportError as error:
        raise MissingExtraError(
            f"{logger} needs {library}, which cannot be imported ({error}); pip install 'polyak[{library}]'"
        ) from error


def _check_ranks(rank_zero_only: object) -> None:
    if rank_zero_only is not True:
        raise ArgumentError(
            f"rank_zero_only must be True (got {rank_zero_only!r}): metrics are the same on all ranks, and rank 0 logs "
            "them; leave it out"
        )


class _Tracker(Destination):
    """Has a run of a tracker, which begins with the trainer and which a resumed trainer continues.

    Args:
        name: Of the run; None for the name of the trainer's.
    """

    def __init__(self, name: str | None) -> None:
        self.run_id: str | None = None
        self._name = name
        self._named = name is not None

    def _begin(self) -> None:
        """Begin the run, or continue the one of ``run_id``; do nothing if that is done."""
        raise NotImplementedError

    def init(self, state: TrainerState, logger: MetricLogger) -> None:
        """Take the name of the run.

        Args:
            state: Has it.
            logger: Not used.
        """
        del logger
        if not self._named:
            self._name = state.run_name

    def after_load(self, state: TrainerState, logger: MetricLogger) -> None:
        """Begin the run: by now it is known whether it continues another.

        Args:
            state: Not used.
            logger: Not used.
        """
        del state, logger
        self._begin()

    def state_dict(self) -> dict[str, Any]:
        """Return which run it is."""
        return {"run_id": self.run_id, "name": self._name}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the run of a checkpoint.

        Args:
            state: As saved.
        """
        self.run_id = state["run_id"]
        if not self._named:
            self._name = state["name"]


class WandBLogger(_Tracker):
    """Log metrics to Weights & Biases; it needs ``pip install polyak[wandb]``.

    The W&B run begins with the trainer and ends in ``Trainer.close``, or with the process. A trainer that resumes from
    a checkpoint continues the W&B run of that checkpoint. W&B keeps the first values of each step, so the batches that
    a resumed run repeats are in it once. A run that you have begun by ``wandb.init`` is used, and left open.

    Args:
        project: Of W&B.
        group: Of runs.
        name: Of the run; by default the ``run_name`` of the trainer.
        entity: User or team.
        tags: Of the run.
        rank_zero_only: True, as in Composer by default: only rank 0 logs.
        init_kwargs: More arguments of ``wandb.init``, such as ``mode``, ``dir`` and ``config``.

    Raises:
        MissingExtraError: If wandb is not installed.
        ArgumentError: If ``rank_zero_only`` is not True.

    Attributes:
        run: W&B's run, for what else is to be logged; None before it begins and after it ends.
        run_id: Its id.

    References:
        ``composer.loggers.WandBLogger``.
    """

    def __init__(
        self,
        project: str | None = None,
        group: str | None = None,
        name: str | None = None,
        entity: str | None = None,
        tags: Sequence[str] | None = None,
        *,
        rank_zero_only: bool = True,
        init_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(name)
        _check_ranks(rank_zero_only)
        _import("wandb", "WandBLogger")
        given = {"project": project, "group": group, "name": name, "entity": entity, "tags": tags}
        self._options = {**(init_kwargs or {}), **{key: value for key, value in given.items() if value is not None}}
        self.run: Any = None
        self._ends_run = True
        self._failed = False

    def _begin(self) -> None:
        if self.run is not None:
            return
        wandb = _import("wandb", "WandBLogger")
        already = wandb.run
        resumed = {} if self.run_id is None else {"id": self.run_id, "resume": "allow"}
        self.run = wandb.init(**{"name": self._name, **resumed, **self._options})
        self.run_id = self.run.id
        self._ends_run = self.run is not already

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log metrics.

        Args:
            metrics: Values by name.
            step: Batches so far.
        """
        self._begin()
        self.run.log(dict(metrics), step=step)

    def fit_start(self, state: TrainerState, logger: MetricLogger) -> None:
        """Forget an error that an earlier ``fit`` ended with.

        Args:
            state: Not used.
            logger: Not used.
        """
        del state, logger
        self._failed = False

    def exception(self, state: TrainerState, logger: MetricLogger) -> None:
        """Remember that the run has failed.

        Args:
            state: Not used.
            logger: Not used.
        """
        del state, logger
        self._failed = True

    def close(self, state: TrainerState, logger: MetricLogger) -> None:
        """End the run, as failed if an error ended training.

        Args:
            state: Not used.
            logger: Not used.
        """
        del state, logger
        if self.run is not None and self._ends_run:
            self.run.finish(exit_code=int(self._failed))
        self.run = None


class MLflowLogger(_Tracker):
    """Log metrics to MLflow; it needs ``pip install polyak[mlflow]``.

    The MLflow run begins with the trainer. It is finished where ``fit`` or the trainer ends, and failed where an error
    ends it. A trainer that resumes from a checkpoint continues the MLflow run of that checkpoint; the batches that it
    repeats are logged twice, with the same values.

    Args:
        experiment_name: By default that of ``MLFLOW_EXPERIMENT_NAME`` in the environment, or ``"Default"``. It is made
            if there is none.
        run_name: By default the ``run_name`` of the trainer.
        tags: Of the run.
        tracking_uri: Where MLflow stores runs; its own default if None.
        rank_zero_only: True, as in Composer by default: only rank 0 logs.

    Raises:
        MissingExtraError: If mlflow is not installed.
        ArgumentError: If ``rank_zero_only`` is not True.

    Attributes:
        run_id: MLflow's id of the run, for what else is to be logged; None before it begins.

    References:
        ``composer.loggers.MLFlowLogger``.
    """

    def __init__(
        self,
        experiment_name: str | None = None,
        run_name: str | None = None,
        tags: Mapping[str, Any] | None = None,
        tracking_uri: str | Path | None = None,
        *,
        rank_zero_only: bool = True,
    ) -> None:
        super().__init__(run_name)
        _check_ranks(rank_zero_only)
        _import("mlflow", "MLflowLogger")
        self._experiment = experiment_name
        self._tags = tags
        self._uri = None if tracking_uri is None else str(tracking_uri)
        self._client: Any = None
        self._status = "RUNNING"

    def _begin(self) -> None:
        if self._client is not None:
            return
        mlflow = _import("mlflow", "MLflowLogger")
        client = mlflow.MlflowClient(self._uri)
        if self.run_id is None:
            name = self._experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME", "Default")
            found = client.get_experiment_by_name(name)
            experiment = client.create_experiment(name) if found is None else found.experiment_id
            self.run_id = client.create_run(experiment, run_name=self._name, tags=self._tags).info.run_id
        else:
            try:
                client.update_run(self.run_id, status="RUNNING")
            except mlflow.MlflowException as error:
                raise CheckpointError(
                    f"the MLflow run of the checkpoint must be at {client.tracking_uri} to be continued (got "
                    f"{self.run_id!r}: {error}); give its tracking_uri, or begin a new run with "
                    'load_ignore_keys=["callbacks"]'
                ) from error
        self._client = client

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log metrics.

        Args:
            metrics: Values by name.
            step: Batches so far.
        """
        self._begin()
        metric = _import("mlflow.entities", "MLflowLogger").Metric
        now = int(time.time() * 1000)
        self._client.log_batch(self.run_id, [metric(name, value, now, step) for name, value in metrics.items()])

    def fit_start(self, state: TrainerState, logger: MetricLogger) -> None:
        """Mark the run as running, also if an earlier ``fit`` has ended.

        Args:
            state: Not used.
            logger: Not used.
        """
        del state, logger
        self._begin()
        if self._status != "RUNNING":
            self._client.update_run(self.run_id, status="RUNNING")
        self._status = "RUNNING"

    def _end(self, status: str) -> None:
        if self._client is not None:
            self._client.set_terminated(self.run_id, status)
            self._status = status

    def fit_end(self, state: TrainerState, logger: MetricLogger) -> None:
        """Mark the run as finished; what is logged later is still taken.

        Args:
            state: Not used.
            logger: Not used.
        """
        del state, logger
        self._end("FINISHED")

    def exception(self, state: TrainerState, logger: MetricLogger) -> None:
        """Mark the run as failed.

        Args:
            state: Not used.
            logger: Not used.
        """
        del state, logger
        self._end("FAILED")

    def close(self, state: TrainerState, logger: MetricLogger) -> None:
        """End the run, if ``fit`` has not ended it.

        Args:
            state: Not used.
            logger: Not used.
        """
        del state, logger
        if self._status == "RUNNING":
            self._end("FINISHED")

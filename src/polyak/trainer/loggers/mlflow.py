"""Metrics for MLflow."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyak.algorithm import MetricLogger
from polyak.errors import CheckpointError
from polyak.trainer.loggers.tracker import Tracker, check_ranks, import_library
from polyak.trainer.state import TrainerState


class MLflowLogger(Tracker):
    """Logs metrics to MLflow; it needs ``pip install polyak[mlflow]``.

    The MLflow run starts with the trainer. Its status is finished after ``fit`` or ``Trainer.close``, and failed after
    an error. A trainer that resumes from a checkpoint continues the MLflow run of that checkpoint; batches that it
    repeats are logged twice, with the same values.

    Args:
        experiment_name: By default that of ``MLFLOW_EXPERIMENT_NAME`` in the environment, or ``"Default"``. It is
            created if it does not exist.
        run_name: By default the ``run_name`` of the trainer.
        tags: The tags of the run.
        tracking_uri: Where MLflow stores runs; its own default if None.
        rank_zero_only: True, as in Composer by default: only rank 0 logs.

    Raises:
        MissingExtraError: If mlflow is not installed.
        ArgumentError: If ``rank_zero_only`` is not True.

    Attributes:
        run_id: MLflow's id of the run, to log other things to it; None before it starts.

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
        check_ranks(rank_zero_only)
        import_library("mlflow", "MLflowLogger")
        self._experiment = experiment_name
        self._tags = tags
        self._uri = None if tracking_uri is None else str(tracking_uri)
        self._client: Any = None
        self._status = "RUNNING"

    def _begin(self) -> None:
        if self._client is not None:
            return
        mlflow = import_library("mlflow", "MLflowLogger")
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
                    f"{self.run_id!r}: {error}); give its tracking_uri, or start a new run with "
                    'load_ignore_keys=["callbacks"]'
                ) from error
        self._client = client

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log metrics.

        Args:
            metrics: Values by name.
            step: The number of batches so far.
        """
        self._begin()
        metric = import_library("mlflow.entities", "MLflowLogger").Metric
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
        """Mark the run as finished; metrics can still be logged to it.

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
        """Mark the run as finished, if ``fit`` has not.

        Args:
            state: Not used.
            logger: Not used.
        """
        del state, logger
        if self._status == "RUNNING":
            self._end("FINISHED")

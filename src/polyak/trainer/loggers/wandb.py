"""Metrics for Weights & Biases."""

from collections.abc import Mapping, Sequence
from typing import Any

from polyak.algorithm import MetricLogger
from polyak.trainer.loggers.tracker import Tracker, check_ranks, import_library
from polyak.trainer.state import TrainerState


class WandBLogger(Tracker):
    """Logs metrics to Weights & Biases; it needs ``pip install polyak[wandb]``.

    The W&B run starts with the trainer and ends in ``Trainer.close``, or with the process. A trainer that resumes from
    a checkpoint continues the W&B run of that checkpoint. W&B keeps the first values of each step, so batches that a
    resumed run repeats are in it once. If ``wandb.init`` has started a run already, that run is used, and not ended.

    Args:
        project: The project of W&B.
        group: The group of runs.
        name: The name of the run; by default the ``run_name`` of the trainer.
        entity: User or team.
        tags: The tags of the run.
        rank_zero_only: True, as in Composer by default: only rank 0 logs.
        init_kwargs: More arguments of ``wandb.init``, such as ``mode``, ``dir`` and ``config``.

    Raises:
        MissingExtraError: If wandb is not installed.
        ArgumentError: If ``rank_zero_only`` is not True.

    Attributes:
        run: W&B's run, to log other things to; None before it starts and after it ends.
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
        check_ranks(rank_zero_only)
        import_library("wandb", "WandBLogger")
        given = {"project": project, "group": group, "name": name, "entity": entity, "tags": tags}
        self._options = {**(init_kwargs or {}), **{key: value for key, value in given.items() if value is not None}}
        self.run: Any = None
        self._ends_run = True
        self._failed = False

    def _begin(self) -> None:
        if self.run is not None:
            return
        wandb = import_library("wandb", "WandBLogger")
        already = wandb.run
        resumed = {} if self.run_id is None else {"id": self.run_id, "resume": "allow"}
        self.run = wandb.init(**{"name": self._name, **resumed, **self._options})
        self.run_id = self.run.id
        self._ends_run = self.run is not already

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log metrics.

        Args:
            metrics: Values by name.
            step: The number of batches so far.
        """
        self._begin()
        self.run.log(dict(metrics), step=step)

    def fit_start(self, state: TrainerState, logger: MetricLogger) -> None:
        """Mark the run as not failed, also if an earlier ``fit`` failed.

        Args:
            state: Not used.
            logger: Not used.
        """
        del state, logger
        self._failed = False

    def exception(self, state: TrainerState, logger: MetricLogger) -> None:
        """Mark the run as failed.

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

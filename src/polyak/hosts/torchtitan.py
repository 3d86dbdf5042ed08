"""``attach`` for torchtitan's ``Trainer``: averages in its steps, its checkpoints and its validation."""

from collections.abc import Callable, Sequence
from typing import Any

from polyak.algorithm import Algorithm
from polyak.averaging.habits import ARGUMENTS_OF_ATTACH, explained
from polyak.engines.hooks import Methods
from polyak.errors import ArgumentError, ShardingError
from polyak.training.attached import Attached
from polyak.training.evalweights import EvalWeights, eval_weights_of, refuse_raw_of_averaged
from polyak.training.options import LoopOptions


class _Logger:
    def __init__(self, metrics: Any) -> None:
        self._metrics = metrics

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self._metrics.logger.log(dict(metrics), step or 0)


class TorchtitanAttached(Attached):
    """An average of the model of torchtitan's ``Trainer``, and its handle. ``attach`` makes it.

    Args:
        algorithms: One or several.
        trainer: As its configuration built it.
        options: Of the loop.
        eval_weights: Which weights validation uses.
    """

    def __init__(
        self, algorithms: Algorithm | Sequence[Algorithm], trainer: Any, options: LoopOptions, eval_weights: EvalWeights
    ) -> None:
        super().__init__(algorithms, trainer.model_parts[0], trainer.optimizers, options)
        self._methods: Methods | None = None
        if trainer.config.checkpoint.enable:
            trainer.checkpointer.states["polyak"] = self
        if trainer.config.validator.enable and eval_weights != "raw":
            self._methods = Methods(trainer.validator)
            self._methods.around("validate", _validation(self.applied, trainer.validator, eval_weights == "both"))

    def detach(self) -> None:
        """Stop counting, and give the validator its own method back. Checkpoints keep the average."""
        if self._methods is not None:
            self._methods.remove()
        super().detach()


@explained("attach(EMA(decay=0.999), trainer)", ARGUMENTS_OF_ATTACH)
def attach(
    algorithms: Algorithm | Sequence[Algorithm], trainer: Any, *, eval_weights: EvalWeights = "averaged"
) -> TorchtitanAttached:
    """Let algorithms follow torchtitan's ``Trainer``. Call this between ``config.build()`` and ``trainer.train()``.

    Steps, samples and tokens are counted, and the run's length is that of the configuration, so that times may be in
    ``ba``, ``sp``, ``tok`` and ``dur``. The state is in the trainer's checkpoints under ``polyak``, each rank's shards.
    To add an average to a run that has checkpoints without one, set ``exclude_from_loading=["polyak"]`` for the first
    start.

    Args:
        algorithms: ``EMA``, ``Recorder`` or others, one or several.
        trainer: Of torchtitan.
        eval_weights: ``"averaged"``; ``"raw"`` to validate with the training weights; or ``"both"``: then
            ``validation_metrics/loss`` is that of the average, and ``raw_validation_metrics/loss`` that of the
            training weights.

    Raises:
        ArgumentError: If ``trainer`` is none of torchtitan's, or ``eval_weights`` is none of its values.
        ShardingError: If a rank has several parts of the model, as with interleaved pipeline schedules.
        TimeError: If a time is in a unit that is not counted.
    """
    chosen = eval_weights_of(eval_weights)
    parts = getattr(trainer, "model_parts", None)
    if parts is None or not hasattr(trainer, "optimizers"):
        raise ArgumentError(
            f"the trainer must be one of torchtitan (got {type(trainer).__name__}); call attach(EMA(...), trainer)"
        )
    if len(parts) != 1:
        raise ShardingError(
            f"a rank must have one part of the model (got {len(parts)}); choose a pipeline schedule with one stage on "
            "a rank, such as 1F1B"
        )
    training, dims = trainer.config.training, trainer.parallel_dims
    samples = training.global_batch_size
    if samples <= 0:  # torchtitan's word for no accumulation
        samples = training.local_batch_size * dims.dp_replicate * dims.dp_shard
    options = LoopOptions(
        f"{training.steps}ba", None, samples, samples * training.seq_len, _Logger(trainer.metrics_processor)
    )
    return TorchtitanAttached(algorithms, trainer, options, chosen)


def _validation(applied: Callable[..., Any], validator: Any, both: bool) -> Callable[..., Any]:
    def validate(inner: Any, model_parts: Any, step: int) -> None:
        if both:
            refuse_raw_of_averaged(model_parts[0])
            metrics = validator.metrics_processor
            validator.metrics_processor = _Raw(metrics)
            try:
                inner(model_parts, step)
            finally:
                validator.metrics_processor = metrics
        with applied():
            inner(model_parts, step)

    return validate


class _Raw:
    """Logs validation with ``raw_`` before the names."""

    def __init__(self, metrics: Any) -> None:
        object.__setattr__(self, "_metrics", metrics)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._metrics, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._metrics, name, value)

    def log_validation(self, loss: float, step: int, extra_metrics: dict[str, Any] | None = None) -> None:
        names = {f"raw_{name}": value for name, value in (extra_metrics or {}).items()}
        self._metrics.logger.log({"raw_validation_metrics/loss": loss, **names}, step)

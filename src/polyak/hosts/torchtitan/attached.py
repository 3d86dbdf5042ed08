"""``attach`` for torchtitan's ``Trainer``: averages in its steps, its checkpoints and its validation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from polyak.algorithm import Algorithm
from polyak.averaging.habits import ARGUMENTS_OF_ATTACH, explained
from polyak.engines.hooks import Methods
from polyak.errors import ArgumentError
from polyak.hosts.torchtitan.export import save_average
from polyak.hosts.torchtitan.validation import validation
from polyak.sharding import ModelParts
from polyak.training.attached import Attached
from polyak.training.evalweights import EvalWeights, eval_weights_of
from polyak.training.options import LoopOptions

STATE = "polyak"  # the name of the average among the states of a checkpoint


class TorchtitanAttached(Attached):
    """An average of the model of torchtitan's ``Trainer``, and its handle. ``attach`` makes it.

    Args:
        algorithms: One or several.
        trainer: As its configuration built it.
        eval_weights: Which weights validation uses.

    Raises:
        ArgumentError: If ``trainer`` is not torchtitan's, has an average already, or has trained or loaded a
            checkpoint; or if ``eval_weights`` is not one of its values.
        TimeError: If a time is in a unit that is not counted.
    """

    def __init__(
        self, algorithms: Algorithm | Sequence[Algorithm], trainer: Any, eval_weights: EvalWeights = "averaged"
    ) -> None:
        chosen = eval_weights_of(eval_weights)
        _check(trainer)
        super().__init__(algorithms, _model_of(trainer), trainer.optimizers, _options_of(trainer))
        self._trainer, self._methods = trainer, list[Methods]()
        trainer.averaging = self
        if trainer.config.checkpoint.enable:
            trainer.checkpointer.states[STATE] = self
        if trainer.config.validator.enable and chosen != "raw":
            model = self._loop.state.model
            self._around(
                trainer.validator, "validate", validation(self.applied, model, trainer.validator, both=chosen == "both")
            )

    def _around(self, owner: Any, name: str, call: Any) -> None:
        """Replace a method of one of the trainer's parts by ``call``, until this is detached."""
        self._methods.append(Methods(owner))
        self._methods[-1].around(name, call)

    def save(self, path: str | Path, *, overwrite: bool = False, hf: bool = False) -> None:
        """Save the averaged weights as safetensors under the names of torchtitan's checkpoints. All ranks must call it.

        Args:
            path: A file whose name ends in ``.safetensors``, or a folder, which gets files of at most 5 GB.
            overwrite: Whether what was saved there before is replaced.
            hf: Whether to save Hugging Face's names and layouts, which torchtitan's adapter of the model makes.

        Raises:
            ExistsError: If there is something already.
            LoanError: If averaging has not begun, or the model holds another average.
            ArgumentError: If the model has no adapter to Hugging Face's names.
            CheckpointError: If the model has a tensor that safetensors cannot hold.
        """
        model = self._loop.state.model
        save_average(self._begun(), self._trainer, model, Path(path), overwrite=overwrite, hf=hf)

    def detach(self) -> None:
        """Stop counting, and restore the validator's own method. Checkpoints keep the average."""
        for methods in self._methods:
            methods.remove()
        super().detach()


@explained("attach(EMA(decay=0.999), trainer)", ARGUMENTS_OF_ATTACH)
def attach(
    algorithms: Algorithm | Sequence[Algorithm], trainer: Any, *, eval_weights: EvalWeights = "averaged"
) -> TorchtitanAttached:
    """Let algorithms follow torchtitan's ``Trainer``. Call this between ``config.build()`` and ``trainer.train()``.

    Steps, samples and tokens are counted, and the run's length is that of the configuration, so that times may be in
    ``ba``, ``sp``, ``tok`` and ``dur``. The state is in the trainer's checkpoints under ``polyak``, each rank's shards.
    Under pipeline parallelism a rank averages all parts of the model that it has.
    To add an average to a run that has checkpoints without one, set ``exclude_from_loading=["polyak"]`` for the first
    start. ``trainer.averaging`` is what this returns.

    Args:
        algorithms: ``EMA``, ``Recorder`` or others, one or several.
        trainer: torchtitan's trainer.
        eval_weights: ``"averaged"``; ``"raw"`` to validate with the training weights; or ``"both"``: then
            ``validation_metrics/loss`` is that of the average, and ``raw_validation_metrics/loss`` that of the
            training weights.

    Raises:
        ArgumentError: If ``trainer`` is not torchtitan's, has an average already, or has trained or loaded a
            checkpoint; or if ``eval_weights`` is not one of its values.
        TimeError: If a time is in a unit that is not counted.
    """
    return TorchtitanAttached(algorithms, trainer, eval_weights)


def _check(trainer: Any) -> None:
    """Check that a trainer is one of torchtitan, and as its configuration built it."""
    if not hasattr(trainer, "model_parts") or not hasattr(trainer, "optimizers"):
        raise ArgumentError(
            f"the trainer must be one of torchtitan (got {type(trainer).__name__}); call attach(EMA(...), trainer)"
        )
    if (other := getattr(trainer, "averaging", None)) is not None:
        raise ArgumentError(
            f"a trainer must be given its algorithms in one call, since a checkpoint has one place for them (got "
            f"another, after {list(other.algorithms)}); give a list: attach([EMA(...), Recorder(...)], trainer)"
        )
    if trainer.step:
        raise ArgumentError(
            f"attach must come before a checkpoint is loaded, which has the average's state too (got a trainer at step "
            f"{trainer.step}); call it between config.build() and trainer.train()"
        )


def _model_of(trainer: Any) -> nn.Module:
    parts = trainer.model_parts
    return parts[0] if len(parts) == 1 else ModelParts(*parts)


def _options_of(trainer: Any) -> LoopOptions:
    training, dims = trainer.config.training, trainer.parallel_dims
    samples = training.global_batch_size
    if samples <= 0:  # torchtitan's word for no accumulation
        samples = training.local_batch_size * dims.dp_replicate * dims.dp_shard
    logger = _Logger(trainer.metrics_processor)
    return LoopOptions(f"{training.steps}ba", None, samples, samples * training.seq_len, logger)


class _Logger:
    def __init__(self, metrics: Any) -> None:
        self._metrics = metrics

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self._metrics.logger.log(dict(metrics), step or 0)

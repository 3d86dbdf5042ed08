"""The host for loops with Hugging Face Accelerate: its checkpoints hold the states of the algorithms."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.optim import Optimizer

from polyak.algorithm import Algorithm
from polyak.errors import LoanError
from polyak.events import Event
from polyak.loop import Loop, StepHooks, as_algorithms, innermost
from polyak.select import unwrap
from polyak.shadow import loan_of
from polyak.time import Time, Timestamp, as_span

_SHARDED = {DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM}


class _Logger:
    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._accelerator.log(dict(metrics), step=step)


class Attached:
    """Algorithms at work in a loop with Accelerate; ``attach`` makes it.

    Args:
        loop: The algorithms.
        optimizer: As given to ``attach``.
        counts: Samples and tokens in a step.
    """

    def __init__(self, loop: Loop, optimizer: Optimizer, counts: tuple[int, int]) -> None:
        self._loop = loop
        self._samples, self._tokens = counts
        self._fitting = False
        self._saving_to: Path | None = None
        self._hooks = StepHooks(innermost(optimizer), self._after_step, self._before_step)

    @property
    def timestamp(self) -> Timestamp:
        """What has been counted so far."""
        return self._loop.state.timestamp

    def _before_step(self) -> None:
        if not self._fitting:
            # Not in `attach`, so that a state can be loaded first.
            self._fitting = True
            self._loop.fire(Event.FIT_START)

    def _after_step(self) -> None:
        self._loop.end_batch(samples=self._samples, tokens=self._tokens)
        if self.timestamp.epoch_length == self.timestamp.batch_in_epoch.value:
            self.end_epoch()

    def end_epoch(self) -> None:
        """Count the end of an epoch. It is called for you if ``steps_per_epoch`` was given."""
        self._loop.end_epoch()

    @contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """Put the average in the model for the length of a ``with`` block, to evaluate it or to save it for use.

        Before averaging has begun, the model keeps its own weights.

        Raises:
            LoanError: If the model holds an average already.
        """
        model = self._loop.state.model
        if loan := loan_of(model):
            raise LoanError(f"a model can hold one average at a time, and {loan.holder} has lent its own already")
        with self._loop.between(Event.EVAL_START, Event.EVAL_END):
            yield model

    def detach(self) -> None:
        """Stop counting. The algorithms keep what they have, and stay in the checkpoints."""
        if self._hooks.remove():
            self._loop.fire(Event.FIT_END)

    # Called by Accelerate

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the algorithms and the clock."""
        self._loop.state.saving_to, self._saving_to = self._saving_to, None
        try:
            return self._loop.state_dict()
        finally:
            self._loop.state.saving_to = None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned.

        Args:
            state: As saved.

        Raises:
            CheckpointError: If it is the state of other algorithms.
            MismatchError: If names or shapes differ from the model's.
        """
        self._loop.load_state_dict(state)

    def before_saving(self, models: object, weights: object, folder: str) -> None:
        """Note where a checkpoint is saved, if it may be.

        Args:
            models: Not used.
            weights: Not used.
            folder: Where.

        Raises:
            LoanError: If the model holds the average.
        """
        del models, weights
        self._saving_to = Path(folder)
        self._refuse_loan("saved")

    def before_loading(self, models: object, folder: str) -> None:
        """Check that a checkpoint may be loaded.

        Args:
            models: Not used.
            folder: Not used.

        Raises:
            LoanError: If the model holds the average.
        """
        del models, folder
        self._refuse_loan("loaded")

    def _refuse_loan(self, what: str) -> None:
        if loan := loan_of(self._loop.state.model):
            raise LoanError(
                f"a state must be {what} with training weights in the model, and {loan.holder} has lent its average; "
                "leave the block of applied() first (what is for use is saved inside it, by accelerator.save_model)"
            )


def attach(
    algorithms: Algorithm | Sequence[Algorithm],
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    max_duration: Time | str | None = None,
    steps_per_epoch: int | None = None,
    samples_per_step: int = 0,
    tokens_per_step: int = 0,
) -> Attached:
    """Let algorithms follow a loop with Accelerate, and go into its checkpoints.

    Evaluate under ``applied()``, and save there what is for use (``accelerator.save_model``, ``save_pretrained``).
    ``save_state`` and ``load_state`` are for going on, with training weights, the average beside them; they are refused
    while the average is in the model. One step of the optimizer is one batch: passes that only accumulate gradients,
    and steps that mixed precision skips, do not count.

    Args:
        algorithms: ``EMA``, ``Recorder`` or others, one or several.
        accelerator: What prepared the model.
        model: As ``accelerator.prepare`` returned it.
        optimizer: Of its parameters; of several, the one whose steps are to be counted.
        max_duration: How long the loop will go on, for times in ``dur`` and for warnings about the plan.
        steps_per_epoch: Optimizer steps in an epoch, for times in ``ep``.
        samples_per_step: Samples in a step, of all processes, for times in ``sp``.
        tokens_per_step: Tokens in a step, of all processes, for times in ``tok``.

    Raises:
        NotImplementedError: Under DeepSpeed, FSDP and Megatron-LM.
        TimeError: If ``max_duration`` is no time.
        ValueError: If more than one of the algorithms lends an average.
    """
    if accelerator.distributed_type in _SHARDED:
        raise NotImplementedError(
            f"the weights must be whole in every process for their average to be lent, and under "
            f"{accelerator.distributed_type.value} they are not; train with DDP or on one device"
        )
    loop = Loop(as_algorithms(algorithms), unwrap(model), _Logger(accelerator))
    loop.state.timestamp = Timestamp(epoch_length=steps_per_epoch)
    loop.state.max_duration = None if max_duration is None else as_span("max_duration", max_duration, above=0)
    attached = Attached(loop, optimizer, (samples_per_step, tokens_per_step))
    accelerator.register_for_checkpointing(attached)
    accelerator.register_save_state_pre_hook(attached.before_saving)
    accelerator.register_load_state_pre_hook(attached.before_loading)
    return attached

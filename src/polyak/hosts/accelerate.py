"""``attach`` for loops with Hugging Face Accelerate, whose checkpoints then hold the states of the algorithms."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.optim import Optimizer

from polyak.algorithm import Algorithm
from polyak.averaging.habits import ARGUMENTS_OF_ATTACH, explained
from polyak.averaging.swap import swap_of
from polyak.engines.deepspeed_loop import DeepSpeedAttached
from polyak.errors import LoanError
from polyak.time import Time
from polyak.training import sharded
from polyak.training.attached import Attached
from polyak.training.counted import CountedLoop
from polyak.training.options import LoopOptions

_FOREIGN = {DistributedType.FSDP, DistributedType.MEGATRON_LM}


class _Logger:
    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._accelerator.log(dict(metrics), step=step)


class _Checkpoints:
    """The states of attached algorithms in Accelerate's checkpoints; it calls all of these methods.

    If no variable refers to the average any more, nothing is saved.
    """

    def __init__(self, loop: CountedLoop, model: nn.Module, number: int) -> None:
        self._loop, self._model = loop, model
        self._shards = f"polyak_{number}"
        self._folder: Path | None = None  # where a state is being saved, or loaded from

    def state_dict(self) -> dict[str, Any]:
        if self._folder is not None and (self._folder / self._shards).exists():
            return {"parts": self._shards}
        return self._loop.state_for(self._folder)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if "parts" in state:
            assert self._folder is not None
            sharded.load(self._loop, self._folder / state["parts"], weights=False)
        elif state["algorithms"] and len(self._loop.algorithms):
            self._loop.load_state_dict(state)

    def before_saving(self, models: object, weights: object, folder: str) -> None:
        del models, weights
        self._folder = Path(folder)
        self._refuse_swap("saved")
        # What is registered for checkpointing is saved by rank 0 alone.
        if sharded.is_sharded(self._loop):
            sharded.save(self._loop, self._folder / self._shards, weights=False)

    def before_loading(self, models: object, folder: str) -> None:
        del models
        self._folder = Path(folder)
        self._refuse_swap("loaded")

    def _refuse_swap(self, what: str) -> None:
        if swap := swap_of(self._model):
            raise LoanError(
                f"a state must be {what} with training weights in the model, and {swap.owner} has swapped its own in; "
                "leave the block of applied() first (inside it, export the model by accelerator.save_model)"
            )


@explained("attach(EMA(decay=0.999), accelerator, model, optimizer)", ARGUMENTS_OF_ATTACH)
def attach(
    algorithms: Algorithm | Sequence[Algorithm],
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer | None,
    *,
    max_duration: Time | str | int | None = None,
    steps_per_epoch: int | Literal["by hand"] | None = None,
    samples_per_step: int = 0,
    tokens_per_step: int = 0,
) -> Attached:
    """Let algorithms follow a loop with Accelerate, and save them in its checkpoints.

    Evaluate under ``applied()``, and export the model there (``accelerator.save_model``, ``save_pretrained``).
    ``save_state`` and ``load_state`` are for resuming: they save the training weights, and the average separately. They
    are refused while the average is in the model. One step of the optimizer is one batch: passes that only accumulate
    gradients, and steps that mixed precision skips, do not count.

    Under DeepSpeed the engine's float32 masters are averaged, as by ``polyak.hosts.deepspeed.attach``, and each rank
    has a part of the average.

    Args:
        algorithms: ``EMA``, ``Recorder`` or others, one or several. Under DeepSpeed, one ``EMA``.
        accelerator: The accelerator that prepared the model.
        model: As ``accelerator.prepare`` returned it.
        optimizer: As ``accelerator.prepare`` returned it; of several, the one that steps last in a batch. None if you
            call ``step`` of what this returns, once after each batch.
        max_duration: The length of the run, for times in ``dur``.
        steps_per_epoch: Optimizer steps in an epoch, for times in ``ep``; or ``"by hand"`` if you call ``end_epoch``.
        samples_per_step: Samples in a step, of all processes, for times in ``sp``.
        tokens_per_step: Tokens in a step, of all processes, for times in ``tok``.

    Raises:
        NotImplementedError: Under FSDP1 and Megatron-LM.
        TimeError: If ``max_duration`` is not a time.
        CallError: If an argument is missing, or there is none of that name.
        ArgumentError: If more than one of the algorithms swaps an average in; under DeepSpeed, if there is another
            algorithm than an ``EMA``, or the model was not prepared.
        OptimizerError: If DeepSpeed's masters cannot be averaged.
    """
    if accelerator.distributed_type in _FOREIGN and not accelerator.is_fsdp2:
        raise NotImplementedError(
            "each process must hold a model's parameters as they are for them to be averaged, and under "
            f"{accelerator.distributed_type.value} it does not; train with DDP, with FSDP2 "
            "(FullyShardedDataParallelPlugin(fsdp_version=2)) or on one device"
        )
    options = LoopOptions(max_duration, steps_per_epoch, samples_per_step, tokens_per_step, _Logger(accelerator))
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        # The engine makes the steps, in `accelerator.backward`, and writes and reads the checkpoints.
        return DeepSpeedAttached(algorithms, model, options)
    attached = Attached(algorithms, model, optimizer, options)
    number = len(accelerator._custom_objects)  # noqa: SLF001  by which it names their files too
    checkpoints = _Checkpoints(attached.loop, model, number)
    accelerator.register_for_checkpointing(checkpoints)
    accelerator.register_save_state_pre_hook(checkpoints.before_saving)
    accelerator.register_load_state_pre_hook(checkpoints.before_loading)
    return attached

"""``attach`` for loops with Lightning's Fabric."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

try:
    from lightning.fabric import Fabric, is_wrapped
except ModuleNotFoundError:
    from lightning_fabric import Fabric, is_wrapped

from polyak.algorithm import Algorithm
from polyak.averaging.habits import ARGUMENTS_OF_ATTACH, explained
from polyak.hosts.lightning.strategies import refuse_foreign
from polyak.time import Time
from polyak.training.attached import Attached
from polyak.training.options import LoopOptions


class _Logger:
    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._fabric.log_dict(metrics, step=step)


@explained("attach(EMA(decay=0.999), fabric, model, optimizer)", ARGUMENTS_OF_ATTACH)
def attach(
    algorithms: Algorithm | Sequence[Algorithm],
    fabric: Fabric,
    model: nn.Module,
    optimizer: Optimizer | None,
    *,
    max_duration: Time | str | int | None = None,
    steps_per_epoch: int | Literal["by hand"] | None = None,
    samples_per_step: int = 0,
    tokens_per_step: int = 0,
) -> Attached:
    """Let algorithms follow a loop in Fabric; they log through its loggers.

    Put what this returns into the state that ``fabric.save`` saves, after the model. Evaluate under its ``applied()``,
    and export the model there.

    Args:
        algorithms: ``EMA``, ``Recorder`` or others, one or several.
        fabric: The ``Fabric`` object that set up the model.
        model: As ``fabric.setup`` returned it, or, on one device, as it was before.
        optimizer: As ``fabric.setup`` returned it, or as it was before; of several, the one that steps last in a batch.
            None if you call ``step`` of what this returns, once after each batch.
        max_duration: The length of the run, for times in ``dur`` and for warnings about the plan.
        steps_per_epoch: Optimizer steps in an epoch, for times in ``ep``; or ``"by hand"`` if you call ``end_epoch``.
        samples_per_step: Samples in a step, of all processes, for times in ``sp``.
        tokens_per_step: Tokens in a step, of all processes, for times in ``tok``.

    Raises:
        NotImplementedError: Under DeepSpeed, FSDP and ``ModelParallelStrategy``.
        TimeError: If ``max_duration`` is not a time.
        CallError: If an argument is missing, or there is none of that name.
        ArgumentError: If more than one of the algorithms swaps an average in.
    """
    refuse_foreign(fabric.strategy)
    if type(fabric.strategy).__name__ == "ModelParallelStrategy":
        raise NotImplementedError(
            "Fabric saves the state of the average on rank 0 alone, and under ModelParallelStrategy each rank has a "
            "shard of it; use polyak.attach and torch.distributed.checkpoint, or DDP, or one device"
        )
    # Not its public `module`, which is inside of DDP.
    inner: Any = model._forward_module if is_wrapped(model) else model  # noqa: SLF001
    options = LoopOptions(max_duration, steps_per_epoch, samples_per_step, tokens_per_step, _Logger(fabric))
    return Attached(algorithms, inner, optimizer, options)

"""``attach`` for loops with Megatron-core: it averages the float32 masters that Megatron's optimizer steps."""

from collections.abc import Sequence
from typing import Any, Literal

from polyak.algorithm import Algorithm, MetricLogger
from polyak.averaging.habits import ARGUMENTS_OF_ATTACH, explained
from polyak.engines.megatron_loop import MegatronAttached
from polyak.time import Time
from polyak.training.options import LoopOptions


@explained("attach(EMA(decay=0.999), model, optimizer)", ARGUMENTS_OF_ATTACH)
def attach(
    algorithms: Algorithm | Sequence[Algorithm],
    model: Any,
    optimizer: Any,
    *,
    max_duration: Time | str | int | None = None,
    steps_per_epoch: int | Literal["by hand"] | None = None,
    samples_per_step: int = 0,
    tokens_per_step: int = 0,
    logger: MetricLogger | None = None,
) -> MegatronAttached:
    """Let an average follow Megatron's optimizer, under tensor, pipeline, expert and data parallelism.

    A call of ``optimizer.step()`` that moved weights is one step: steps that an overflow skipped do not count. Each
    rank averages its own part of the masters, without communication. Evaluate under ``applied()``; a backward
    pass, a step, or a checkpoint of the optimizer is refused there. ``sharded_state_dict()`` is saved and loaded by
    ``megatron.core.dist_checkpointing`` with the model's and the optimizer's. All ranks must call this.

    Args:
        algorithms: An ``EMA``.
        model: A chunk of the model, or the list of chunks of this rank, each in Megatron's
            ``DistributedDataParallel``.
        optimizer: As ``get_megatron_optimizer`` returned it.
        max_duration: The length of the run, for times in ``dur``.
        steps_per_epoch: Optimizer steps in an epoch, for times in ``ep``; or ``"by hand"`` if you call ``end_epoch``.
        samples_per_step: Samples in a step, of all ranks, for times in ``sp``.
        tokens_per_step: Tokens in a step, of all ranks, for times in ``tok``.
        logger: Where the metrics go.

    Raises:
        ArgumentError: If model and optimizer are none of Megatron's, or there is another algorithm than an ``EMA``.
        OptimizerError: If the masters cannot be averaged: with Megatron-FSDP, the precision-aware optimizer,
            ``optimizer_cpu_offload``, parameters in fp8 or fp4, or another kind of optimizer.
        ShardingError: If another rank refuses.
        TimeError: If a time is in a unit that is not counted.
    """
    options = LoopOptions(max_duration, steps_per_epoch, samples_per_step, tokens_per_step, logger)
    return MegatronAttached(algorithms, model, optimizer, options)

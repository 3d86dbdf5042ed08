"""``attach`` for loops with DeepSpeed's engine: it averages the float32 masters that the engine's optimizer steps."""

from collections.abc import Sequence
from typing import Any, Literal

from polyak.algorithm import Algorithm, MetricLogger
from polyak.averaging.habits import ARGUMENTS_OF_ATTACH, explained
from polyak.engines.deepspeed_loop import DeepSpeedAttached
from polyak.time import Time
from polyak.training.options import LoopOptions


@explained("attach(EMA(decay=0.999), engine)", ARGUMENTS_OF_ATTACH)
def attach(
    algorithms: Algorithm | Sequence[Algorithm],
    engine: Any,
    *,
    max_duration: Time | str | int | None = None,
    steps_per_epoch: int | Literal["by hand"] | None = None,
    samples_per_step: int | None = None,
    tokens_per_step: int = 0,
    logger: MetricLogger | None = None,
) -> DeepSpeedAttached:
    """Let an average follow DeepSpeed's engine, under ZeRO stage 0 to 3, with or without offload to the CPU.

    A call of ``engine.step()`` that moved weights is one step: calls that only accumulate gradients, and steps that
    fp16 skipped, do not count. Each rank averages its own part of the masters, without communication. Evaluate
    under ``applied()``; a backward pass, a step, or a checkpoint is refused there. ``engine.save_checkpoint`` and
    ``load_checkpoint`` save and load the average too, in the folder ``polyak`` of the checkpoint.

    Args:
        algorithms: An ``EMA``.
        engine: What ``deepspeed.initialize`` returned first.
        max_duration: The length of the run, for times in ``dur``.
        steps_per_epoch: Optimizer steps in an epoch, for times in ``ep``; or ``"by hand"`` if you call ``end_epoch``.
        samples_per_step: Samples in a step, of all ranks, for times in ``sp``; None for the engine's train batch size.
        tokens_per_step: Tokens in a step, of all ranks, for times in ``tok``.
        logger: Where the metrics go.

    Raises:
        ArgumentError: If ``engine`` is not DeepSpeed's, or there is another algorithm than an ``EMA``.
        OptimizerError: If the masters cannot be averaged: with experts, pipeline or tensor parallelism, ZenFlow,
            SuperOffload, MiCS, or masters on NVMe.
        TimeError: If a time is in a unit that is not counted.
    """
    samples = getattr(engine, "train_batch_size", lambda: 0)() if samples_per_step is None else samples_per_step
    options = LoopOptions(max_duration, steps_per_epoch, samples, tokens_per_step, logger)
    return DeepSpeedAttached(algorithms, engine, options)

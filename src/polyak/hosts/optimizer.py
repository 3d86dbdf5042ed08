"""``attach`` for training loops of your own: it counts the steps of a torch optimizer by its step hooks."""

from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

from polyak.algorithm import Algorithm, MetricLogger
from polyak.time import Time
from polyak.training.attached import Attached
from polyak.training.options import LoopOptions


def attach(
    algorithms: Algorithm | Sequence[Algorithm],
    model: nn.Module,
    optimizer: Optimizer | None,
    *,
    max_duration: Time | str | None = None,
    steps_per_epoch: int | None = None,
    samples_per_step: int = 0,
    tokens_per_step: int = 0,
    logger: MetricLogger | None = None,
) -> Attached:
    """Let algorithms follow a training loop of your own.

    One step of the optimizer is one batch. Steps that mixed precision skips, and steps without gradients, do not
    count. Give the numbers below for the units that your half-life needs; batches need none.

    Args:
        algorithms: ``EMA``, ``Recorder`` or others, one or several.
        model: The model in training. In its ``DistributedDataParallel``, or sharded by ``fully_shard`` or tensor
            parallelism, all ranks must swap the average in at the same moments, and are compared then.
        optimizer: The optimizer of its parameters; of several, the one that steps last in a batch, when all weights
            have moved; of one that wraps another, as Lookahead, the wrapper. None if no step of one optimizer is a
            batch, as where each parameter has its own that steps within the backward pass: then call ``step`` of what
            this returns, once after each batch.
        max_duration: The length of the run, for times in ``dur`` and for warnings about the plan.
        steps_per_epoch: Steps in an epoch, for times in ``ep``.
        samples_per_step: Samples in a step, for times in ``sp``.
        tokens_per_step: Tokens in a step, for times in ``tok``.
        logger: Where the algorithms log, such as ``TensorBoardLogger`` or anything with its method ``log_metrics``.

    Raises:
        TimeError: If ``max_duration`` is no time, or a time of an algorithm is in a unit that is not counted.
        ProfileError: If a profile is in a unit that is not counted.
        OptimizerError: If the optimizer does not run torch's step hooks, as a list or a custom class may not, or steps
            float32 masters instead of the model's parameters, as DeepSpeed, Megatron and apex do.
        ArgumentError: If more than one of the algorithms swaps an average in, or a number below is not one.
        NotImplementedError: If this process does not hold the model's parameters as they are (DeepSpeed's ZeRO-3,
            ``FullyShardedDataParallel``).

    Example:
        >>> import torch
        >>> from polyak import EMA, attach
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> ema = attach(EMA(half_life="10ba"), model, optimizer)
        >>> for _ in range(20):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(4, 2)).square().mean().backward()
        ...     optimizer.step()
        >>> with ema.applied():
        ...     loss = model(torch.ones(4, 2)).square().mean()
    """
    options = LoopOptions(
        max_duration=max_duration,
        steps_per_epoch=steps_per_epoch,
        samples_per_step=samples_per_step,
        tokens_per_step=tokens_per_step,
        logger=logger,
    )
    return Attached(algorithms, model, optimizer, options)

"""``attach`` for your own training loops: it counts the steps of a torch optimizer with its step hooks."""

from collections.abc import Sequence
from typing import Literal

from torch import nn
from torch.optim import Optimizer

from polyak.algorithm import Algorithm, MetricLogger
from polyak.averaging.habits import ARGUMENTS_OF_ATTACH, explained
from polyak.time import Time
from polyak.training.attached import Attached
from polyak.training.door import EXAMPLE, check_order
from polyak.training.options import LoopOptions


@explained(EXAMPLE, ARGUMENTS_OF_ATTACH)
def attach(
    algorithms: Algorithm | Sequence[Algorithm],
    model: nn.Module,
    optimizer: Optimizer | None,
    *,
    max_duration: Time | str | int | None = None,
    steps_per_epoch: int | Literal["by hand"] | None = None,
    samples_per_step: int = 0,
    tokens_per_step: int = 0,
    logger: MetricLogger | None = None,
) -> Attached:
    """Let algorithms follow your own training loop; return the handle of the average.

    One step of the optimizer is one batch. Steps that mixed precision skips, and steps without gradients, do not
    count. Give the counts for the units that your half-life needs; batches need none.

    Args:
        algorithms: ``EMA``, ``Recorder`` or others, one or several.
        model: The model in training, wrapped or sharded or not. All ranks must swap the average in at the same moments.
        optimizer: The optimizer of its parameters. If there are several, the one that steps last in a batch; if it
            wraps another, as Lookahead, the wrapper. None if no step of one optimizer is a batch, as where each
            parameter has its own that steps in the backward pass: then call ``step`` of what this returns, once after
            each batch.
        max_duration: The length of the run, in any unit or steps, for times in ``dur`` and warnings about the plan.
        steps_per_epoch: Steps in an epoch, for times in ``ep``; or ``"by hand"`` if you call ``end_epoch`` after each.
        samples_per_step: Samples in a step, for times in ``sp``.
        tokens_per_step: Tokens in a step, for times in ``tok``.
        logger: Where the algorithms log, such as ``TensorBoardLogger`` or anything with its method ``log_metrics``.

    Raises:
        TimeError: If ``max_duration`` is not a time, or a time of an algorithm is in a unit that is not counted.
        ProfileError: If a profile is in a unit that is not counted.
        OptimizerError: If the optimizer does not run torch's step hooks, as a list or a custom class may not, or steps
            float32 masters instead of the model's parameters, as DeepSpeed, Megatron and apex do.
        ArgumentError: If more than one of the algorithms swaps an average in, a count is not a whole number, or
            arguments are missing (``CallError``), unknown or in another order.
        NotImplementedError: Under DeepSpeed's ZeRO-3 and ``FullyShardedDataParallel``.

    Example:
        >>> import torch
        >>> from polyak import EMA
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> ema = attach(EMA("10 steps"), model, optimizer)
        >>> for _ in range(20):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(4, 2)).square().mean().backward()
        ...     optimizer.step()
        >>> loss = ema.model(torch.ones(4, 2)).square().mean()
        >>> ema
        <Average of Linear (3 parameters): half-life 10 steps, updated every step; 20 steps counted, 20 updates>
    """
    check_order(algorithms, model, optimizer)
    options = LoopOptions(max_duration, steps_per_epoch, samples_per_step, tokens_per_step, logger)
    return Attached(algorithms, model, optimizer, options)

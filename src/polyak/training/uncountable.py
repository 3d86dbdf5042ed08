"""``refuse_uncountable``: an error for units of time that no run of a loop counts, before there is a run."""

from collections.abc import Collection, Iterable

from torch import nn

from polyak.algorithm import Algorithm
from polyak.time import Time, Timestamp, TimeUnit
from polyak.training.state import LoopState


def refuse_uncountable(algorithms: Iterable[Algorithm], counts: Collection[TimeUnit]) -> None:
    """Refuse algorithms with times in a unit that no run of a loop counts.

    The lengths of the run and of an epoch are taken as known. ``Loop.refuse_uncounted`` asks again when a run begins.

    Args:
        algorithms: Of the loop.
        counts: The units that it counts.

    Raises:
        TimeError: If there are any.
        ProfileError: If a profile is in such a unit.
    """
    run = LoopState(nn.Module(), Timestamp(epoch_length=1), Time(1, TimeUnit.BATCH))
    for algorithm in algorithms:
        algorithm.refuse_uncounted(run, counts)

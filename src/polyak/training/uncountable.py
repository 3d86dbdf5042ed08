"""Refuses times in units that a loop does not count: before the run, and after its first batch."""

from collections.abc import Collection, Iterable

from torch import nn

from polyak.algorithm import Algorithm
from polyak.time import Time, Timestamp, TimeUnit
from polyak.training.state import LoopState


def refuse_uncountable(algorithms: Iterable[Algorithm], counts: Collection[TimeUnit]) -> None:
    """Refuse algorithms with times in a unit that no run of a loop counts.

    It assumes that the lengths of the run and of an epoch are known. ``Loop.refuse_uncounted`` checks again when a run
    begins.

    Args:
        algorithms: The algorithms of the loop.
        counts: The units that it counts.

    Raises:
        TimeError: If there are any.
        ProfileError: If a profile is in such a unit.
    """
    run = LoopState(nn.Module(), Timestamp(epoch_length=1), Time(1, TimeUnit.BATCH))
    for algorithm in algorithms:
        algorithm.refuse_uncounted(run, counts)


def refuse_unmoved(algorithms: Iterable[Algorithm], state: LoopState, counts: Collection[TimeUnit]) -> None:
    """Refuse, after the first batch, times in units that this batch did not advance.

    Args:
        algorithms: The algorithms of the loop.
        state: After the batch.
        counts: The units that the loop was said to count.

    Raises:
        TimeError: If there are any.
        ProfileError: If a profile is in such a unit.
    """
    before, now = state.previous_timestamp, state.timestamp
    missing = {unit for unit in _OF_BATCHES.intersection(counts) if now.get(unit) == before.get(unit)}
    if missing and now.batch > before.batch:
        for algorithm in algorithms:
            algorithm.refuse_uncounted(state, set(counts) - missing)


_OF_BATCHES = frozenset({TimeUnit.SAMPLE, TimeUnit.TOKEN})

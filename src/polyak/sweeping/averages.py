"""The averages that a sweep evaluates at one end moment, from few passes over the files of the record."""

import warnings
from collections.abc import Iterator, Sequence

from torch import Tensor

from polyak.errors import PlanWarning
from polyak.profiles import Profile
from polyak.record import Record

# The memory for averages that are computed together, over all ranks.
_MOST_BYTES = 4e9


class Averages:
    """Averages at the end of a record. Each pass over its files computes as many as fit into memory.

    Args:
        record: The record, up to the moment.
        processes: How many processes do so at the same time, which may be on one machine.
    """

    def __init__(self, record: Record, processes: int) -> None:
        self.record = record
        self._processes = processes
        self._computed: Iterator[dict[str, Tensor]] = iter(())

    def plan(self, profiles: Sequence[Profile]) -> None:
        """Note which averages are taken next.

        Args:
            profiles: The profiles, in the order in which they are taken.
        """
        self._computed = self.record.averages(profiles, max_bytes=_MOST_BYTES / self._processes)

    def take(self, profile: Profile) -> tuple[dict[str, Tensor], float]:
        """Return an average and its error, without a warning about the error: every result has it.

        Args:
            profile: The next of the planned ones.

        Raises:
            RecordError: If a file is missing, truncated or corrupt.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PlanWarning)
            return next(self._computed), self.record.error(profile)

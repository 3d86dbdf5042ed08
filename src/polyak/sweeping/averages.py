"""The averages that a sweep evaluates at one end moment, from few passes over the files of the record."""

import warnings
from collections.abc import Iterator, Sequence

from torch import Tensor

from polyak.errors import PlanWarning
from polyak.profiles import Profile
from polyak.record import Record


class Averages:
    """Averages at the end of a record. Each pass over its files computes as many as fit into memory.

    Args:
        record: The record, up to the moment.
        profiles: Those that follow, in this order. Some may be left out.
    """

    def __init__(self, record: Record, profiles: Sequence[Profile]) -> None:
        self.record = record
        self._ahead = list(profiles)
        self._computed: Iterator[dict[str, Tensor]] | None = None

    def take(self, profile: Profile) -> tuple[dict[str, Tensor], float]:
        """Return an average and its error, without a warning of the error: every result has it.

        Args:
            profile: The next of the profiles, or another one, which takes a pass of its own.

        Raises:
            RecordError: If a file is missing, truncated or corrupt.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PlanWarning)
            return self._average(profile), self.record.error(profile)

    def _average(self, profile: Profile) -> dict[str, Tensor]:
        if not any(one is profile for one in self._ahead):
            return self.record.average(profile)
        if self._computed is None:
            self._computed = self.record.averages(self._ahead)
        while self._ahead.pop(0) is not profile:
            next(self._computed)
        return next(self._computed)

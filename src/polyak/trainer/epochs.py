"""The batches of an epoch, from wherever in it the run stands."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from polyak.errors import CheckpointError, PlanWarning
from polyak.events import Event
from polyak.trainer import batches, parallel
from polyak.trainer.parallel import Group
from polyak.trainer.state import TrainerState
from polyak.training import rng

_END = object()


class Epochs:
    """Draws the batches of one epoch after the other.

    Args:
        loader: Of training, or None for now.
        state: For the clock.
        stream: What the loader draws from.
        group: Who trains together.
        fire: Called with the events around the loader.

    Attributes:
        loader: As given.
        own_batches: Whether each rank draws batches of its own.
        completed: Batches of this epoch that are trained on, with those whose step mixed precision skipped.
        epoch_rng: The states of the generators where this epoch began.
    """

    def __init__(
        self,
        loader: Iterable[Any] | None,
        state: TrainerState,
        stream: rng.Stream,
        group: Group,
        fire: Callable[[Event], None],
    ) -> None:
        self.loader = loader
        self.own_batches = parallel.divides_itself(loader)
        self.completed = 0
        self.epoch_rng: dict[str, Any] | None = None
        self._state = state
        self._stream = stream
        self._group = group
        self._fire = fire

    def use(self, loader: Iterable[Any]) -> None:
        """Begin a new epoch of another loader.

        Args:
            loader: Of training.
        """
        self.loader = loader
        self.own_batches = parallel.divides_itself(loader)
        self.completed = 0

    def rest(self) -> Iterator[Any]:
        """Yield the batches of this epoch that are not completed yet, in the order in which they would have come.

        Raises:
            CheckpointError: If the data are not those that the checkpoint was saved with.
            ValueError: If there are no batches.
        """
        # Before the loader's iterator is made: what is drawn at this event must not change the order of the epoch.
        self._fire(Event.BEFORE_DATALOADER)
        skip, now = self.completed, self._stream.get_state()
        self._set_epoch()
        if skip:
            # The order and the random transforms of an epoch follow from the generators' states at its beginning.
            assert self.epoch_rng is not None
            self._stream.set_state(self.epoch_rng)
        else:
            self.epoch_rng = now
        iterator = self._skip(skip)
        if skip:
            self._stream.set_state(now)
        empty = skip == 0
        while True:
            with self._stream.drawn():
                batch = next(iterator, _END)
            if batch is _END:
                break
            if empty:
                self._compare(batch)
            empty = False
            yield batch
            self._fire(Event.BEFORE_DATALOADER)
        if empty:
            raise ValueError("train_dataloader must give at least one batch an epoch (it gave none)")

    def _set_epoch(self) -> None:
        loader = self.loader
        for sampler in (getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
            for one in (sampler, getattr(sampler, "sampler", None)):
                if hasattr(one, "set_epoch"):
                    one.set_epoch(self._state.timestamp.epoch.value)

    def _skip(self, number: int) -> Iterator[Any]:
        """Return the loader's iterator after a number of batches."""
        assert self.loader is not None
        with self._stream.drawn():
            iterator = iter(self.loader)
        for drawn in range(number):
            with self._stream.drawn():
                if next(iterator, _END) is _END:
                    raise CheckpointError(
                        f"the data must be those of the checkpoint, which was saved after {number} batches of an epoch "
                        f"(got a train_dataloader that gives {drawn})"
                    )
        return iterator

    def _compare(self, batch: Any) -> None:
        """Warn if the ranks, which must draw the same batches, do not."""
        if self._group.size > 1 and not self.own_batches:
            sums = self._group.ranks.gather(batches.checksum(batch))
            if len(set(sums)) > 1:
                warnings.warn(
                    "all ranks must draw the same batches, of which each takes its part, and the first of this epoch "
                    f"differs (checksums by rank: {sums}): if the order does, samples are left out; seed it alike on "
                    "all ranks, or give the loader a DistributedSampler",
                    PlanWarning,
                    stacklevel=2,
                )


def length_of(loader: Any) -> int | None:
    """Return the number of batches in an epoch, if the loader knows it.

    Args:
        loader: Any.
    """
    try:
        return len(loader)
    except TypeError:
        return None

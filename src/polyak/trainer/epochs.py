"""``Epochs``: draws the batches of each epoch, from the current batch of the run on."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from polyak.errors import CheckpointError, PlanWarning
from polyak.events import Event
from polyak.trainer import batches
from polyak.trainer.wrapping import divides_itself
from polyak.training import rng

if TYPE_CHECKING:
    from polyak.trainer.context import Context

_END = object()


class Epochs:
    """Draws the batches of one epoch after another.

    Args:
        context: The context of the trainer.
        loader: The data to train on; None if ``fit`` will get it.
        num_samples: Function of a batch: how many samples it has.

    Attributes:
        loader: The data to train on, if it is known.
        own_batches: Whether each rank draws its own batches.
        completed: How many batches of this epoch have been trained on, skipped steps included.
        epoch_rng: The states of the generators at the start of this epoch.
    """

    def __init__(
        self, context: "Context", loader: Iterable[Any] | None, num_samples: Callable[[Any], int] = batches.num_samples
    ) -> None:
        self.loader = loader
        self.own_batches = divides_itself(loader)
        self.completed = 0
        self.epoch_rng: dict[str, Any] | None = None
        self._num_samples = num_samples
        self._state = context.state
        self._loop = context.loop
        self._stream = context.stream
        self._group = context.group

    def use(self, loader: Iterable[Any]) -> None:
        """Train on another loader from now on, in a new epoch.

        Args:
            loader: Checked.
        """
        if self.completed:
            self._loop.count_epoch()
        self.loader = self._state.train_dataloader = loader
        self.own_batches = divides_itself(loader)
        self.completed = 0
        self._stream.generators = rng.generators_of(loader)
        self._state.set_epoch_length(length_of(loader))

    def remaining(self) -> Iterator[Any]:
        """Yield the batches of this epoch that are not completed, in the loader's order.

        Raises:
            CheckpointError: If the data are not those that the checkpoint was saved with.
            ValueError: If there are no batches.
        """
        # Fire this before the iterator is made: numbers drawn at this event must not change the order of the epoch.
        self._loop.fire(Event.BEFORE_DATALOADER)
        skip, now = self.completed, self._stream.get_state()
        self._set_epoch()
        if skip:
            # The generators' states at the start of an epoch determine its order and its random transforms.
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
            self._loop.fire(Event.BEFORE_DATALOADER)
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
        samples = 0
        for drawn in range(number):
            with self._stream.drawn():
                batch = next(iterator, _END)
            if batch is _END:
                raise CheckpointError(
                    f"the data must be those of the checkpoint, which was saved after {number} batches of an epoch "
                    f"(got a train_dataloader that gives {drawn})"
                )
            samples += int(self._num_samples(batch))
        self._check_samples(number, samples)
        return iterator

    def _check_samples(self, number: int, samples: int) -> None:
        """Check that the batches that were skipped have as many samples as those that were trained on."""
        trained = self._state.timestamp.sample_in_epoch.value
        if number and samples != trained and not (self.own_batches and self._group.size > 1):
            raise CheckpointError(
                f"the batches must be those of the checkpoint, which was saved after {trained} samples in {number} "
                f"batches of an epoch (got {samples} samples in as many); use the same batch size, or load a "
                "checkpoint from the end of an epoch"
            )

    def _compare(self, batch: Any) -> None:
        """Warn if ranks that must draw the same batches do not."""
        if self._group.size > 1 and not self.own_batches:
            sums = self._group.ranks.gather(batches.checksum(batch))
            if len(set(sums)) > 1:
                warnings.warn(
                    "all ranks must draw the same batches, of which each trains on its share (got checksums "
                    f"{sums} by rank for the first batch of this epoch); seed the loader the same on all ranks, or "
                    "give it a DistributedSampler: samples are left out where the order differs",
                    PlanWarning,
                    stacklevel=2,
                )


def length_of(loader: Any) -> int | None:
    """Return the number of batches in an epoch; None if the loader does not know it.

    Args:
        loader: Any iterable.
    """
    try:
        return len(loader)
    except TypeError:
        return None

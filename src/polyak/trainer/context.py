"""``Context``: the objects that all parts of a trainer share."""

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from polyak.time import Timestamp
from polyak.trainer import parallel, wrapping
from polyak.trainer.epochs import length_of
from polyak.trainer.forward import Forward
from polyak.trainer.loggers import Logger
from polyak.trainer.parallel import Group
from polyak.trainer.state import TrainerState
from polyak.training import rng
from polyak.training.loop import Loop

if TYPE_CHECKING:
    from polyak.trainer.options import Checked


@dataclass(frozen=True)
class Context:
    """The objects that all parts of a trainer share.

    Args:
        group: The processes that train together.
        state: What algorithms and callbacks see.
        loop: Fires the events, counts on the clock, and has the algorithms.
        logger: Where algorithms and callbacks log.
        forward: Runs the model.
        stream: The random numbers that the data loader draws.
    """

    group: Group
    state: TrainerState
    loop: Loop
    logger: Logger
    forward: Forward
    stream: rng.Stream

    @classmethod
    def of(cls, checked: "Checked") -> "Context":
        """Return the context of a new trainer, with the model on its device, wrapped or sharded.

        Args:
            checked: The arguments of the trainer.

        Raises:
            ShardingError: If the ranks were given different arguments.
        """
        given, workers = checked.given, checked.workers
        if given.deterministic_mode:
            rng.use_deterministic_algorithms()
        if given.seed is not None:
            rng.seed_all(given.seed)
        group = parallel.start(given.parallelism, given.model, given.device)
        model = wrapping.wrapped(given.model, group, workers.optimizers)
        run_name, seed = group.ranks.from_rank_0((checked.run_name, torch.initial_seed()))
        loggers = workers.loggers if group.rank == 0 else []
        state = TrainerState(
            model,
            Timestamp(epoch_length=length_of(given.train_dataloader)),
            checked.max_duration,
            optimizers=workers.optimizers,
            schedulers=workers.schedulers,
            algorithms=workers.algorithms,
            callbacks=[*workers.callbacks, *checked.savers(run_name), *loggers],
            train_dataloader=given.train_dataloader,
            counted=checked.counted,
            rank=group.rank,
            run_name=run_name,
            seed=seed,
        )
        logger = Logger(state, loggers)
        loop = Loop(state.algorithms, state, logger, callbacks=state.callbacks, counts=state.counted)
        forward = Forward(state, given.loss, given.precision, group.device)
        context = cls(group, state, loop, logger, forward, rng.Stream(given.train_dataloader))
        if group.size > 1:
            context._agree()
            context._separate_random_numbers()
        return context

    def reseed(self) -> None:
        """Seed the global generators of this rank, by the seed of the run, the rank and the number of the batch."""
        text = f"{self.state.seed} {self.group.rank} {self.state.timestamp.batch.value}"
        rng.seed_all(zlib.crc32(text.encode()))

    def _agree(self) -> None:
        self.group.ranks.agree(
            "the run",
            {
                "max_duration": str(self.state.max_duration),
                "batches in an epoch": self.state.timestamp.epoch_length,
                "number of optimizers": len(self.state.optimizers),
                "number of algorithms": len(self.state.algorithms),
                "each rank has its own batches, by DistributedSampler": self._own_batches,
            },
        )

    def _separate_random_numbers(self) -> None:
        """Let all ranks draw the same order of the data, and different numbers in the model."""
        shared = self.group.ranks.from_rank_0(self.stream.get_state())
        if not self._own_batches:
            self.stream.separate(shared)
        self.reseed()

    @property
    def _own_batches(self) -> bool:
        return wrapping.divides_itself(self.state.train_dataloader)

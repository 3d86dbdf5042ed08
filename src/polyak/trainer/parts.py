"""The parts of a trainer, put together."""

import zlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from polyak.errors import ArgumentError
from polyak.events import Event
from polyak.time import Timestamp
from polyak.trainer import checkpoint, parallel
from polyak.trainer.checkpoint import CheckpointSaver
from polyak.trainer.engine import Engine
from polyak.trainer.epochs import Epochs, length_of
from polyak.trainer.evaluation import Evaluation
from polyak.trainer.fitting import Fitting
from polyak.trainer.forward import Forward
from polyak.trainer.loggers import Logger
from polyak.trainer.metrics import Metrics
from polyak.trainer.options import Checked, Options
from polyak.trainer.saving import Checkpoints
from polyak.trainer.state import TrainerState
from polyak.trainer.step import Step
from polyak.trainer.traininglog import TrainingLog
from polyak.training import rng


class Parts:
    """What a trainer consists of: the ranks, the state, and what works on it.

    Args:
        options: As given to the trainer.
        checked: What was made of them.

    Attributes:
        group: Who trains together.
        state: What algorithms and callbacks see.
        logger: Where they log.
        engine: Fires the events.
        forward: Runs the model.
        stream: What the data loader draws from.
        epochs: Gives the batches.
        step: Trains on one.
        evaluation: Evaluates.
        fitting: The loop.
        checkpoints: Saves and loads.
    """

    def __init__(self, options: Options, checked: Checked) -> None:
        workers, data = checked.workers, options.train_dataloader
        self.group = parallel.start(options.parallelism, options.model, options.device)
        if parallel.kind_of(options.model) is None:
            options.model.to(self.group.device)
        model = parallel.spread(options.model, self.group, workers.optimizers)
        self._seed = torch.initial_seed()
        name = self.group.ranks.from_rank_0(checked.run_name)
        callbacks = [*workers.callbacks, *checked.savers(name)]
        loggers = workers.loggers if self.group.rank == 0 else []
        self.stream = rng.Stream(data)
        self.state = TrainerState(
            model,
            checked.max_duration,
            workers.optimizers,
            workers.schedulers,
            workers.algorithms,
            self.save,
            callbacks=[*callbacks, *loggers],
            timestamp=Timestamp(epoch_length=length_of(data)),
            train_dataloader=data,
            rank=self.group.rank,
            counted=checked.counted,
            run_name=name,
            seed=self._seed,
        )
        self.logger = Logger(self.state, loggers)
        self.engine = Engine(self.state, self.logger)
        fire = self.engine.fire
        self.forward = Forward(self.state, options.loss, options.precision, self.group.device)
        self.epochs = Epochs(data, self.state, self.stream, self.group, fire)
        training = Metrics(checked.train_metrics, self.group)
        self.step = Step(
            self.state,
            self.forward,
            self.group,
            fire,
            metrics=training,
            precision=options.precision,
            grad_accum=options.grad_accum,
            epochs=self.epochs,
            num_samples=options.num_samples,
            schedule_batches=options.step_schedulers_every_batch,
        )
        self.evaluation = Evaluation(
            self.engine,
            self.state,
            self.forward,
            self.group,
            self.logger,
            evaluators=checked.evaluators,
            metrics=Metrics(checked.eval_metrics, self.group),
            count=options.num_samples,
            due=checked.eval_due,
            both=options.eval_weights == "both",
        )
        self.fitting = Fitting(
            self.engine,
            self.state,
            epochs=self.epochs,
            stream=self.stream,
            step=self.step,
            evaluation=self.evaluation,
            log=TrainingLog(self.state, self.logger, checked.log_due, training),
            group=self.group,
            num_samples=options.num_samples,
            num_tokens=options.num_tokens,
        )
        self.checkpoints = Checkpoints(
            self.state,
            fire,
            self.group,
            stream=self.stream,
            epochs=self.epochs,
            step=self.step,
            evaluation=self.evaluation,
            draw_anew=self._draw_anew,
        )
        if self.group.size > 1:
            self._agree()
            self._part_random_numbers()

    def save(self, path: str | Path) -> None:
        """Write a checkpoint.

        Args:
            path: Where.
        """
        self.checkpoints.save(path)

    def use_data(self, train_dataloader: Iterable[Any]) -> None:
        """Train on other data from now on; this begins a new epoch.

        Args:
            train_dataloader: Checked.
        """
        if self.epochs.completed:
            self.state.timestamp = self.state.timestamp.to_next_epoch()
        self.stream.generators = rng.generators_of(train_dataloader)
        self.epochs.use(train_dataloader)
        self.state.train_dataloader = train_dataloader
        self.state.timestamp = replace(self.state.timestamp, epoch_length=length_of(train_dataloader))

    def reset_time(self) -> None:
        """Set the clock back to the start."""
        length = self.state.timestamp.epoch_length
        self.state.timestamp = self.state.previous_timestamp = Timestamp(epoch_length=length)
        self.epochs.completed = 0
        self.evaluation.evaluated_at = {}

    def begin(self, options: Options) -> None:
        """Let the algorithms meet the model, and load what there is to resume from.

        Args:
            options: As given to the trainer.
        """
        for algorithm in self.state.algorithms:
            algorithm.refuse_uncounted(self.state, self.state.counted)
        self.engine.fire(Event.INIT)
        self.state.sharded = self._is_sharded()
        found: list[Path] = self.group.ranks.from_rank_0(self._saved_checkpoints() if options.autoresume else [])
        self.state.found_no_checkpoint = options.autoresume and not found and options.load_path is None
        self.engine.fire(Event.BEFORE_LOAD)
        if found:
            self.checkpoints.load(*checkpoint.read_newest(found, self.group))
        elif options.load_path is not None:
            path = Path(options.load_path)
            load = self.checkpoints.load_weights if options.load_weights_only else self.checkpoints.load
            load(path, checkpoint.read(path, self.group), options.load_ignore_keys)
        self.engine.fire(Event.AFTER_LOAD)

    def _saved_checkpoints(self) -> list[Path]:
        for callback in self.state.callbacks:
            if isinstance(callback, CheckpointSaver):
                return callback.newest_first()
        raise ArgumentError(
            "autoresume needs save_folder, or a CheckpointSaver among the callbacks, to know where to look"
        )

    def _agree(self) -> None:
        self.group.ranks.agree(
            "the run",
            {
                "max_duration": str(self.state.max_duration),
                "batches in an epoch": self.state.timestamp.epoch_length,
                "number of optimizers": len(self.state.optimizers),
                "number of algorithms": len(self.state.algorithms),
                "batches of its own by DistributedSampler": self.epochs.own_batches,
            },
        )

    def _part_random_numbers(self) -> None:
        """Let all ranks draw one order of the data, and each other numbers in the model."""
        self._seed = self.group.ranks.from_rank_0(self._seed)
        shared = self.group.ranks.from_rank_0(self.stream.get_state())
        if not self.epochs.own_batches:
            self.stream.set_apart(shared)
        self._draw_anew()

    def _draw_anew(self) -> None:
        where = f"{self._seed} {self.group.rank} {self.state.timestamp.batch.value}"
        rng.seed_all(zlib.crc32(where.encode()))

    def _is_sharded(self) -> bool:
        if self.group.kind is None:
            return False
        return self.group.kind == "fsdp2" or any(
            checkpoint.has_shards(one.state_dict()) for one in self.state.algorithms
        )

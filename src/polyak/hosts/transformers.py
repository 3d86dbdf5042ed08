"""``attach`` for the ``Trainer`` of Hugging Face Transformers: it translates the trainer's hooks to events."""

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import SAFE_WEIGHTS_NAME

from polyak.algorithm import Algorithm, as_algorithms
from polyak.averaging.swap import swap_of
from polyak.engines.deepspeed import masters_of
from polyak.engines.deepspeed_loop import folder_of, load_average, surround
from polyak.engines.export import save_average
from polyak.engines.handle import MastersHandle, check_averages
from polyak.engines.hooks import Methods
from polyak.engines.masters import Masters
from polyak.errors import ArgumentError, MismatchError, PlanWarning
from polyak.events import Event
from polyak.tensors.slots import unwrap
from polyak.time import Time, TimeUnit
from polyak.training import rng, sharded
from polyak.training.evalweights import EvalWeights, eval_weights_of, refuse_raw_of_averaged
from polyak.training.handle import Handle
from polyak.training.loop import Loop
from polyak.training.state import LoopState
from polyak.training.steps import StepHooks
from polyak.training.uncountable import refuse_uncountable

STATE_NAME = "polyak.pt"
SHARDS_NAME = "polyak"  # a folder, where the state is sharded over ranks

_Algorithms = Algorithm | Sequence[Algorithm]


class _Logger:
    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        del step  # the trainer adds its own
        self._trainer.log(dict(metrics))


class Attached(Handle, TrainerCallback):
    """Algorithms that run in a ``Trainer``, and the handle of their average; ``attach`` makes it.

    ``model`` is the averaged module, ``applied()`` swaps the average into the trainer's model for a block, ``save``
    writes the averaged weights. They need a trainer that has begun to train.

    Args:
        make: Returns the algorithms for a model that is to be trained.
        trainer: As given to ``attach``.
        eval_weights: As given to ``attach``.

    Attributes:
        algorithms: At work on the model that was trained last; none before ``train`` if a function makes them.
    """

    _saved_as = STATE_NAME

    def __init__(self, make: Callable[[], Sequence[Algorithm]], trainer: Trainer, eval_weights: EvalWeights) -> None:
        self.algorithms: Sequence[Algorithm] = []
        self._make = make
        self._trainer: Any = trainer
        self._eval_weights = eval_weights
        self._loop: Loop | None = None
        self._hooks: StepHooks | None = None
        self._resuming: Path | None = None
        self._samples = self._tokens_before = 0
        self._swapping = False
        for name in ("train", "training_step", "evaluation_loop", "save_model"):
            setattr(trainer, name, functools.partial(getattr(self, f"_{name}"), getattr(trainer, name)))
        trainer.add_callback(self)

    def _follows(self) -> Loop | None:
        return self._loop

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the algorithms and the clock, which the trainer's checkpoints keep in ``polyak.pt``.

        Raises:
            LoanError: If the trainer has not begun to train.
        """
        self._met()
        assert self._loop is not None
        return self._loop.state_dict()

    # The trainer's public methods, wrapped: it has no event on an exception, nor around ``save_model``.

    def _train(self, train: Callable[..., Any], resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        _check(self._trainer)
        found = resume_from_checkpoint
        if found is True:
            found = get_last_checkpoint(self._trainer.args.output_dir)
        self._resuming = Path(found) if found else None
        try:
            return train(resume_from_checkpoint, *args, **kwargs)
        except BaseException:
            if self._loop:
                self._loop.fire(Event.EXCEPTION)
            raise
        finally:
            if self._hooks:
                self._hooks.remove()

    def _training_step(self, step: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self._samples += (find_batch_size(inputs) or 0) * self._trainer.args.world_size
        return step(model, inputs, *args, **kwargs)

    def _evaluation_loop(
        self, run: Callable[..., Any], dataloader: Any, description: str, *args: Any, **kwargs: Any
    ) -> Any:
        if description == "Prediction":
            with self._swapped(Event.PREDICT_START, Event.PREDICT_END):
                return run(dataloader, description, *args, **kwargs)
        if callable(evaluating := getattr(self._trainer.optimizer, "eval", None)):
            evaluating()  # first: inside, the trainer would let a schedule-free optimizer change the average
        raw: dict[str, float] = {}
        if self._eval_weights == "both":
            if self._loop is not None:
                refuse_raw_of_averaged(self._loop.state.model)
            prefix = kwargs.get("metric_key_prefix", "eval")
            with rng.preserved():
                raw = run(dataloader, description, *args, **kwargs | {"metric_key_prefix": f"{prefix}_raw"}).metrics
        with nullcontext() if self._eval_weights == "raw" else self._swapped(Event.EVAL_START, Event.EVAL_END):
            output = run(dataloader, description, *args, **kwargs)
        output.metrics.update(raw)
        return output

    def _save_model(
        self, save: Callable[..., Any], output_dir: str | None = None, _internal_call: bool = False
    ) -> None:
        folder = Path(output_dir or self._trainer.args.output_dir)
        # Checkpoints get the training weights next to the averaged ones; a model that is exported does not.
        loop = self._loop if _internal_call and output_dir else None
        if loop and sharded.is_sharded(loop):
            # Under FSDP the trainer itself saves the training weights.
            sharded.save(loop, folder / SHARDS_NAME, weights=not self._trainer.is_fsdp_enabled)
            loop = None
        with self._swapped(Event.SAVE_START, Event.SAVE_END, folder):
            if loop and self._trainer.args.should_save:
                folder.mkdir(parents=True, exist_ok=True)
                # While the average is swapped in, the states of the algorithms have the training weights.
                torch.save(loop.state_dict(), folder / STATE_NAME)
            save(output_dir, _internal_call=_internal_call)

    @contextmanager
    def _swapped(self, start: Event, end: Event, saving_to: Path | None = None) -> Iterator[None]:
        if self._loop is None or self._swapping:
            # There is no average yet; or this is an evaluation or a save inside another, with the same weights.
            yield
            return
        self._swapping, self._loop.state.saving_to = True, saving_to
        try:
            with self._loop.between(start, end):
                yield
        finally:
            self._swapping, self._loop.state.saving_to = False, None

    # The trainer's events

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin, or resume from the checkpoint whose averaged weights the trainer has loaded."""
        model = self._trained()
        if self._loop is None or unwrap(self._loop.state.model) is not unwrap(model):
            self.algorithms = self._make()
            self._loop = Loop(self.algorithms, LoopState(model), _Logger(self._trainer), counts=_counts(args))
            self._loop.meet()
        loop = self._loop
        loop.state.model = model  # each `train` wraps it again
        loop.leave_epoch()
        if args.max_steps > 0:
            loop.state.max_duration = Time(args.max_steps, TimeUnit.BATCH)
        else:
            loop.state.max_duration = Time(args.num_train_epochs, TimeUnit.EPOCH)
        loop.state.set_epoch_length(_steps_per_epoch(self._trainer, kwargs["train_dataloader"]))
        self._load(self._resuming, state)
        self._samples, self._tokens_before = 0, state.num_input_tokens_seen
        self._count(loop, kwargs["optimizer"])
        loop.fire(Event.FIT_START)

    def _trained(self) -> nn.Module:
        """Return the model that the algorithms follow."""
        return self._trainer.model_wrapped

    def _count(self, loop: Loop, optimizer: Optimizer) -> None:
        if self._hooks:
            self._hooks.remove()
        self._hooks = loop.count(optimizer, self._end_batch)

    def _load(self, checkpoint: Path | None, state: Any) -> None:
        if checkpoint is None or self._loop is None or self._loads(self._loop, checkpoint):
            return
        warnings.warn(
            f"{checkpoint} has no {self._saved_as}, so it was saved without polyak: averaging begins with its weights",
            PlanWarning,
            stacklevel=2,
        )
        for time in (Time(state.global_step, TimeUnit.BATCH), Time(int(state.epoch or 0), TimeUnit.EPOCH)):
            self._loop.state.timestamp = self._loop.state.timestamp.with_counter(time)

    def _loads(self, loop: Loop, checkpoint: Path) -> bool:
        """Resume from a checkpoint; return whether it has an average."""
        path = checkpoint / STATE_NAME
        if (checkpoint / SHARDS_NAME).exists():
            sharded.load(loop, checkpoint / SHARDS_NAME, weights=not self._trainer.is_fsdp_enabled)
            return True
        if path.exists():
            loop.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return path.exists()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Fire ``EPOCH_START``."""
        self._fire(Event.EPOCH_START)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Fire ``BATCH_START``."""
        self._fire(Event.BATCH_START)

    def _end_batch(self) -> None:
        assert self._loop is not None
        tokens = self._trainer.state.num_input_tokens_seen
        self._loop.end_batch(samples=self._samples, tokens=tokens - self._tokens_before)
        self._samples, self._tokens_before = 0, tokens
        # Not in on_epoch_end, since the checkpoint of this step is resumed in the next epoch.
        self._loop.end_full_epoch()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End an epoch in which steps were skipped, or whose length was not known."""
        # Called also where the run stops inside an epoch, which then has not ended.
        ended = not control.should_training_stop or float(state.epoch).is_integer()
        if self._loop and self._loop.state.timestamp.in_epoch and ended:
            self._loop.end_epoch()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End. If the best checkpoint was loaded, load its training weights and its average."""
        self._fire(Event.FIT_END)
        if args.load_best_model_at_end and state.best_model_checkpoint:
            self._load(Path(state.best_model_checkpoint), state)

    def _fire(self, event: Event) -> None:
        assert self._loop is not None
        self._loop.fire(event)


class DeepSpeedAttached(MastersHandle, Attached):
    """The same under DeepSpeed, where the engine's float32 masters are averaged.

    The engine's own checkpoints have training weights, and the average. Evaluations and exports have the average.

    Args:
        make: Returns the algorithms for an engine that is to be trained.
        trainer: As given to ``attach``.
        eval_weights: As given to ``attach``.
    """

    _saved_as = "global_step*/polyak"

    def __init__(self, make: Callable[[], Sequence[Algorithm]], trainer: Trainer, eval_weights: EvalWeights) -> None:
        self._engine: Any = None
        self._methods: Methods | None = None
        self._of_engine: Masters | None = None
        super().__init__(make, trainer, eval_weights)

    def state_dict(self) -> dict[str, Any]:
        """Return the state with the parts of this rank, for ``torch.distributed.checkpoint``. All ranks must call this.

        Raises:
            LoanError: If the trainer has not begun to train, or the average is swapped in.
        """
        return self._in_fragments(super().state_dict)

    def _trained(self) -> nn.Module:
        engine = self._trainer.model_wrapped
        if engine is not self._engine or self._of_engine is None:
            self._engine, self._of_engine = engine, masters_of(engine)
        return self._of_engine

    def _count(self, loop: Loop, optimizer: Optimizer) -> None:
        del optimizer  # the engine steps it, in the backward pass of the last batch
        if self._methods:
            self._methods.remove()
        self._methods = surround(self._engine, self._masters, loop)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the step, if the engine has moved weights: only now are the batch's tokens counted."""
        if self._engine.was_step_applied():
            self._end_batch()

    def _loads(self, loop: Loop, checkpoint: Path) -> bool:
        return load_average(loop, self._masters, folder_of(checkpoint))

    @contextmanager
    def _swapped(self, start: Event, end: Event, saving_to: Path | None = None) -> Iterator[None]:
        if self._of_engine is not None and not swap_of(self._of_engine):
            self._of_engine.follow()
        with super()._swapped(start, end, saving_to):
            yield

    def _save_model(
        self, save: Callable[..., Any], output_dir: str | None = None, _internal_call: bool = False
    ) -> None:
        folder = Path(output_dir or self._trainer.args.output_dir)
        if self._loop is None or not _keeps_partitioned(self._engine):
            with self._swapped(Event.SAVE_START, Event.SAVE_END, folder):
                save(output_dir, _internal_call=_internal_call)
            return
        # The trainer writes the engine's checkpoint instead of a model, which is for training weights.
        save(output_dir, _internal_call=_internal_call)
        if self.average.ema_started:
            save_average(self.average, self._masters, folder / SAFE_WEIGHTS_NAME, None, overwrite=True)


def _keeps_partitioned(engine: Any) -> bool:
    """Return whether the trainer cannot gather a model to save it."""
    return engine.zero_optimization_partition_weights() and not engine.zero_gather_16bit_weights_on_model_save()


def _counts(args: Any) -> set[TimeUnit]:
    """Return the units that are counted with these arguments of a trainer."""
    tokens = args.include_num_input_tokens_seen not in (False, "no")
    return {TimeUnit.BATCH, TimeUnit.EPOCH, TimeUnit.SAMPLE} | ({TimeUnit.TOKEN} if tokens else set())


def _steps_per_epoch(trainer: Any, loader: Any) -> int | None:
    """Return the optimizer steps in an epoch, if the loader knows its length."""
    try:
        batches = len(loader)
    except TypeError:
        return None
    return max(1, -(-batches // trainer.args.gradient_accumulation_steps))


def _check(trainer: Any) -> None:
    if trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.fsdp_version == 1:
        raise NotImplementedError(
            "each process must hold a model's parameters as they are for them to be averaged, and under FSDP1 it does "
            "not; train with FSDP2 (fsdp_config={'version': 2}), with DDP or on one device"
        )


def _made_once(algorithms: Sequence[Algorithm]) -> Callable[[], Sequence[Algorithm]]:
    left = [algorithms]

    def make() -> Sequence[Algorithm]:
        if not left:
            raise MismatchError(
                f"an algorithm follows one model, and the trainer has made another model (got {algorithms!r}), by "
                "model_init or in a search of hyperparameters; give attach a function that makes the algorithms for "
                "each model, such as lambda: EMA(...)"
            )
        return left.pop()

    return make


def attach(
    algorithms: _Algorithms | Callable[[], _Algorithms],
    trainer: Trainer,
    *,
    eval_weights: EvalWeights = "averaged",
) -> Attached:
    """Average the weights that a ``Trainer`` trains; evaluate, predict and save with the average.

    ``evaluate``, ``predict`` and ``save_model`` use the averaged weights, so ``from_pretrained`` loads these. Each
    checkpoint also has ``polyak.pt`` with the training weights, from which ``train(resume_from_checkpoint=...)``
    resumes bit for bit, as far as the trainer itself does. After ``train``, and after any exception, the model has
    training weights: save it by ``trainer.save_model``. With ``load_best_model_at_end`` weights and average are those
    of the best checkpoint.

    Steps count for ``ba``, whatever the gradient accumulation; ``tok`` needs ``include_num_input_tokens_seen``.

    Under DeepSpeed the average is one of the engine's float32 masters, of which each rank has a part. It is in the
    engine's own checkpoint, with the training weights.

    Args:
        algorithms: ``EMA``, ``Recorder`` or others, one or several; or a function that returns them, which is called
            for each model: where the trainer makes several, by ``model_init`` or in ``hyperparameter_search``. Under
            DeepSpeed, one ``EMA``.
        trainer: Before ``train`` is called.
        eval_weights: Which weights ``evaluate`` uses: ``"averaged"``, ``"raw"`` (the training weights) or ``"both"``.
            With both, ``eval_loss`` and all metrics with plain names are those of the average, which the checkpoints
            have, and those of the training weights are named ``eval_raw_loss``.

    Raises:
        NotImplementedError: Under FSDP1.
        ArgumentError: If the trainer has algorithms already, more than one of these swaps an average in,
            ``eval_weights`` is not one of its values, or there is another algorithm than an ``EMA`` under DeepSpeed.
        TimeError: If a time of an algorithm is in a unit that is not counted, as ``tok`` without
            ``include_num_input_tokens_seen``.
        ProfileError: If a profile is in such a unit.
    """
    eval_weights = eval_weights_of(eval_weights)
    _check(trainer)
    if any(isinstance(callback, Attached) for callback in trainer.callback_handler.callbacks):
        raise ArgumentError(
            "attach must be called once for a trainer (it has algorithms already); give it all in a list"
        )
    under_engine = trainer.is_deepspeed_enabled
    kind, checked = (DeepSpeedAttached, check_averages) if under_engine else (Attached, list[Algorithm])
    if isinstance(algorithms, (Algorithm, Sequence)):
        given = checked(as_algorithms(algorithms))
        refuse_uncountable(given, _counts(trainer.args))
        attached = kind(_made_once(given), trainer, eval_weights)
        attached.algorithms = given
        return attached
    return kind(lambda: checked(as_algorithms(algorithms())), trainer, eval_weights)

"""The host for MosaicML Composer: ``EMA`` and ``Recorder`` as algorithms of its trainer, and ``compute_ema``.

Composer's users change one import. What this adds to Composer: it has no event around saving and none for
exceptions, so its ``save_checkpoint`` and the ``fit``, ``eval`` and ``predict`` of its trainer are given them here. And
a checkpoint whose average no one takes up gives back its training weights.
"""

import functools
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from composer import Trainer
from composer.algorithms.ema import ema as composers
from composer.core import Algorithm as ComposerAlgorithm
from composer.core import State
from composer.utils import checkpoint, dist
from torch import Tensor, nn

import polyak.averaging.ema
import polyak.record.recorder
from polyak.algorithm import Algorithm, MetricLogger, NoLogger, dispatch
from polyak.averaging.weights import Shadow
from polyak.compat import training_weights
from polyak.errors import MismatchError, PlanWarning
from polyak.events import Event, elapsed_duration
from polyak.profiles import Smoothing
from polyak.sharding import copy_, whole
from polyak.tensors.slots import named_tensors, slots
from polyak.time import Time, Timestamp, TimeUnit
from polyak.training.steps import StepHooks, counted_optimizer

__all__ = ["EMA", "EMAParameters", "Hosted", "Recorder", "compute_ema"]

_OURS: Mapping[str, Event] = {event.value: event for event in Event}
# The label of an evaluator whose name ends so asks for the training weights.
_RAW = "_raw"


class _State:
    """What our algorithms see of Composer's state. Its clock leaves out the batches whose step was skipped."""

    def __init__(self) -> None:
        self.composers: Any = None
        self.epoch_length: int | None = None
        self.saving_to: Path | None = None
        self.skipped = 0
        self.skipped_in_epoch = 0
        self.batch = 0  # of Composer, that was seen last

    def learn(self, composers: Any) -> None:
        """Learn what does not change within a fit.

        Args:
            composers: Composer's state.
        """
        self.composers = composers
        self.epoch_length = None if composers.dataloader_len is None else int(composers.dataloader_len)

    def begin_fit(self) -> None:
        """Forget what was skipped if Composer's clock has been set back: it begins anew with none."""
        now = int(self.composers.timestamp.batch)
        if now < max(self.batch, self.skipped):
            self.skipped = self.skipped_in_epoch = 0
        self.batch = now

    @property
    def model(self) -> nn.Module:
        return self.composers.model

    @property
    def timestamp(self) -> Timestamp:
        now = self.composers.timestamp
        # Composer's counter of batches in an epoch begins again with each, and so must ours of those that were skipped.
        in_epoch = int(now.batch_in_epoch)
        counters = {
            "iteration": _time(now.iteration),
            "epoch": _time(now.epoch),
            "batch": Time(int(now.batch) - self.skipped, TimeUnit.BATCH),
            "sample": _time(now.sample),
            "token": _time(now.token),
            "batch_in_epoch": Time(in_epoch - (self.skipped_in_epoch if in_epoch else 0), TimeUnit.BATCH),
            "sample_in_epoch": _time(now.sample_in_epoch),
            "token_in_epoch": _time(now.token_in_epoch),
            "total_wct": _time(now.total_wct),
        }
        return Timestamp(**counters, epoch_length=self.epoch_length)

    @property
    def max_duration(self) -> Time | None:
        duration = self.composers.max_duration
        return None if duration is None else _time(duration)

    def get_elapsed_duration(self) -> Time | None:
        return elapsed_duration(self.timestamp, self.max_duration)


def _time(time: Any) -> Time:
    """Translate a time of Composer's; it keeps wall clocks as ``timedelta``."""
    if isinstance(time, timedelta):
        return Time(time.total_seconds(), TimeUnit.SECOND)
    return Time(time.value, TimeUnit(time.unit.value))


class Hosted(ComposerAlgorithm):
    """One of our algorithms as one of Composer's; the attributes of ours are to be had from it.

    Evaluators whose label ends in ``_raw`` see the training weights, all others what the algorithm lends.

    Args:
        algorithm: Any. For ``EMA`` and ``Recorder`` there are classes of these names, which read Composer's states.

    Attributes:
        algorithm: As given.
    """

    def __init__(self, algorithm: Algorithm) -> None:
        super().__init__()
        self.algorithm = algorithm
        self._view = _State()
        self._hooks = list[StepHooks]()
        self._stepped = False

    def __repr__(self) -> str:
        return repr(self.algorithm)

    def __getattr__(self, name: str) -> Any:
        if name == "algorithm":  # not set yet
            raise AttributeError(name)
        return getattr(self.algorithm, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # What is the algorithm's own is set there, or refused, and never set here to no effect.
        known = vars(self).get("algorithm")
        own = name in vars(self) or hasattr(type(self), name)
        target = known if known is not None and not own and hasattr(known, name) else self
        object.__setattr__(self, name, value) if target is self else setattr(target, name, value)

    def match(self, event: Any, state: Any) -> bool:
        """Return whether ours has this event; it is asked itself when it hears of it.

        Args:
            event: Composer's.
            state: Composer's.
        """
        raw = event.is_eval and str(state.dataloader_label).endswith(_RAW)
        return event.value in _OURS and not raw

    def apply(self, event: Any, state: Any, logger: Any) -> None:
        """Pass the event on.

        Args:
            event: Composer's.
            state: Composer's.
            logger: Composer's.
        """
        ours = _OURS[event.value]
        if ours is Event.INIT:
            _check(self, state)
        elif ours is Event.AFTER_LOAD and state.fsdp_enabled:
            # The model is in shards by now, which must be known also where an evaluation comes before training.
            self.fire(Event.INIT, state, logger)
        elif ours is Event.FIT_START:
            self._view.learn(state)
            self._view.begin_fit()
            self._count_steps(state)
        elif ours is Event.EPOCH_START:
            self._view.skipped_in_epoch = 0
        elif ours is Event.BATCH_START:
            self._stepped = False
        elif ours is Event.BATCH_END:
            self._view.batch = int(state.timestamp.batch)
            if not self._stepped:
                # Mixed precision skipped it. Composer's clock continues all the same.
                self._view.skipped += 1
                self._view.skipped_in_epoch += 1
                return
        self.fire(ours, state, logger)

    def fire(self, event: Event, state: Any, logger: MetricLogger) -> None:
        """Let the algorithm hear of an event.

        Args:
            event: Ours.
            state: Composer's.
            logger: Composer's, or another.
        """
        self._view.composers = state
        dispatch(event, self._view, [self.algorithm], logger)

    def saving_to(self, path: Path | None) -> None:
        """Say where a checkpoint is being written.

        Args:
            path: If one is.
        """
        self._view.saving_to = path

    def _count_steps(self, state: Any) -> None:
        for hooks in self._hooks:
            hooks.remove()
        self._hooks = [StepHooks(counted_optimizer(optimizer), self._on_step) for optimizer in state.optimizers]

    def _on_step(self) -> None:
        self._stepped = True

    def state_dict(self) -> dict[str, Any]:
        """Return the algorithm's state, and the batches that its clock leaves out."""
        view = self._view
        # Composer asks all processes, and saves what the first one says, in a folder of shards as in one file.
        return {
            **whole(self.algorithm.state_dict()),
            "composer_skipped": [view.skipped, view.skipped_in_epoch, view.batch],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned.

        Args:
            state: As saved.
        """
        self._load_clock(state)
        self.algorithm.load_state_dict(state)

    def _load_clock(self, state: Mapping[str, Any]) -> None:
        view = self._view
        view.skipped, view.skipped_in_epoch, view.batch = (*state.get("composer_skipped", ()), 0, 0, 0)[:3]


class EMA(Hosted):
    """``polyak.EMA`` for Composer's trainer: evaluates, predicts and saves with the average of the weights.

    The states of Composer's own ``EMA`` load into it, of releases up to 0.12 and since.

    Args:
        *args: As ``polyak.EMA``, whose first four are those of Composer's.
        **options: As ``polyak.EMA``.
    """

    @functools.wraps(polyak.averaging.ema.EMA.__init__)
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(polyak.averaging.ema.EMA(*args, **options))

    def apply(self, event: Any, state: Any, logger: Any) -> None:
        """Pass the event on. An update by hand, outside of a fit, is made whether or not it is due.

        Args:
            event: Composer's.
            state: Composer's.
            logger: Composer's.
        """
        if self._hooks or _OURS.get(event.value) not in {Event.BATCH_END, Event.EPOCH_END}:
            super().apply(event, state, logger)
        else:
            self._view.learn(state)
            self.algorithm.apply(_OURS[event.value], self._view, logger)

    def state_dict(self) -> dict[str, Any]:
        """Return the state, with the one entry more by which Composer's own ``EMA`` can take up a checkpoint."""
        state = super().state_dict()
        return {**state, "ema_weights_active": state.get("lent", False)}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Resume from what ``state_dict`` returned, here or of Composer's own ``EMA``.

        Args:
            state: As saved.
            strict: Whether all names must match the model's; see ``polyak.EMA.load_state_dict``.
        """
        self._load_clock(state)
        assert isinstance(self.algorithm, polyak.averaging.ema.EMA)
        self.algorithm.load_state_dict(state, strict)


class Recorder(Hosted):
    """``polyak.Recorder`` for Composer's trainer: keeps a record of the weights while training.

    Args:
        *args: As ``polyak.Recorder``.
        **options: As ``polyak.Recorder``.
    """

    @functools.wraps(polyak.record.recorder.Recorder.__init__)
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(polyak.record.recorder.Recorder(*args, **options))


def _check(hosted: Hosted, state: Any) -> None:
    """Refuse what cannot work in Composer."""
    if state.fsdp_config_version == 1 or state.tp_config is not None:
        raise NotImplementedError(
            "the model must be whole in each process, or in shards of FSDP2: FSDP1 keeps flat pieces, of which no "
            "average can be saved as a whole, and tensor parallelism is not supported in Composer; train with FSDP2 "
            '(parallelism_config={"fsdp": FSDP2Config()}), with DDP, or in polyak.Trainer'
        )
    ours = [a for a in state.algorithms if isinstance(a, Hosted)]
    lenders = [a for a in ours if a.algorithm.swaps] + [a for a in state.algorithms if isinstance(a, composers.EMA)]
    alike = [a for a in ours if type(a) is type(hosted)]
    if len(lenders) > 1:
        raise ValueError(
            "a model can hold one average at a time, so of the algorithms that lend one there can be one "
            f"(got {lenders})"
        )
    if len(alike) > 1:
        raise ValueError(
            f"Composer keeps one state for each class of algorithms, so there can be one {type(hosted).__qualname__} "
            f"(got {alike}); give the others subclasses"
        )


class EMAParameters:
    """The average of a model's weights, for loops that call ``compute_ema`` themselves.

    ``swap_params`` puts the average in the model, and the next call gives the model its own weights back.

    Args:
        model: The model in training. The average begins with its weights.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.shadow = Shadow(model)

    def _kept(self, *, parameters: bool) -> dict[str, Tensor]:
        averages = self.shadow.averaged_tensors()
        kind = {slot.name for slot in slots(self._model) if slot.is_parameter is parameters}
        return {name: tensor for name, tensor in averages.items() if name in kind}

    @property
    def named_parameters_dict(self) -> dict[str, Tensor]:
        """The averages of parameters by name."""
        return self._kept(parameters=True)

    @property
    def named_buffers_dict(self) -> dict[str, Tensor]:
        """The averages and copies of buffers by name."""
        return self._kept(parameters=False)

    def named_parameters(self) -> Any:
        """Return the averages of parameters with their names."""
        return self.named_parameters_dict.items()

    def named_buffers(self) -> Any:
        """Return the averages and copies of buffers with their names."""
        return self.named_buffers_dict.items()

    def update_(self, model: nn.Module, smoothing: float) -> None:
        """Move the average towards the model.

        Args:
            model: The model in training.
            smoothing: Share of the average that is kept, from 0 to 1.

        Raises:
            ProfileError: If ``smoothing`` is not in [0, 1].
            MismatchError: If it is another model.
            LoanError: If it holds an average.
        """
        self._check(model)
        self.shadow.update_(1 - Smoothing(smoothing).value)

    def swap_params(self, model: nn.Module) -> None:
        """Lend the average to the model, or take it back.

        Args:
            model: The model in training.

        Raises:
            MismatchError: If it is another model.
            LoanError: If it holds another average.
        """
        self._check(model)
        if self.shadow.holder:
            self.shadow.give_back()
        else:
            self.shadow.lend("EMAParameters.swap_params")

    def transfer_ema_params(self, model: nn.Module) -> None:
        """Copy the average into another model with the same names.

        Args:
            model: To be overwritten.

        Raises:
            MismatchError: If names or shapes differ.
        """
        self.shadow.copy_to(model)

    def move_params_to_device(self, destination_model: nn.Module) -> None:
        """Do nothing: the average follows its model.

        Args:
            destination_model: Not used.
        """

    def _check(self, model: nn.Module) -> None:
        if model is not self._model:
            raise MismatchError("EMAParameters averages the model it was made of, and this is another; make a new one")


def compute_ema(model: nn.Module, ema_model: nn.Module | EMAParameters, smoothing: float = 0.99) -> None:
    """Move ``ema_model`` towards ``model`` in place, as ``polyak.compute_ema``.

    Args:
        model: The model in training.
        ema_model: Its average, a module or ``EMAParameters``.
        smoothing: Share of the average that is kept, from 0 to 1.

    Raises:
        ProfileError: If ``smoothing`` is not in [0, 1].
        MismatchError: If the two have other names or shapes.
    """
    if isinstance(ema_model, EMAParameters):
        ema_model.update_(model, smoothing)
    else:
        polyak.averaging.ema.compute_ema(model, ema_model, smoothing)


# What Composer has no events for


def _hosted(state: Any) -> list[Hosted]:
    return [algorithm for algorithm in state.algorithms if isinstance(algorithm, Hosted)]


def _saving(save_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Surround the saving of any checkpoint, by a ``CheckpointSaver`` or by hand, with our two events."""

    @functools.wraps(save_checkpoint)
    def save(state: Any, *args: Any, **options: Any) -> Any:
        hosted = _hosted(state)
        path = _path_of(state, checkpoint.get_save_filename(state, *args, **_only(options, "filename")))
        try:
            for algorithm in hosted:
                algorithm.saving_to(path)
                algorithm.fire(Event.SAVE_START, state, NoLogger())
            return save_checkpoint(state, *args, **options)
        finally:
            for algorithm in hosted:
                algorithm.fire(Event.SAVE_END, state, NoLogger())
                algorithm.saving_to(None)

    return save


def _path_of(state: Any, filename: str) -> Path:
    """Return where a checkpoint will be, the same on all ranks that write it together."""
    if state.fsdp_sharded_state_dict_enabled:
        return Path(filename).parent  # the name of the file in it is always the same
    said = [filename]
    if state.fsdp_enabled:
        dist.broadcast_object_list(said)  # names have the rank in them, and the first one saves
    return Path(said[0])


def _only(options: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {name: options[name]} if name in options else {}


def _telling_of_exceptions(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(trainer: Any, *args: Any, **options: Any) -> Any:
        try:
            return method(trainer, *args, **options)
        except BaseException:
            for algorithm in _hosted(trainer.state):
                algorithm.fire(Event.EXCEPTION, trainer.state, NoLogger())
            raise

    return call


def _giving_back(load_state_dict: Callable[..., Any]) -> Callable[..., Any]:
    """Give the model its training weights where no one here takes up the ``EMA`` that a checkpoint has."""

    @functools.wraps(load_state_dict)
    def load(state: Any, saved: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        result = load_state_dict(state, saved, *args, **options)
        known = {type(algorithm).__qualname__ for algorithm in state.algorithms}
        for name, algorithm in dict(saved.get("algorithms", ())).items():
            if name not in known and "model" in saved:
                # With load_monolith_rank0_only the first rank alone has the saved model.
                training = training_weights(algorithm, saved["model"] or {})
                ignored = set[str]() if saved["model"] is None else _left_out(state.model, saved["model"])
                _give_back(name, {n: t for n, t in (training or {}).items() if n not in ignored}, state.model)
        return result

    return load


def _left_out(model: nn.Module, saved: Mapping[str, Tensor]) -> set[str]:
    """Return the names that a checkpoint's model lacks, as with ``load_ignore_keys``: what they name is left alone."""
    return {slot.name for slot in slots(model) if slot.persistent} - saved.keys()


def _give_back(name: str, training: Mapping[str, Tensor], model: nn.Module) -> None:
    if not training:
        return
    tensors = named_tensors(model)
    for key in training.keys() & tensors.keys():  # Composer has seen to the others, strictly or as it was told
        copy_(tensors[key], training[key])
    warnings.warn(
        f"the checkpoint was saved with the average of {name} in its model, and there is no {name} here: the model has "
        f"been given the training weights; add {name} to go on averaging, or load_weights_only=True for the average",
        PlanWarning,
        stacklevel=2,
    )


checkpoint.save_checkpoint = _saving(checkpoint.save_checkpoint)
State.load_state_dict = _giving_back(State.load_state_dict)
for _name in ("fit", "eval", "predict"):
    setattr(Trainer, _name, _telling_of_exceptions(getattr(Trainer, _name)))

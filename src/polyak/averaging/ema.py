"""``EMA``: the average of weights as users configure, read and save it. Its arguments are MosaicML Composer's."""

import copy
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from polyak.algorithm import MetricLogger, check_pickles
from polyak.averaging import states
from polyak.averaging.actions import ACTIONS
from polyak.averaging.attributes import Attributes
from polyak.averaging.copies import check_copyable, without_model
from polyak.averaging.fill import fill_with_average, fill_with_training_weights
from polyak.averaging.habits import ARGUMENTS_OF_AN_EMA, explained
from polyak.averaging.offload import Offload
from polyak.averaging.online import Action, OnlineAverage
from polyak.averaging.plan import Plan, plan
from polyak.averaging.schedule import Schedule
from polyak.averaging.settings import Settings, check_half_life, check_options, one_decay
from polyak.compat.composer import as_started
from polyak.errors import LoanError, ProfileError, TimeError
from polyak.events import Event, State, refuse_uncounted
from polyak.profiles import Profile
from polyak.tensors.slots import PolicyRule, default_policy
from polyak.time import Time, TimeUnit

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class _Default(str):
    """The default half-life, which is replaced if another argument gives a profile."""

    __slots__ = ()


_DEFAULT = _Default("1000ba")


class EMA(Attributes):
    """Keep an average of the weights while training; evaluate, predict and save with it.

    The average begins with the weights at the first update event at or after ``ema_start``. With a half-life, its
    decay follows the time between two updates, whatever the interval, the batch size or the skipped steps. The model
    holds the average from ``EVAL_START``, ``PREDICT_START`` and ``SAVE_START`` to the end event of each, and the
    training weights at all other times. At the start of an evaluation, ``metrics`` are logged.

    Args:
        half_life: The time in which half of the average is replaced: ``"1000 steps"``, ``"1.5 epochs"``,
            ``"1e6 tokens"``, or short ``"1000ba"``, ``"1.5ep"``, ``"1e6tok"``; a whole number counts steps. 0 means no
            averaging, ``"infba"`` an average that never moves. ``"auto"`` is a sixteenth of the run, unbiased; it needs
            the length of the run.
        smoothing: Composer's name of ``decay``.
        ema_start: How much training comes before averaging, in any unit.
        update_interval: The time between updates, in any unit. By default one epoch for a half-life in epochs, else
            one batch. Updates in ``ep`` are made at the ends of epochs, all others at the ends of batches.
        decay: Instead of a half-life, the share of the average that each update keeps, from 0 to 1. It is not adjusted
            to ``update_interval``.
        profile: Instead of a half-life, any profile that can be computed in one buffer.
        dtype: The dtype of the average; None for the model's own, and float32 where that has 16 bits.
        policy: Decides which tensors are averaged, copied or left.
        mesh: Ranks over which the average is sharded, if each of them has the full model, as under
            ``DistributedDataParallel``. The average of a sharded model is sharded without it.
        offload: ``Offload()`` keeps the average in CPU memory and updates it in the background. The average is the
            same, and a run may resume with or without it.

    Raises:
        TimeError: If a time string cannot be read, or its value is out of range.
        ProfileError: If not exactly one of half-life, decay and profile is given, or the profile cannot be computed in
            one buffer.
        CallError: If there is no argument of that name.

    Attributes:
        half_life: The half-life as ``Time``, or None.
        decay: Another name of ``smoothing``.
        smoothing: The share that one update keeps, or None if it depends on the elapsed time.
        profile: The profile, which decides on the decay.
        ema_start: As ``Time``.
        update_interval: As ``Time``.
        ema_started: Whether averaging has begun.

    Example:
        >>> EMA(half_life="2ep", update_interval="10ba")
        EMA(profile=HalfLife(span=Time(2, 'ep'), unbiased=False), ema_start='0.0dur', update_interval='10ba')
        >>> EMA("1000 steps").half_life, EMA(decay=0.99).update_interval
        (Time(1000, 'ba'), Time(1, 'ba'))

    References:
        ``composer.algorithms.EMA``.
    """

    swaps = True

    @explained("EMA('1000 steps') or EMA(decay=0.999)", ARGUMENTS_OF_AN_EMA)
    def __init__(
        self,
        half_life: str | Time | int | None = _DEFAULT,
        smoothing: float | None = None,
        ema_start: str | Time | int = "0.0dur",
        update_interval: str | Time | int | None = None,
        *,
        decay: float | None = None,
        profile: Profile | None = None,
        dtype: torch.dtype | None = None,
        policy: PolicyRule = default_policy,
        mesh: "DeviceMesh | None" = None,
        offload: Offload | None = None,
    ) -> None:
        smoothing = one_decay(decay, smoothing)
        if isinstance(half_life, _Default) and (smoothing is not None or profile is not None):
            half_life = None
        check_half_life(half_life)
        schedule = Schedule.of(
            half_life=half_life,
            smoothing=smoothing,
            profile=profile,
            ema_start=ema_start,
            update_interval=update_interval,
        )
        check_options(dtype=dtype, policy=policy, mesh=mesh, offload=offload)
        times = f"ema_start='{schedule.start}', update_interval='{schedule.interval}'"
        name = f"EMA(profile={schedule.profile!r}, {times}{f', dtype={dtype}' if dtype else ''})"
        self._average = OnlineAverage(schedule, Settings(dtype, policy, mesh=mesh, offload=offload), name)

    def __repr__(self) -> str:
        return self._average.name

    def __deepcopy__(self, memo: dict[int, Any]) -> "EMA":
        """Return an EMA with the same average, bound to a copy of the model: the one in ``memo``, or a new one.

        Args:
            memo: What ``copy.deepcopy`` has copied, by id.

        Raises:
            CopyError: If the average is sharded, or the model cannot be copied.
        """
        check_copyable(self._average)
        new = memo[id(self)] = self.__class__.__new__(self.__class__)
        vars(new).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        return new

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: everything but the model. The average stays on the CPU until it is attached again."""
        check_pickles("policy", self._average.settings.policy)
        return {**vars(self), "_average": without_model(self._average)}

    @property
    def ema_model(self) -> nn.Module | None:
        """The average as a module in eval mode, over its own tensors and not a copy. None before averaging has begun.

        While the average is swapped in, this is the model in training. An offloaded average is updated in the
        background: read this property at each use, which waits for the last update.

        You can set it to a module, or to any object with ``named_parameters`` and ``named_buffers``. Its values are
        copied into the average. Until the model is known, this returns the object that was set.

        Raises:
            MismatchError: If names or shapes differ from the model's.
        """
        shadow = self._average.shadow
        return shadow.averaged_model() if shadow else self._average.given

    @ema_model.setter
    def ema_model(self, average: nn.Module) -> None:
        self.load_state_dict(states.cloned(as_started(average)))
        self._average.given = average if self._average.model is None else None

    def metrics(self) -> dict[str, float]:
        """Return the metrics that are logged, by name; nothing before averaging has begun.

        ``ema/decay`` is the share of the average that the last update kept, and ``ema/distance`` how far the weights
        are from the average, relative to it. They are logged at the start of an evaluation, at most once per batch,
        and not in updates, since reading them waits for the device and takes a pass over the weights. To see them more
        often, log what this returns. If several ranks train together, all must call this.

        Raises:
            LoanError: If the model holds another average.
        """
        return self._average.metrics()

    def plan(self, model: nn.Module | None = None) -> Plan:
        """Return what is done with each tensor of a model, and why; printed, it is a table.

        Args:
            model: Any model; None for the one in training.

        Raises:
            LoanError: If no model is given and the one in training is not known yet.

        Example:
            >>> print(EMA("10ba").plan(nn.Linear(2, 1)))
            weight  1x2  float32  average  a parameter that is trained
            bias    1    float32  average  a parameter that is trained
            2 tensors: 2 average
        """
        model = self._average.model if model is None else model
        if model is None:
            raise LoanError("the EMA must know a model to plan what it does with its tensors; attach it, or give one")
        return plan(model, self._average.settings.policy)

    def match(self, event: Event, state: State) -> bool:
        """Return whether to act: at set-up, when an update is due, or when the average is swapped in or out."""
        return self._average.decide(event, state) is not Action.NOTHING

    def apply(self, event: Event, state: State, logger: MetricLogger) -> None:
        """Begin or update the average, swap it in, or restore the training weights.

        To update by hand, call this with a ``state`` that has the model and the timestamp.

        Args:
            event: The event that ``match`` answered True to.
            state: The state of the run.
            logger: The logger for metrics.

        Raises:
            ArgumentError: If the event is another trainer's.
            TimeError: If an update is to be made and no time has passed since the last.
            LoanError: If an update is to be made and the model does not hold its training weights.
        """
        average = self._average
        action = average.decide(event, state, by_hand=True)
        if average.model is None:
            average.meet(state.model)
        ACTIONS[action](average, event, state, logger)

    def refuse_uncounted(self, state: State, counted: Collection[TimeUnit]) -> None:
        """Refuse times that the loop does not count; see ``Algorithm``."""
        for needed in self._average.schedule.requirements():
            try:
                refuse_uncounted(needed.argument, needed.unit, state, counted, fractions=needed.fractions)
            except TimeError as error:
                if not needed.of_profile or (needed.unit is TimeUnit.DURATION and state.max_duration is None):
                    raise
                raise ProfileError(str(error)) from None

    def get_ema_model(self, model: nn.Module) -> nn.Module:
        """Put the average in ``model`` and return it.

        Another model gets a copy. If it is the model in training, the average is swapped in, so that nothing is lost:
        ``get_training_model`` restores the training weights, and a training step before that is an error.

        Args:
            model: Any model with the names of the one in training, or that one itself.

        Raises:
            LoanError: If averaging has not begun, or the model holds another average.
            MismatchError: If names or shapes differ.
        """
        fill_with_average(self._average, model)
        return model

    def get_training_model(self, model: nn.Module) -> nn.Module:
        """Put the training weights in ``model`` and return it. If it is the model in training, they are restored.

        Args:
            model: Any model with the names of the one in training, or that one itself.

        Raises:
            LoanError: If the model in training is not known yet.
            MismatchError: If names or shapes differ.
        """
        fill_with_training_weights(self._average, model)
        return model

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resumed run depends on, as tensors, numbers and strings.

        If the model holds the average, the state has the training weights too, as ``training_model``. If
        ``torch.distributed`` is in use, the state has the same entries before averaging has begun as after, with the
        weights as their average, because ``torch.distributed.checkpoint`` loads only into existing entries.
        """
        return states.state_of(self._average)

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Resume from what ``state_dict`` returned, here or in MosaicML Composer (in both of its formats).

        If the model is not known yet, the state is kept until it is. If the state was taken while the model held the
        average, the model gets its training weights, so load the model's own state first.

        Args:
            state: The saved state.
            strict: Whether all names must match the model's. If not, a warning lists those that do not match: missing
                averages stay as they are, and unexpected ones are ignored. Shapes must match in any case.

        Raises:
            CheckpointError: If it is not such a state.
            MismatchError: If names or shapes differ from the model's.
        """
        states.load(self._average, state, strict)

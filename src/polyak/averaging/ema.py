"""The exponential moving average of weights, through the door that MosaicML Composer's users know.

``EMA`` decides when: when to begin, to update, to lend and to take back. How much is the profile's business, and how
the shadow's.
"""

import copy
import itertools
import warnings
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from polyak.algorithm import Algorithm, MetricLogger, NoLogger, check_event, check_pickles
from polyak.averaging.offload import Offload
from polyak.averaging.plan import Plan, plan
from polyak.averaging.schedule import Schedule
from polyak.averaging.states import check_state, cloned, fitted
from polyak.averaging.swap import swap_of
from polyak.averaging.weights import Shadow, refuse_unsynchronized
from polyak.compat.composer import as_started, from_composer
from polyak.errors import (
    ArgumentError,
    CheckpointError,
    CopyError,
    FixedError,
    LoanError,
    MismatchError,
    PlanWarning,
    PolyakError,
    ProfileError,
    TimeError,
)
from polyak.events import Event, State
from polyak.kernels import Place, lerp_
from polyak.profiles import HalfLife, Profile, Smoothing
from polyak.sharding import Ranks, is_initialized, local
from polyak.tensors import optimizers
from polyak.tensors.memory import write_
from polyak.tensors.slots import (
    PolicyRule,
    averaged_parameters,
    check_match,
    default_policy,
    is_statistic,
    named_tensors,
    slots,
    unwrap,
)
from polyak.time import Time, Timestamp, TimeUnit

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_calls = itertools.count()


@torch.no_grad()
def compute_ema(model: nn.Module, ema_model: nn.Module, smoothing: float = 0.99) -> None:
    """Move ``ema_model`` towards ``model`` in place: ``ema = smoothing * ema + (1 - smoothing) * weights``.

    Parameters and running statistics (buffers named ``running_...``) are averaged, other buffers copied, sparse
    tensors left; memory that several tensors share is averaged once. Tensors are matched by name; what
    ``DataParallel``, ``DistributedDataParallel`` or ``torch.compile`` put in front of a name does not count. Inf and
    nan in ``model`` leave their elements of the average as they were. An ``ema_model`` with 16-bit weights is rounded
    stochastically; float32 is better.

    Args:
        model: The model in training.
        ema_model: Its average, to be changed.
        smoothing: Share of the average that is kept, from 0 to 1.

    Raises:
        ArgumentError: If one of the two is no module.
        ProfileError: If ``smoothing`` is not in [0, 1].
        MismatchError: If the two have other names or shapes; it lists them.

    Example:
        >>> model, ema_model = nn.Linear(1, 1), nn.Linear(1, 1)
        >>> _ = nn.init.zeros_(model.weight), nn.init.ones_(ema_model.weight)
        >>> compute_ema(model, ema_model, smoothing=0.75)
        >>> ema_model.weight.item()
        0.75

    References:
        ``composer.algorithms.ema.compute_ema``.
    """
    for name, given in (("model", model), ("ema_model", ema_model)):
        if not isinstance(given, nn.Module):
            raise ArgumentError(f"{name} must be a torch.nn.Module (got {given!r}, a {type(given).__name__})")
    weight = 1 - Smoothing(smoothing).value
    online, averages = named_tensors(model), named_tensors(ema_model)
    check_match("ema_model must have the names and shapes of model", online, averages)
    averaged = list[tuple[Tensor, Tensor]]()
    for slot in slots(ema_model):
        average, tensor = slot.tensor.detach(), online[slot.name].detach()
        if average.layout != torch.strided:
            continue
        if (slot.is_parameter or is_statistic(slot)) and (average.is_floating_point() or average.is_complex()):
            averaged.append((average, tensor.to(average.device)))
        else:
            write_(average, tensor)
    averages_of, tensors = [average for average, _ in averaged], [tensor for _, tensor in averaged]
    lerp_(averages_of, tensors, weight, [Place(i) for i in range(len(averaged))], num_updates=next(_calls))


class _Default(str):
    """The half-life that nobody asked for, so that another profile may take its place."""

    __slots__ = ()


_DEFAULT = _Default("1000ba")

# Each loan has the event that begins it and the one that ends it.
_LENDING = {
    Event.EVAL_START: Event.EVAL_END,
    Event.PREDICT_START: Event.PREDICT_END,
    Event.SAVE_START: Event.SAVE_END,
}


_UPDATES = {Event.BATCH_END, Event.EPOCH_END}

# What cannot be assigned, and what to do instead.
_FIXED = {
    **dict.fromkeys(
        ("half_life", "smoothing", "profile", "ema_start", "update_interval"),
        "make a new EMA with another one, and load the state of this one into it",
    ),
    "ema_weights_active": "get_ema_model and get_training_model swap the average in and out",
    "training_model": "it is the model in training, and its weights are kept by themselves: assign none",
    "num_updates": "it counts updates",
    "num_quarantined": "it counts what was kept out",
}


class EMA(Algorithm):
    """Keep an average of the weights while training; evaluate, predict and save with it.

    The average begins with the weights after the first update event at or past ``ema_start``. With a half-life its
    decay follows what elapsed between two updates, whatever the interval, the batch size or the steps skipped. The
    model holds the average from ``EVAL_START``, ``PREDICT_START`` and ``SAVE_START`` to the end event of each, and
    the training weights at all other times. Where an evaluation begins, ``metrics`` go to the loop's logger.

    Args:
        half_life: After how long half of the average is new: ``"1000ba"``, ``"1.5ep"``, ``"1e6tok"``, in any unit of
            time strings. 0 means no averaging, ``"infba"`` an average that never moves.
        smoothing: Instead of a half-life, the share of the average that each update keeps, from 0 to 1. It is not
            adjusted to ``update_interval``.
        ema_start: How much training comes before averaging, in any unit.
        update_interval: The time between updates, in any unit. By default one epoch for a half-life in epochs, else
            one batch. Updates in ``ep`` are done at the ends of epochs, all others at the ends of batches.
        profile: Instead of a half-life, any profile that one buffer can follow.
        dtype: The dtype of the average. None stands for the model's own, and float32 where that has 16 bits.
        policy: Which tensors are averaged, copied or left.
        mesh: Ranks over which the average is divided, of a model that each of them has whole, as under
            ``DistributedDataParallel``. The average of a sharded model lies in the model's own shards, without this.
        offload: Whether the average is in CPU memory and updated there in the background, and how: ``Offload()``. It
            is the same average, and a run may go on with or without.

    Raises:
        TimeError: If a time string cannot be read, or its value cannot be meant.
        ProfileError: If not exactly one of half-life, smoothing and profile is given, or the profile is one that
            cannot be kept up online.

    Attributes:
        half_life: The half-life as ``Time``, or None.
        smoothing: The share that one update keeps, or None where it depends on what elapses.
        profile: What decides on the decay.
        ema_start: As ``Time``.
        update_interval: As ``Time``.
        ema_started: Whether averaging has begun.

    Example:
        >>> EMA(half_life="2ep", update_interval="10ba")
        EMA(profile=HalfLife(span=Time(2, 'ep'), unbiased=False), ema_start='0.0dur', update_interval='10ba')
        >>> EMA(smoothing=0.99).update_interval
        Time(1, 'ba')

    References:
        ``composer.algorithms.EMA``.
    """

    lends = True

    def __init__(
        self,
        half_life: str | Time | None = _DEFAULT,
        smoothing: float | None = None,
        ema_start: str | Time = "0.0dur",
        update_interval: str | Time | None = None,
        *,
        profile: Profile | None = None,
        dtype: torch.dtype | None = None,
        policy: PolicyRule = default_policy,
        mesh: "DeviceMesh | None" = None,
        offload: Offload | None = None,
    ) -> None:
        if isinstance(half_life, _Default) and (smoothing is not None or profile is not None):
            half_life = None
        self._schedule = Schedule.of(
            half_life=half_life,
            smoothing=smoothing,
            profile=profile,
            ema_start=ema_start,
            update_interval=update_interval,
        )
        _check_options(dtype=dtype, policy=policy, mesh=mesh, offload=offload)
        self._dtype = dtype
        self._policy = policy
        self._mesh = mesh
        self._ranks: Ranks | None = None
        self._offload = offload
        self._model: nn.Module | None = None
        self._shadow: Shadow | None = None
        self._pending: Mapping[str, Any] | None = None
        self._pending_strict = True
        self._given: nn.Module | None = None  # what `ema_model` was set to, until the model is known
        self._origin = Timestamp()
        self._updated_at: Timestamp | None = None
        self._decay: float | None = None
        self._logged_at: Time | None = None
        self._seconds = self._schedule.counts_seconds(None)
        self._fit_from: tuple[Time, int] | None = None  # the batch and the updates at which this run began
        self._lent_until: Event | None = None
        self._quarantine_warned = 0
        # Updates at which the weights were not finite and averaging did not begin, and the first one.
        self._waits: tuple[int, Timestamp | None] = (0, None)

    def __repr__(self) -> str:
        dtype = f", dtype={self._dtype}" if self._dtype else ""
        times = f"ema_start='{self.ema_start}', update_interval='{self.update_interval}'"
        return f"EMA(profile={self.profile!r}, {times}{dtype})"

    # Copies

    def __deepcopy__(self, memo: dict[int, Any]) -> "EMA":
        """Return an EMA with the same average, bound to a copy of the model: the one in ``memo``, or one made for it.

        Its average has memory of its own, and is not in the model: a copy that is made while it is has the average in
        both, and its model gets its training weights when the copy is attached.

        Raises:
            CopyError: If the average is divided over ranks, or the model cannot be copied.
        """
        self._check_copyable()
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        state = None if self._shadow is None else cloned(self.state_dict())
        pending = self._pending if state is None else state
        special = {"_model", "_shadow", "_pending", "_lent_until", *_SHARED}
        vars(new).update({name: value for name, value in vars(self).items() if name in _SHARED})
        vars(new).update({n: copy.deepcopy(value, memo) for n, value in vars(self).items() if n not in special})
        vars(new).update({"_lent_until": None, "_pending": None, "_model": self._copied_model(memo)})
        if state is None:
            vars(new)["_shadow"] = None
        else:
            vars(new)["_copied_state"] = {**state, "lent": False, "training_model": None}  # see `__getattr__`
        if state is None or state["lent"]:
            vars(new)["_pending"] = None if pending is None else cloned(pending)
        return new

    def __getattr__(self, name: str) -> Any:
        """Make a copy's shadow when it is first needed: while a model with its EMA is copied, it has no tensors."""
        if name != "_shadow" or "_copied_state" not in vars(self):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self._shadow = None
        try:
            self.load_state_dict(vars(self)["_copied_state"])
        except BaseException:
            del self._shadow
            raise
        del vars(self)["_copied_state"]
        return self._shadow

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: all but the model. The average waits, on the CPU, until it meets its model again."""
        self._check_copyable()
        check_pickles("policy", self._policy)
        unbound: dict[str, Any] = {"_model": None, "_shadow": None, "_ranks": None, "_lent_until": None}
        pending = self._pending if self._pending is not None or self._shadow is None else self.state_dict()
        own = {name: value for name, value in vars(self).items() if name != "_copied_state"}
        return {**own, **unbound, "_pending": None if pending is None else cloned(pending, "cpu")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def _check_copyable(self) -> None:
        if self._mesh is not None or (self._ranks is not None and not self._ranks.replicas):
            raise CopyError(
                f"an EMA must be all in one process to be copied or pickled, and {self!r} is divided over ranks; save "
                "its state_dict() by torch.distributed.checkpoint"
            )

    def _copied_model(self, memo: dict[int, Any]) -> nn.Module | None:
        try:
            return copy.deepcopy(self._model, memo)
        except PolyakError:
            raise
        except Exception as error:
            raise CopyError(
                f"an EMA is copied with its model, and this model cannot be ({error}); copy ema.state_dict(), and load "
                "it into another EMA"
            ) from error

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FIXED:
            raise FixedError(
                f"{name} of an EMA must stay as it is (got {value!r} for {getattr(self, name)!r}); {_FIXED[name]}"
            )
        object.__setattr__(self, name, value)

    @property
    def profile(self) -> Profile:
        """What decides on the decay."""
        return self._schedule.profile

    @property
    def half_life(self) -> Time | None:
        """The half-life, or None where another profile decides."""
        return self.profile.span if isinstance(self.profile, HalfLife) else None

    @property
    def smoothing(self) -> float | None:
        """The share of the average that one update keeps, or None where it depends on what elapses."""
        return self._schedule.smoothing

    @property
    def ema_start(self) -> Time:
        """How much training comes before averaging."""
        return self._schedule.start

    @property
    def update_interval(self) -> Time:
        """The time between updates."""
        return self._schedule.interval

    @property
    def ema_started(self) -> bool:
        """Whether averaging has begun. It begins by itself, or with the average that ``ema_model`` is set to."""
        return self._shadow is not None or (self._pending is not None and bool(self._pending["ema_started"]))

    @ema_started.setter
    def ema_started(self, started: bool) -> None:
        if bool(started) != self.ema_started:
            raise FixedError(
                f"ema_started must say whether there is an average (got {started!r} where there is "
                f"{'one' if self.ema_started else 'none'}); set ema_model to begin with an average of your own, or "
                "make a new EMA to begin anew"
            )

    @property
    def ema_weights_active(self) -> bool:
        """Whether the model holds the average now."""
        return self._shadow is not None and self._shadow.holder is not None

    @property
    def ema_model(self) -> nn.Module | None:
        """The average as a module over its own tensors, in eval mode: no copy. None before averaging has begun.

        While the average is swapped in this is the model in training. An offloaded average is on the CPU and moves
        while training continues: get this anew at each use, which waits for the last update.

        It may be set to a module, or to anything with ``named_parameters`` and ``named_buffers``, whose values then are
        the average: they are copied, so what was set does not follow. Until the model is known, it is what was set.

        Raises:
            MismatchError: If names or shapes differ from the model's.
        """
        return self._shadow.averaged_model() if self._shadow else self._given

    @ema_model.setter
    def ema_model(self, average: nn.Module) -> None:
        state = as_started(average)
        self.load_state_dict(cloned(state))
        self._given = average if self._model is None else None

    @property
    def training_model(self) -> nn.Module | None:
        """The model with its training weights; while the average is lent, a module over the weights set aside."""
        return self._shadow.training_model() if self._shadow else self._model

    @property
    def num_updates(self) -> int:
        """How often the average has moved."""
        return self._shadow.num_updates if self._shadow else 0

    @property
    def num_quarantined(self) -> int:
        """How many tensors came in with inf or nan, which were kept out. Reading it waits for the device."""
        return self._shadow.num_quarantined if self._shadow else 0

    def metrics(self) -> dict[str, float]:
        """Return what is worth a curve, by the names under which it is logged; nothing before averaging has begun.

        ``ema/decay`` is the share of the average that the last update kept, ``ema/distance`` how far the weights are
        from the average (``Shadow.distance``). They are logged where an evaluation begins, once for each batch, and
        not in updates: reading them waits for the device and takes a pass over the weights. To see them more often,
        log what this returns. Where several ranks train together, all must call this.

        Raises:
            LoanError: If the model holds another average.
        """
        if self._shadow is None:
            return {}
        decay = {} if self._decay is None else {"ema/decay": self._decay}
        return decay | {"ema/distance": self._shadow.distance(self._ranks)}

    def plan(self, model: nn.Module | None = None) -> Plan:
        """Return what is done with each tensor of a model, and why; printed, it is a table.

        Args:
            model: Any; None stands for the model that this EMA has met.

        Raises:
            LoanError: If no model is given and none has been met.

        Example:
            >>> print(EMA("10ba").plan(nn.Linear(2, 1)))
            weight  1x2  float32  average  a parameter that is trained
            bias    1    float32  average  a parameter that is trained
            2 tensors: 2 average
        """
        model = self._model if model is None else model
        if model is None:
            raise LoanError("the EMA must have met a model, or be given one, to say what it does with its tensors")
        return plan(model, self._policy)

    def match(self, event: Event, state: State) -> bool:
        """Return whether to act: at set-up, where an update is due, where the average is swapped in or out."""
        check_event(event, "EMA")
        if event in (Event.INIT, Event.FIT_START, Event.FIT_END):
            return True
        if event is (Event.EPOCH_END if self.update_interval.unit is TimeUnit.EPOCH else Event.BATCH_END):
            return self._due(state) if self.ema_started else self._may_start(state)
        if event is Event.EXCEPTION and self._waits[0]:
            return True
        if event in _LENDING:
            # Where several ranks train together, all compare what they have, also if it is nothing yet.
            return (self.ema_started or self._ranks is not None) and not self.ema_weights_active
        return self._lent_until is not None and event in (self._lent_until, Event.EXCEPTION)

    def apply(self, event: Event, state: State, logger: MetricLogger) -> None:
        """Begin or update the average, swap it in, or restore the training weights.

        An update by hand needs no more than the model and the timestamp of ``state``.

        Raises:
            ArgumentError: If the event is that of another trainer.
            TimeError: If an update is to be made and no time has passed since the last.
            LoanError: If an update is to be made and the model does not hold its training weights.
        """
        check_event(event, "EMA")
        if event in (Event.INIT, Event.FIT_START) or self._model is None:
            self._bind(state.model)
        if event is Event.FIT_START:
            self._on_fit_start(state)
        elif event is Event.FIT_END:
            self._on_fit_end(state)
        elif event in _LENDING:
            self._agree()
            if event is Event.EVAL_START:
                self._log(state, logger)
            self._lend(event)
        elif event is Event.EXCEPTION and self._waits[0]:
            self._warn_of_waits("averaging had not begun when the run was left")
        elif self._lent_until is not None and event is not Event.INIT:
            self._give_back()
        elif event in _UPDATES:
            (self._update if self.ema_started else self._start)(state)

    def _bind(self, model: nn.Module) -> None:
        """Learn whose weights these are, and load the state that came before the model did."""
        if self._model is not None and self._model is not unwrap(model):
            raise MismatchError("an EMA averages one model, and this one has another already; make a new EMA")
        self._model = unwrap(model)
        self._ranks = Ranks.of(model)
        optimizers.watch()  # from before the first step on
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self.load_state_dict(pending, self._pending_strict)

    def refuse_uncounted(self, state: State, counted: Collection[TimeUnit]) -> None:
        """Refuse times that the loop does not count; see ``Algorithm``."""
        self._schedule.refuse_uncounted(state, counted)

    # When

    def _clock(self, timestamp: Timestamp, state: State) -> float:
        unit = self.profile.unit
        assert unit is not None
        return timestamp.elapsed(unit, state.max_duration)

    def _may_start(self, state: State) -> bool:
        if state.timestamp.batch.value == 0:
            return False  # mixed precision has skipped every step so far
        if self.ema_start.unit is TimeUnit.DURATION:
            elapsed = state.get_elapsed_duration()
            return float(elapsed or 0.0) >= float(self.ema_start)
        return state.timestamp.elapsed(self.ema_start.unit) >= float(self.ema_start)

    def _due(self, state: State) -> bool:
        interval, run, now = self.update_interval, state.max_duration, state.timestamp
        if self._updated_at is None:  # a loop that has no FIT_START, and an average from elsewhere
            return now.elapsed(interval.unit, run) % interval.value == 0
        before = self._updated_at
        return now.intervals(interval, run) > before.intervals(interval, run)

    def _start(self, state: State) -> None:
        model = state.model
        parameters = averaged_parameters(model, self._policy)
        if not all(bool(local(slot.tensor).detach().isfinite().all()) for slot in parameters):
            self._waits = (self._waits[0] + 1, self._waits[1] or state.timestamp)
            return
        if self._waits[0]:
            self._warn_of_waits(f"averaging begins at {state.timestamp.batch}")
        self._check_clock(state)
        self._shadow = self._new_shadow(model)
        # The profile's clock starts where averaging was asked to, so that these weights count for what they span.
        self._origin = state.timestamp
        if self.ema_start.value == 0:
            self._origin = Timestamp()
        elif self.ema_start.unit is not TimeUnit.DURATION:
            self._origin = state.timestamp.with_counter(self.ema_start)
        self._updated_at = state.timestamp

    def _new_shadow(self, model: nn.Module) -> Shadow:
        return Shadow(model, dtype=self._dtype, policy=self._policy, mesh=self._mesh, offload=self._offload)

    def _check_clock(self, state: State) -> None:
        unit = self.profile.unit
        if unit is None:
            return
        epochs_only = self.update_interval.unit is not TimeUnit.EPOCH and state.timestamp.epoch_length is None
        if self._clock(state.timestamp, state) == 0 or (unit is TimeUnit.EPOCH and epochs_only):
            raise ProfileError(
                f"the loop must count {unit} for {self.profile!r}, and after {state.timestamp.batch} it has not; "
                "tell it how (epochs need the number of batches in one), or use a profile in ba"
            )

    def _update(self, state: State) -> None:
        assert self._shadow is not None
        if self.profile.unit is None:
            self._decay = self.profile.decay(self.num_updates, self.num_updates + 1)
        else:
            self._decay = self._schedule.share_kept(self._origin, self._updated_at, state)
        self._shadow.update_(1 - self._decay)
        self._updated_at = state.timestamp

    def _log(self, state: State, logger: MetricLogger) -> None:
        now = state.timestamp.batch
        # What several ranks train is measured by all of them, whoever logs.
        if now != self._logged_at and (self._ranks is not None or not isinstance(logger, NoLogger)):
            self._logged_at = now
            logger.log_metrics(self.metrics(), step=int(now.value))

    # Lending

    def _lend(self, event: Event) -> None:
        if self._shadow is None:
            return
        self._quarantine_warned = self._shadow.warn_of_quarantine(self._quarantine_warned)
        # Noted before and forgotten after, so that an interrupt in between leaves nothing that is not taken back.
        self._lent_until = _LENDING[event]
        self._shadow.lend(repr(self))

    def _agree(self, shadow: Shadow | None = None) -> None:
        """Check that the ranks that train together, if there are any, have the same average."""
        if self._ranks is None:
            return
        facts = {"algorithm": repr(self), "averaging has begun": self.ema_started}
        if shadow := shadow or self._shadow:
            shadow.agree(self._ranks, facts)
        else:
            self._ranks.agree("the average", facts)

    def _give_back(self) -> None:
        assert self._shadow is not None
        if self.ema_weights_active:
            self._shadow.give_back()
        self._lent_until = None

    def get_ema_model(self, model: nn.Module) -> nn.Module:
        """Put the average in ``model`` and return it.

        A model apart gets a copy. The model in training gets the average as a loan, so that nothing is lost:
        ``get_training_model`` ends it, and training refuses to go on before.

        Args:
            model: Any model with the names of the one in training, or that one itself.

        Raises:
            LoanError: If averaging has not begun, or another average is in the model.
            MismatchError: If names or shapes differ.
        """
        if unwrap(model) is self._model and not self.ema_weights_active:
            self._agree()  # first, so that what is refused on one rank is refused on all
        if self._shadow is None:
            raise LoanError(f"averaging must have begun before the average can be had; it begins at {self.ema_start}")
        if unwrap(model) is not self._model:
            self._shadow.copy_to(model)
        elif not self.ema_weights_active:
            self._shadow.lend(f"{self!r} (get_ema_model)")
        return model

    def get_training_model(self, model: nn.Module) -> nn.Module:
        """Put the training weights in ``model`` and return it; if it is the model in training, end the loan to it.

        Args:
            model: Any model with the names of the one in training, or that one itself.

        Raises:
            LoanError: If no model has been seen yet.
            MismatchError: If names or shapes differ.
        """
        if self._model is None:
            raise LoanError("the EMA must have seen a model in training before its weights can be had")
        if unwrap(model) is self._model:
            if self._shadow is not None:
                self._give_back()
        elif self._shadow is not None:
            self._shadow.copy_to(model, training=True)
        else:
            self._new_shadow(self._model).copy_to(model, training=True)
        return model

    # The plan

    def _on_fit_start(self, state: State) -> None:
        if swap := swap_of(state.model):
            raise LoanError(f"training must begin with training weights: {swap.holder} has swapped its average in")
        if TimeUnit.DURATION in self._schedule.units and state.max_duration is None:
            raise TimeError(f"times in dur need a run of known length: give max_duration, or other units to {self!r}")
        self._seconds = self._schedule.counts_seconds(state.max_duration)
        self._fit_from = state.timestamp.batch, self.num_updates
        if self.ema_started:
            # A state of Composer's does not say when the last update was; it was where the interval last ended.
            self._updated_at = self._updated_at or self._schedule.last_interval(state)
            if state.timestamp.batch < self._updated_at.batch:
                self._follow_new_clock(self._updated_at, state)
            return
        self._schedule.warn(state)

    def _follow_new_clock(self, updated_at: Timestamp, state: State) -> None:
        """Continue from a clock that begins anew, as in a second loop, as if no time had passed since the last update.

        Args:
            updated_at: When the last update was, by the old clock.
            state: With the new clock.
        """
        self._updated_at, unit = state.timestamp, self.profile.unit
        if unit is not None:
            elapsed = self._clock(updated_at, state) - self._clock(self._origin, state)
            if unit is TimeUnit.DURATION and state.max_duration is not None:
                elapsed, unit = elapsed * float(state.max_duration), state.max_duration.unit
            self._origin = state.timestamp.with_counter(Time(state.timestamp.elapsed(unit) - elapsed, unit))

    def _on_fit_end(self, state: State) -> None:
        if self._shadow is not None:
            self._quarantine_warned = self._shadow.warn_of_quarantine(self._quarantine_warned)
            self._warn_if_not_updated(state)
        elif self._waits[0]:
            self._warn_of_waits("averaging never started")
        elif state.timestamp.batch.value > 0:
            warnings.warn(
                f"averaging never started: ema_start='{self.ema_start}', update_interval='{self.update_interval}', and "
                f"the run ended at {state.timestamp.batch}, {state.timestamp.epoch}",
                PlanWarning,
                stacklevel=2,
            )

    def _warn_of_waits(self, what: str) -> None:
        (count, first), self._waits = self._waits, (0, None)
        assert first is not None
        warnings.warn(
            f"{what}: it waits for finite weights, and from {first.batch} on they were not at {count} "
            f"update{'s' if count > 1 else ''}; look for inf or nan in the loss and in what was loaded",
            PlanWarning,
            stacklevel=3,
        )

    def _warn_if_not_updated(self, state: State) -> None:
        if self._fit_from is None or self._updated_at is None:
            return
        if float(state.get_elapsed_duration() or 1.0) < 1:
            return  # it was cut short
        batch, updates = self._fit_from
        if updates == self.num_updates and state.timestamp.batch > max(batch, self._updated_at.batch):
            warnings.warn(
                f"the average was not updated in this run: it is that of {self._updated_at.batch}, and the run went "
                f"from {batch} to {state.timestamp.batch} (update_interval='{self.update_interval}'); shorten it",
                PlanWarning,
                stacklevel=2,
            )

    # State

    def state_dict(self) -> dict[str, Any]:
        """Return all that going on depends on, as tensors, numbers and strings.

        If it is taken while the average is lent, it has the training weights too, as ``training_model``. Where
        ``torch.distributed`` is in use it has the same entries before averaging has begun as after, the weights
        standing for their average: ``torch.distributed.checkpoint`` loads into what is there already.
        """
        if self._model is None and self._pending is not None:
            return dict(self._pending)
        lent = self.ema_weights_active
        state: dict[str, Any] = {"repr": repr(self), "polyak": 1, "ema_started": self.ema_started, "lent": lent}
        shadow = self._shadow
        if shadow is None and self._model is not None and is_initialized():
            shadow = self._new_shadow(self._model)
        if shadow is not None and self._model is not None:
            refuse_unsynchronized(self._ranks, self._model, self._policy)
            if self._ranks is not None and not self._ranks.replicas and not lent:
                self._agree(shadow)
            saved = shadow.state_dict()
            state |= {
                "ema_model": saved["averages"],
                "num_updates": saved["num_updates"],
                "num_quarantined": saved["num_quarantined"],
                "copied": saved["copied"],
                "waiting": saved["waiting"],
                "dtype": saved["dtype"],
                "origin": self._counters(self._origin),
                "updated": self._updated_at is not None,
                "updated_at": self._counters(self._updated_at or Timestamp()),
                "decay": self._decay,
            }
            if lent:
                state["training_model"] = saved["training"]
        return state

    def _counters(self, moment: Timestamp) -> dict[str, int | float | None]:
        """Return a moment as numbers. Wall clocks differ from run to run: 0 where nothing depends on them."""
        return moment.state_dict() | ({} if self._seconds else {"total_wct": 0})

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Resume from what ``state_dict`` returned, here or in MosaicML Composer (of both its forms).

        Before the algorithm has met its model, the state is kept until it does. A state that was taken while the
        average was in the model gives the model its training weights; load the model's own state before.

        Args:
            state: As saved.
            strict: Whether all names must match the model's. If not, there is a warning that lists those that do not:
                what is missing stays as it is, what is unexpected is left out. Shapes must match in any case.

        Raises:
            CheckpointError: If it is no such state.
            MismatchError: If names or shapes differ from the model's.
        """
        check_state(state)
        if self._model is None:
            self._pending, self._pending_strict, self._given = state, bool(strict), None
            return
        self._given = None
        if "polyak" not in state:
            state = from_composer(state, self._model, self._policy)
        elif state["repr"] != repr(self):
            warnings.warn(
                f"the run was averaged so far by {state['repr']} and continues with {self!r}", PlanWarning, stacklevel=2
            )
        if not state["ema_started"]:
            self._shadow = None
            return
        if state.get("lent") and "training_model" not in state:
            raise CheckpointError("a state that was taken while the average was lent must bring the training weights")
        shadow = self._shadow or self._new_shadow(self._model)
        averages, training = state["ema_model"], state.get("training_model")
        if not strict:
            averages, training = fitted(self._model, shadow.averages, averages, training)
        shadow.load_state_dict(
            {
                "averages": averages,
                "training": training,
                "num_updates": state["num_updates"],
                "num_quarantined": state["num_quarantined"],
                "copied": state.get("copied"),
                "waiting": state.get("waiting"),
                "dtype": state.get("dtype"),
            }
        )
        self._shadow = shadow
        self._origin = Timestamp.from_state_dict(state["origin"])
        self._updated_at = Timestamp.from_state_dict(state["updated_at"]) if state["updated"] else None
        self._decay = state["decay"]
        self._quarantine_warned = shadow.num_quarantined


def _check_options(**given: Any) -> None:
    """Check the arguments that are no times."""
    must = {
        "dtype": ("a torch.dtype or None", isinstance(given["dtype"], torch.dtype | None)),
        "policy": ("a function of a Slot that returns a Policy", callable(given["policy"])),
        "mesh": ("a DeviceMesh or None", given["mesh"] is None or hasattr(given["mesh"], "get_group")),
        "offload": ("an Offload, as Offload(), or None", isinstance(given["offload"], Offload | None)),
    }
    for name, (what, holds) in must.items():
        if not holds or isinstance(given[name], type):
            raise ArgumentError(f"{name} must be {what} (got {given[name]!r}, a {type(given[name]).__name__})")


# What copies of an EMA have in common.
_SHARED = ("_policy", "_mesh", "_ranks", "_offload")

"""The exponential moving average of weights, through the door that MosaicML Composer's users know.

``EMA`` decides when: when to begin, to update, to lend and to take back. How much is the profile's business, and how
the shadow's.
"""

import copy
import itertools
import math
import warnings
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from polyak import optimizers
from polyak.algorithm import Algorithm, MetricLogger, NoLogger, check_pickles
from polyak.errors import (
    CheckpointError,
    CopyError,
    LoanError,
    MismatchError,
    PlanWarning,
    PolyakError,
    ProfileError,
    TimeError,
)
from polyak.events import Event, State, refuse_uncounted
from polyak.kernels import Place, lerp_
from polyak.memory import write_
from polyak.offload import Offload
from polyak.plan import Plan, plan
from polyak.profiles import HalfLife, Profile, Smoothing
from polyak.select import (
    Policy,
    PolicyRule,
    averaged_parameters,
    check_match,
    default_policy,
    is_statistic,
    named_tensors,
    slots,
    unwrap,
)
from polyak.shadow import Shadow, refuse_unsynchronized
from polyak.sharding import Ranks, is_initialized, local
from polyak.swap import swap_of
from polyak.time import Time, Timestamp, TimeUnit, as_span

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
        given = {"half_life": half_life, "smoothing": smoothing, "profile": profile}
        if sum(value is not None for value in given.values()) != 1:
            raise ProfileError(f"give exactly one of half_life, smoothing and profile (got {given})")
        if half_life is not None:
            profile = HalfLife(half_life)
        elif smoothing is not None:
            profile = Smoothing(smoothing)
        assert profile is not None
        if not profile.recursive:
            raise ProfileError(
                f"one buffer must be able to follow the profile, and {profile!r} it cannot: what leaves the window "
                "would have to be forgotten; record the run and take this average from the record, or use HalfLife"
            )
        self.profile: Profile = profile
        self.half_life = profile.span if isinstance(profile, HalfLife) else None
        self.ema_start = as_span("ema_start", ema_start)
        if update_interval is None:
            update_interval = "1ep" if profile.unit is TimeUnit.EPOCH else "1ba"
        self.update_interval = as_span("update_interval", update_interval, above=0, whole=True)
        if math.isinf(self.update_interval.value):
            raise ProfileError("update_interval must be finite (got inf); an infinite half-life never moves either")
        self._dtype = dtype
        self._policy = policy
        self._mesh = mesh
        self._ranks: Ranks | None = None
        self._offload = offload
        self._model: nn.Module | None = None
        self._shadow: Shadow | None = None
        self._pending: Mapping[str, Any] | None = None
        self._origin = Timestamp()
        self._updated_at: Timestamp | None = None
        self._decay: float | None = None
        self._logged_at: Time | None = None
        self._fit_from: tuple[Time, int] | None = None  # the batch and the updates at which this run began
        self._lent_until: Event | None = None
        self._quarantine_warned = 0

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
        state = None if self._shadow is None else _cloned(self.state_dict())
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
            vars(new)["_pending"] = None if pending is None else _cloned(pending)
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
        return {**own, **unbound, "_pending": None if pending is None else _cloned(pending, "cpu")}

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

    @property
    def smoothing(self) -> float | None:
        """The share of the average that one update keeps, or None where it depends on what elapses."""
        if isinstance(self.profile, Smoothing):
            return self.profile.value
        if isinstance(self.profile, HalfLife) and self.profile.unit is self.update_interval.unit:
            return None if self.profile.unbiased else self.profile.decay(0, float(self.update_interval))
        return None

    @property
    def ema_started(self) -> bool:
        """Whether averaging has begun."""
        return self._shadow is not None

    @property
    def ema_weights_active(self) -> bool:
        """Whether the model holds the average now."""
        return self._shadow is not None and self._shadow.holder is not None

    @property
    def ema_model(self) -> nn.Module | None:
        """The average as a module over its own tensors, in eval mode: no copy. None before averaging has begun.

        While the average is lent this is the model in training. An offloaded average is on the CPU and moves while
        training goes on: get this anew at each use, which waits for the last update.
        """
        return self._shadow.averaged_model() if self._shadow else None

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
        """Return whether to act: at set-up, where an update is due, where a loan begins or ends."""
        if event in (Event.INIT, Event.FIT_START, Event.FIT_END):
            return True
        if event is (Event.EPOCH_END if self.update_interval.unit is TimeUnit.EPOCH else Event.BATCH_END):
            return self._due(state) if self.ema_started else self._may_start(state)
        if event in _LENDING:
            # Where several ranks train together, all compare what they have, also if it is nothing yet.
            return (self.ema_started or self._ranks is not None) and not self.ema_weights_active
        return self._lent_until is not None and event in (self._lent_until, Event.EXCEPTION)

    def apply(self, event: Event, state: State, logger: MetricLogger) -> None:
        """Begin, update, lend or take back the average."""
        if event is Event.INIT:
            self._bind(state.model)
        elif event is Event.FIT_START:
            self._bind(state.model)
            self._on_fit_start(state)
        elif event is Event.FIT_END:
            self._on_fit_end(state)
        elif event in _LENDING:
            self._agree()
            if event is Event.EVAL_START:
                self._log(state, logger)
            self._lend(event)
        elif self._lent_until is not None:
            self._give_back()
        elif self.ema_started:
            self._update(state)
        else:
            self._start(state)

    def _bind(self, model: nn.Module) -> None:
        """Learn whose weights these are, and load the state that came before the model did."""
        if self._model is not None and self._model is not unwrap(model):
            raise MismatchError("an EMA averages one model, and this one has another already; make a new EMA")
        self._model = unwrap(model)
        self._ranks = Ranks.of(model)
        optimizers.watch()  # from before the first step on
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self.load_state_dict(pending)

    def refuse_uncounted(self, state: State, counted: Collection[TimeUnit]) -> None:
        """Refuse times that the loop does not count; see ``Algorithm``."""
        # Where updates are at the ends of epochs, only whole ones matter.
        parts = self.update_interval.unit is not TimeUnit.EPOCH
        refuse_uncounted(f"update_interval='{self.update_interval}'", self.update_interval.unit, state, counted)
        if self.ema_start.value:
            part = parts and not isinstance(self.ema_start.value, int) and self.ema_start.unit is TimeUnit.EPOCH
            refuse_uncounted(f"ema_start='{self.ema_start}'", self.ema_start.unit, state, counted, fractions=part)
        if self.profile.unit is not None:
            given = f"profile={self.profile!r}" if self.half_life is None else f"half_life='{self.half_life}'"
            try:
                refuse_uncounted(given, self.profile.unit, state, counted, fractions=parts)
            except TimeError as error:
                if self.profile.unit is TimeUnit.DURATION and state.max_duration is None:
                    raise
                raise ProfileError(str(error)) from None

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
        assert self._updated_at is not None
        before, now = self._updated_at, state.timestamp
        interval, run = self.update_interval, state.max_duration
        return now.intervals(interval, run) > before.intervals(interval, run)

    def _start(self, state: State) -> None:
        model = state.model
        parameters = averaged_parameters(model, self._policy)
        if not all(bool(local(slot.tensor).detach().isfinite().all()) for slot in parameters):
            message = f"averaging waits: the weights are not finite at {state.timestamp.batch}"
            warnings.warn(message, PlanWarning, stacklevel=2)
            return
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
        assert self._updated_at is not None
        if self.profile.unit is None:
            before, now = float(self.num_updates), self.num_updates + 1.0
        else:
            moments = (self._origin, self._updated_at, state.timestamp)
            origin, last, this = (self._clock(moment, state) for moment in moments)
            before, now = max(0.0, last - origin), max(0.0, this - origin)
        self._decay = self.profile.decay(before, now)
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
        spans = [self.profile.unit, self.update_interval.unit, self.ema_start.unit if self.ema_start.value else None]
        if TimeUnit.DURATION in spans and state.max_duration is None:
            raise TimeError(f"times in dur need a run of known length: give max_duration, or other units to {self!r}")
        self._fit_from = state.timestamp.batch, self.num_updates
        if self.ema_started:
            # A state of Composer's does not say when the last update was; it was where the interval last ended.
            self._updated_at = self._updated_at or self._last_interval(state)
            if state.timestamp.batch < self._updated_at.batch:
                self._follow_new_clock(self._updated_at, state)
            return
        end = _convert(state.max_duration, TimeUnit.BATCH, state)
        first = self._first_update(state)
        if end is None or first is None or end <= float(state.timestamp.batch):
            return
        if first >= end:
            when = "never starts" if first > end else "starts only where the run ends"
            warnings.warn(
                f"averaging {when}: its first update is at {first:g}ba (ema_start='{self.ema_start}', "
                f"update_interval='{self.update_interval}') and the run ends at {end:g}ba",
                PlanWarning,
                stacklevel=2,
            )
        else:
            self._warn_of_first_weights(state, first, end)

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

    def _first_update(self, state: State) -> float | None:
        """Return the batch of the first update event at or past ``ema_start``, if it can be known."""
        start = _convert(self.ema_start, TimeUnit.BATCH, state)
        if self.update_interval.unit is TimeUnit.EPOCH:
            epoch = state.timestamp.epoch_length
            return None if start is None or epoch is None else max(1, math.ceil(start / epoch - 1e-9)) * float(epoch)
        return None if start is None else max(1.0, math.ceil(start - 1e-9))

    def _warn_of_first_weights(self, state: State, first: float, end: float) -> None:
        if isinstance(self.profile, HalfLife) and math.isinf(self.profile.span.value):
            return
        interval = _convert(self.update_interval, TimeUnit.BATCH, state)
        if interval is None:
            return
        updates = end // interval - first // interval
        if self.profile.unit is None:
            share = self.profile.decay(0, updates)
        else:
            origin = 0.0 if self.ema_start.value == 0 else first
            last = end // interval * interval if updates else first
            moments = [_convert(Time(t, TimeUnit.BATCH), self.profile.unit, state) for t in (origin, first, last)]
            known = [moment for moment in moments if moment is not None]
            share = None if len(known) < len(moments) else self.profile.decay(known[1] - known[0], known[2] - known[0])
        if share is not None and share > 0.5:
            warnings.warn(
                f"the first weights will still be {share:.1%} of the average at the end of the run (averaging from "
                f"{first:g}ba to {end:g}ba by {self.profile!r}); take a shorter half-life, or "
                "EMA(profile=HalfLife(..., unbiased=True)), which forgets them",
                PlanWarning,
                stacklevel=2,
            )

    def _on_fit_end(self, state: State) -> None:
        if self._shadow is not None:
            self._quarantine_warned = self._shadow.warn_of_quarantine(self._quarantine_warned)
            self._warn_if_not_updated(state)
        elif state.timestamp.batch.value > 0:
            warnings.warn(
                f"averaging never started: ema_start='{self.ema_start}', update_interval='{self.update_interval}', and "
                f"the run ended at {state.timestamp.batch}, {state.timestamp.epoch}",
                PlanWarning,
                stacklevel=2,
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

    def _last_interval(self, state: State) -> Timestamp:
        unit, interval = self.update_interval.unit, self.update_interval.value
        if unit is TimeUnit.DURATION:
            return state.timestamp
        return state.timestamp.with_counter(Time(state.timestamp.get(unit).value // interval * interval, unit))

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
                "origin": self._origin.state_dict(),
                "updated": self._updated_at is not None,
                "updated_at": (self._updated_at or Timestamp()).state_dict(),
                "decay": self._decay,
            }
            if lent:
                state["training_model"] = saved["training"]
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned, here or in MosaicML Composer (of both its forms).

        Before the algorithm has met its model, the state is kept until it does. A state that was taken while the
        average was in the model gives the model its training weights; load the model's own state before.

        Args:
            state: As saved.

        Raises:
            CheckpointError: If it is no such state.
            MismatchError: If names or shapes differ from the model's.
        """
        if "ema_started" not in state:
            raise CheckpointError(
                f"the state must be that of an EMA, of polyak or Composer (got the keys {sorted(state)})"
            )
        if self._model is None:
            self._pending = state
            return
        if "polyak" not in state:
            state = _from_composer(state, self._model, self._policy)
        elif state["repr"] != repr(self):
            warnings.warn(
                f"the run was averaged so far by {state['repr']} and goes on with {self!r}", PlanWarning, stacklevel=2
            )
        if not state["ema_started"]:
            self._shadow = None
            return
        if state.get("lent") and "training_model" not in state:
            raise CheckpointError("a state that was taken while the average was lent must bring the training weights")
        shadow = self._shadow or self._new_shadow(self._model)
        shadow.load_state_dict(
            {
                "averages": state["ema_model"],
                "training": state.get("training_model"),
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


# What copies of an EMA have in common.
_SHARED = ("_policy", "_mesh", "_ranks", "_offload")


def _cloned(state: Mapping[str, Any], device: str | None = None) -> dict[str, Any]:
    """Return a state whose tensors have memory of their own."""
    cloned = dict[str, Any]()
    for name, value in state.items():
        if isinstance(value, Tensor):
            cloned[name] = value.detach().to(device or value.device, copy=True)
        else:
            cloned[name] = _cloned(value, device) if isinstance(value, Mapping) else value
    return cloned


def _convert(time: Time | None, unit: TimeUnit, state: State) -> float | None:
    """Return a moment of the run in another unit, if what is known of the run allows."""
    if time is None or time.unit is unit:
        return None if time is None else float(time)
    if time.value == 0:
        return 0.0
    batches = _in_batches(time, state)
    if batches is None or unit is TimeUnit.BATCH:
        return batches
    one = _in_batches(Time(1, unit), state)
    return batches / one if one else None


def _in_batches(time: Time, state: State) -> float | None:
    if time.unit is TimeUnit.BATCH:
        return float(time)
    if time.unit is TimeUnit.EPOCH and state.timestamp.epoch_length:
        return time.value * state.timestamp.epoch_length
    if time.unit is TimeUnit.DURATION and state.max_duration and state.max_duration.unit is not TimeUnit.DURATION:
        run = _in_batches(state.max_duration, state)
        return None if run is None else time.value * run
    return None


def _from_composer(state: Mapping[str, Any], model: nn.Module, policy: PolicyRule) -> dict[str, Any]:
    """Translate the state of Composer's ``EMA``.

    Up to 0.12 it has the state dicts of two models. Later it has one set of tensors, which are the average, or, if
    ``ema_weights_active``, the training weights, the model then having been saved with the average in it.
    """
    known = named_tensors(model)

    def tensors(saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        wrapped = all(name.startswith("module.") for name in saved) and not saved.keys() & known.keys()
        return {name.removeprefix("module.") if wrapped else name: tensor for name, tensor in saved.items()}

    active = state["ema_weights_active"]
    held = state["ema_model"] or {}
    if "training_model" in state:
        average, training = tensors(held), tensors(state["training_model"] or {})
    else:
        average = training = tensors({**held["named_parameters_dict"], **held["named_buffers_dict"]})
        if active:
            average = {name: known[name].clone() if name in known else tensor for name, tensor in training.items()}
    # Composer averages integer buffers and cuts the result: those of the training weights are right.
    true = training if active else known
    # The state of a model also has frozen tensors, and tied ones under each of their names.
    wanted = {slot.name for slot in slots(model) if policy(slot) is not Policy.LEAVE}

    def fitting(side: Mapping[str, Tensor]) -> dict[str, Tensor]:
        kept = {name: tensor for name, tensor in side.items() if name in wanted or name not in known}
        return {
            name: tensor if tensor.is_floating_point() or name not in true else true[name].clone()
            for name, tensor in kept.items()
        }

    return {
        "ema_started": state["ema_started"],
        "ema_model": fitting(average),
        "training_model": fitting(training) if active else None,
        "num_updates": 0,
        "num_quarantined": 0,
        "origin": Timestamp().state_dict(),
        "updated": False,
        "decay": None,
    }

"""The average of one model while it trains, and the decision that is made at each event."""

import copy
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any

from torch import nn

from polyak.algorithm import check_event
from polyak.averaging import states, youth
from polyak.averaging.copies import check_copyable, copy_of_model
from polyak.averaging.progress import Progress
from polyak.averaging.schedule import Schedule
from polyak.averaging.settings import Settings
from polyak.averaging.swap import swap_of
from polyak.averaging.weights import Shadow
from polyak.errors import MismatchError
from polyak.events import Event, State
from polyak.sharding import OneProcess, Ranks, pipeline_communicator_of
from polyak.tensors import optimizers
from polyak.tensors.slots import unwrap


class Action(StrEnum):
    """What to do with an average at an event; ``actions.py`` does it."""

    NOTHING = "nothing"
    MEET = "meet"
    START_RUN = "start_run"
    END_RUN = "end_run"
    BEGIN = "begin"
    UPDATE = "update"
    SWAP_IN = "swap_in"
    RESTORE = "restore"
    REPORT_WAITS = "report_waits"


_UPDATES = {Event.BATCH_END, Event.EPOCH_END}
_RUN = {Event.INIT: Action.MEET, Event.FIT_START: Action.START_RUN, Event.FIT_END: Action.END_RUN}
# The event at which the average is swapped in, and the one at which the training weights are restored.
SWAPS = {
    Event.EVAL_START: Event.EVAL_END,
    Event.PREDICT_START: Event.PREDICT_END,
    Event.SAVE_START: Event.SAVE_END,
}


class OnlineAverage:
    """The average of one model: when it begins and updates, when it is in the model, what is saved and copied.

    Args:
        schedule: When and how much it moves.
        settings: How it is kept.
        name: The name of the average in errors and states.
        kind: Makes the averaged tensors of a model.

    Attributes:
        model: The model in training, unwrapped; None until it is known.
        ranks: The ranks that train the model together, if there are several.
        progress: The moments that the decay depends on.
        pending: A state that waits for the model, and whether its names must match.
        given: The average that the user has set, until the model is known.
        quarantine_warned: How many tensors with NaN or inf have been reported.
        warned_of_range: Whether values beyond the range of the average's dtype have been reported.
        restore_at: The event at which the training weights are restored; None if no event has swapped the average in.
    """

    def __init__(self, schedule: Schedule, settings: Settings, name: str, kind: Callable[..., Shadow] = Shadow) -> None:
        self.schedule, self.settings, self.name, self.kind = schedule, settings, name, kind
        self.model: nn.Module | None = None
        self.ranks: Ranks | None = None
        self._pipeline: Ranks | None = None
        self.progress = Progress(counts_seconds=schedule.counts_seconds(None))
        self.pending: tuple[Mapping[str, Any], bool] | None = None
        self.given: nn.Module | None = None
        self.restore_at: Event | None = None
        self._shadow: Shadow | None = None
        self._copied: Mapping[str, Any] | None = None
        self.quarantine_warned = 0
        self.warned_of_range = False

    @property
    def shadow(self) -> Shadow | None:
        """The averaged tensors; None before averaging has begun.

        In a copy they are made when they are first needed, since the model has no tensors while it is being copied.
        """
        if self._copied is not None:
            state, self._copied = self._copied, None
            try:
                states.load(self, state)
            except BaseException:
                self._copied = state
                raise
        return self._shadow

    @shadow.setter
    def shadow(self, shadow: Shadow | None) -> None:
        self._shadow, self._copied = shadow, None

    @property
    def started(self) -> bool:
        """Whether averaging has begun, or will with the state that waits for the model."""
        if self._shadow is not None or self._copied is not None:
            return True
        return self.pending is not None and bool(self.pending[0]["ema_started"])

    @property
    def active(self) -> bool:
        """Whether the model holds the average now."""
        return self.shadow is not None and self.shadow.owner is not None

    def new_shadow(self, model: nn.Module) -> Shadow:
        """Return averaged tensors that begin with a model's weights.

        Args:
            model: Wrapped or not.
        """
        own = self.settings
        return self.kind(model, dtype=own.dtype, policy=own.policy, mesh=own.mesh, offload=own.offload)

    # The decision

    def decide(self, event: Event, state: State, *, by_hand: bool = False) -> Action:  # noqa: PLR0911  a table
        """Return what to do at an event, without changing anything.

        Args:
            event: The event.
            state: The loop's state.
            by_hand: Whether to update or swap even if that is not due, since the caller has asked before.

        Raises:
            ArgumentError: If the event is another trainer's.
        """
        if not isinstance(event, Event):
            check_event(event, "EMA")
        schedule, started = self.schedule, self._shadow is not None or self.started
        if event in _UPDATES:
            if not by_hand:
                if schedule.by_epoch is (event is Event.BATCH_END):
                    return Action.NOTHING
                updated_at = self.progress.updated_at
                if not (schedule.is_due(updated_at, state) if started else schedule.may_start(state)):
                    return Action.NOTHING
            if self.restore_at is not None:
                return Action.RESTORE  # the loop has left an evaluation without its end
            return Action.UPDATE if started else Action.BEGIN
        if event in SWAPS:
            # Ranks that train together compare their averages, even if averaging has not begun.
            together = self.ranks is not None or self.in_pipeline
            warns = not self.progress.warned_of_youth and state.timestamp.batch.value > 0
            wanted = by_hand or ((started or together or warns) and not self.active)
            return Action.SWAP_IN if wanted else Action.NOTHING
        if self.restore_at is not None and event in (self.restore_at, Event.EXCEPTION):
            return Action.RESTORE
        if event is Event.EXCEPTION and self.progress.waits:
            return Action.REPORT_WAITS
        return _RUN.get(event, Action.NOTHING)

    def meet(self, model: nn.Module) -> None:
        """Learn which model is averaged, and load the state that has waited for it.

        Args:
            model: Wrapped or not.

        Raises:
            MismatchError: If it is another model than before.
        """
        if self.model is not None and self.model is not unwrap(model):
            raise MismatchError("an EMA averages one model, and this one has another already; make a new EMA")
        self.model = unwrap(model)
        self.ranks = Ranks.of(model)
        optimizers.watch()  # before the first step
        if self.pending is not None:
            (state, strict), self.pending = self.pending, None
            states.load(self, state, strict)

    @property
    def in_pipeline(self) -> bool:
        """Whether the model is known to be a stage of a pipeline."""
        return self._pipeline is not None

    def pipeline(self) -> Ranks | None:
        """Return the ranks of all stages if the model is a stage of a pipeline. All of them must call this.

        A stage may be made after averaging has begun, so this looks for one each time until it has found one.
        """
        if self._pipeline is None and self.model is not None:
            self._pipeline = pipeline_communicator_of(self.model, self.ranks or OneProcess())
        return self._pipeline

    def restore(self) -> None:
        """Restore the training weights, if the model holds the average."""
        if self.shadow is not None and self.active:
            self.shadow.restore()
        self.restore_at = None

    def warn_of_quarantine(self) -> None:
        """Warn if weights with NaN or inf were kept out since the last call."""
        if self.shadow is not None:
            self.quarantine_warned = self.shadow.warn_of_quarantine(self.quarantine_warned)

    def warn_before_use(self, what: str) -> None:
        """Warn, once each, if the first weights are more than half of the average, or values exceed its dtype.

        Args:
            what: How the average is used, such as ``"evaluated"``.
        """
        youth.warn_of_youth(self.schedule, self.progress, self.num_updates, what)
        self.warn_of_range()

    def warn_of_range(self) -> None:
        """Warn, once, if weights exceed the range of the average's dtype."""
        if self.shadow is not None and not self.warned_of_range:
            self.warned_of_range = self.shadow.warn_of_range()

    def agree(self, shadow: Shadow | None = None) -> None:
        """Check that ranks that train together have the same average, and stages of a pipeline the same update count.

        Args:
            shadow: The average to compare; None for this one.
        """
        facts: dict[str, Any] = {"algorithm": self.name, "averaging has begun": self.started}
        if (pipeline := self.pipeline()) is None:
            self._agree(shadow, facts)
        else:
            facts["number of updates"] = self.num_updates
            facts["swapped in"] = (swap_of(self.model) if self.model is not None else None) is not None
            pipeline.on_every_rank("the average", lambda: self._agree(shadow, {}), facts)

    def _agree(self, shadow: Shadow | None, facts: dict[str, Any]) -> None:
        if self.ranks is None:
            return
        if self.active:  # ranks that have not swapped it in send other facts
            self.ranks.agree("the average", {**facts, "swapped in": self.shadow and self.shadow.owner})
        elif shadow := shadow or self.shadow:
            shadow.agree(self.ranks, facts)
        else:
            self.ranks.agree("the average", facts)

    @property
    def num_updates(self) -> int:
        """How often the average has moved."""
        return self.shadow.num_updates if self.shadow else 0

    def metrics(self) -> dict[str, float]:
        """Return the decay of the last update and the distance of the weights; nothing before averaging has begun."""
        if self.shadow is None:
            return {}
        decay = {} if self.progress.decay is None else {"ema/decay": self.progress.decay}
        return decay | {"ema/distance": self.shadow.distance(self.ranks, self.pipeline())}

    # Copies

    def __deepcopy__(self, memo: dict[int, Any]) -> "OnlineAverage":
        """Return the same average with its own memory, bound to the copy of the model in ``memo`` or to a new one.

        It is not swapped in: if this one is, the copy's model gets its training weights when it is attached.

        Args:
            memo: What ``copy.deepcopy`` has copied, by id.

        Raises:
            CopyError: If the average is sharded, or the model cannot be copied.
        """
        check_copyable(self)
        new = memo[id(self)] = OnlineAverage(self.schedule, self.settings, self.name, self.kind)
        state = None if self.shadow is None else states.cloned(states.state_of(self))
        new.progress, new.ranks = copy.copy(self.progress), self.ranks
        new.quarantine_warned, new.warned_of_range = self.quarantine_warned, self.warned_of_range
        new.given = copy.deepcopy(self.given, memo)
        new.model = copy_of_model(self.model, memo)
        if state is not None:
            new._copied = {**state, "lent": False, "training_model": None}
        if state is None or state["lent"]:
            waiting = self.pending if state is None else (state, True)
            new.pending = None if waiting is None else (states.cloned(waiting[0]), waiting[1])
        return new

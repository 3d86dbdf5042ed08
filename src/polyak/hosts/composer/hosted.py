"""Algorithms of polyak as algorithms of Composer's trainer: ``Hosted``, ``EMA`` and ``Recorder``."""

import copy
import functools
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer.algorithms.ema import ema as composers
from composer.core import Algorithm as ComposerAlgorithm
from torch.optim import Optimizer

import polyak.averaging.ema
import polyak.record.recorder
from polyak.algorithm import Algorithm, MetricLogger, NoLogger, check_one_swaps, dispatch
from polyak.averaging.habits import absent
from polyak.errors import AbsentError, ArgumentError, PlanWarning
from polyak.events import Event
from polyak.hosts.composer.clock import View
from polyak.sharding import whole
from polyak.training.between import Between
from polyak.training.evalweights import EvalWeights, eval_weights_of, refuse_raw_of_averaged
from polyak.training.handle import OF_A_TRAINERS, Handle
from polyak.training.optimizer import counted_optimizer, moves_parameters
from polyak.training.steps import StepHooks

_OURS: Mapping[str, Event] = {event.value: event for event in Event}
# An evaluator whose label ends so evaluates the training weights.
_RAW = "_raw"
# Where the trainer's evaluators are known, and none of them has run.
_BEFORE_EVALUATIONS = frozenset({Event.AFTER_LOAD, Event.FIT_START, Event.EVAL_STANDALONE_START})


class Hosted(Handle, ComposerAlgorithm):
    """An algorithm of polyak as an algorithm of Composer's trainer, with the same attributes.

    It is also the handle of the average: ``model``, ``applied()``, ``save`` and more, once ``fit`` has begun.

    Evaluators whose label ends in ``_raw`` see the training weights, all others those that the algorithm swaps in.

    Args:
        algorithm: Any. For ``EMA`` and ``Recorder`` there are classes of these names, which read Composer's states.
        eval_weights: Which weights the evaluators use: ``"averaged"``, ``"raw"`` (the training weights) or ``"both"``.
            With both, each evaluator of the trainer gets a second one on the same data, whose label ends in ``_raw``:
            ``metrics/eval/...`` are those of the average, ``metrics/eval_raw/...`` those of the training weights.

    Attributes:
        algorithm: As given.
    """

    def __init__(self, algorithm: Algorithm, *, eval_weights: EvalWeights = "averaged") -> None:
        super().__init__()
        self.algorithm = algorithm
        self._weights = eval_weights_of(eval_weights)
        self._view = View()
        self._hooks = list[StepHooks]()
        self._stepped = self._clock_checked = False

    @property
    def algorithms(self) -> list[Algorithm]:  # type: ignore[override]
        """The algorithm alone."""
        return [self.algorithm]

    def _follows(self) -> "_Followed | None":
        return None if self._view.composers is None else _Followed(self)

    @property
    def num_updates(self) -> int:
        """That of the algorithm."""
        return self.algorithm.num_updates  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        return repr(self.algorithm)

    def __getattr__(self, name: str) -> Any:
        if name == "algorithm":  # not set yet
            raise AttributeError(name)
        try:
            return getattr(self.algorithm, name)
        except AbsentError:
            raise absent(self, name, OF_A_TRAINERS) from None

    def __setattr__(self, name: str, value: Any) -> None:
        # An attribute of the algorithm is set, or refused, there: set here it would have no effect.
        known = vars(self).get("algorithm")
        own = name in vars(self) or hasattr(type(self), name)
        target = known if known is not None and not own and hasattr(known, name) else self
        object.__setattr__(self, name, value) if target is self else setattr(target, name, value)

    def match(self, event: Any, state: Any) -> bool:
        """Return whether polyak has this event; ``apply`` asks the algorithm itself.

        Args:
            event: Composer's.
            state: Composer's.

        Raises:
            LoanError: If an evaluator of raw weights begins while the model holds an average.
        """
        labelled = event.is_eval and str(state.dataloader_label).endswith(_RAW)
        if labelled and event.value == Event.EVAL_START.value:
            refuse_raw_of_averaged(state.model)
        raw = labelled or (event.is_eval and self._weights == "raw")
        return event.value in _OURS and not raw

    def apply(self, event: Any, state: Any, logger: Any) -> None:
        """Dispatch the event to the algorithm.

        Args:
            event: Composer's.
            state: Composer's.
            logger: Composer's.
        """
        ours = _OURS[event.value]
        if self._weights == "both" and ours in _BEFORE_EVALUATIONS:
            _evaluate_raw_too(state)
        if ours is Event.INIT:
            _check(self, state)
        elif ours is Event.AFTER_LOAD and state.fsdp_enabled:
            # The model is sharded by now, which must be known also where an evaluation comes before training.
            self.fire(Event.INIT, state, logger)
        elif ours is Event.FIT_START:
            self._view.learn(state)
            self._view.begin_fit()
            self.algorithm.refuse_uncounted(self._view, self._view.counts)
            self._clock_checked = False
            self._count_steps(state)
        elif ours is Event.EPOCH_START:
            self._view.begin_epoch()
        elif ours is Event.BATCH_START:
            self._stepped = False
        elif ours is Event.BATCH_END:
            self._view.end_batch(stepped=self._stepped)
            if not self._clock_checked:
                self._clock_checked = True  # the first batch has shown what is counted
                self.algorithm.refuse_uncounted(self._view, self._view.counts)
            if not self._stepped:
                return
        self.fire(ours, state, logger)

    def fire(self, event: Event, state: Any, logger: MetricLogger) -> None:
        """Dispatch an event of polyak's to the algorithm.

        Args:
            event: Ours.
            state: Composer's.
            logger: Composer's, or another.
        """
        self._view.composers = state
        dispatch(event, self._view, [self.algorithm], logger)

    def saving_to(self, path: Path | None) -> None:
        """Note the path of the checkpoint that is being written.

        Args:
            path: None if none is.
        """
        self._view.saving_to = path

    def _count_steps(self, state: Any) -> None:
        for hooks in self._hooks:
            hooks.remove()
        self._hooks = [StepHooks(counted_optimizer(optimizer), self._on_step) for optimizer in state.optimizers]
        for hooks in self._hooks:
            hooks.replaced = functools.partial(self._warn_of_replaced, hooks)

    def _on_step(self) -> None:
        self._stepped = True

    def _warn_of_replaced(self, hooks: StepHooks, other: Optimizer) -> None:
        if not moves_parameters(other, self._view.model):
            return
        warnings.warn(
            "steps must be counted to be averaged: those of the optimizer that the trainer had at the start of fit() "
            f"are, and {hooks.others} of {hooks.other}, which steps the same parameters, were not; give the trainer "
            "that optimizer, and call fit() again",
            PlanWarning,
            stacklevel=5,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the algorithm's state, and the batches that its clock leaves out."""
        # Composer calls this on all ranks and saves what rank 0 returns, in a folder of shards as in one file.
        return {**whole(self.algorithm.state_dict()), "composer_skipped": self._view.state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from what ``state_dict`` returned.

        Args:
            state: The saved state.
        """
        self._load_clock(state)
        self.algorithm.load_state_dict(state)

    def _load_clock(self, state: Mapping[str, Any]) -> None:
        self._view.load(state.get("composer_skipped", []))


class _Followed:
    """The members of Composer's trainer that ``Handle`` needs.

    Args:
        hosted: The algorithm in Composer's trainer.
    """

    def __init__(self, hosted: Hosted) -> None:
        self._hosted = hosted
        self.state = hosted._view  # noqa: SLF001  this is a part of it

    def between(self, start: Event, end: Event) -> Between:
        """Return a context that fires ``start`` before its block and ``end`` after it.

        Args:
            start: Such as ``EVAL_START``.
            end: Such as ``EVAL_END``.
        """
        return Between(lambda e: self._hosted.fire(e, self.state.composers, NoLogger()), self.state, start, end)

    def warn_of_uncounted(self) -> None:
        """Do nothing: Composer's own clock counts."""


class EMA(Hosted):
    """``polyak.EMA`` for Composer's trainer: evaluates, predicts and saves with the average of the weights.

    It loads the states of Composer's own ``EMA``, of releases up to 0.12 and since.

    Args:
        *args: As ``polyak.EMA``, whose first four are those of Composer's.
        eval_weights: As for ``Hosted``.
        **options: As ``polyak.EMA``.
    """

    def __init__(self, *args: Any, eval_weights: EvalWeights = "averaged", **options: Any) -> None:
        super().__init__(polyak.averaging.ema.EMA(*args, **options), eval_weights=eval_weights)

    if not TYPE_CHECKING:  # type checkers would take the other class for `self`
        __init__ = functools.wraps(polyak.averaging.ema.EMA.__init__)(__init__)

    def apply(self, event: Any, state: Any, logger: Any) -> None:
        """Dispatch the event to the algorithm. An update by hand, outside of a fit, is made whether or not it is due.

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
        """Return the state, with the entry from which Composer's own ``EMA`` can resume."""
        state = super().state_dict()
        return {**state, "ema_weights_active": state.get("lent", False)}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Resume from what ``state_dict`` returned, of this class or of Composer's own ``EMA``.

        Args:
            state: The saved state.
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

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(polyak.record.recorder.Recorder(*args, **options))

    if not TYPE_CHECKING:  # type checkers would take the other class for `self`
        __init__ = functools.wraps(polyak.record.recorder.Recorder.__init__)(__init__)


def hosted_in(state: Any) -> list[Hosted]:
    """Return the algorithms of polyak among those of a trainer.

    Args:
        state: Composer's.
    """
    return [algorithm for algorithm in state.algorithms if isinstance(algorithm, Hosted)]


def _evaluate_raw_too(state: Any) -> None:
    """Give each evaluator a second one before it, which evaluates the training weights on the same data.

    Args:
        state: Composer's.
    """
    labels = {evaluator.label for evaluator in state.evaluators}
    evaluators = []
    for evaluator in state.evaluators:
        label = f"{evaluator.label}{_RAW}"
        if not evaluator.label.endswith(_RAW) and label not in labels:
            raw = copy.copy(evaluator)
            raw.label = label
            state.eval_metrics[label] = copy.deepcopy(state.eval_metrics[evaluator.label])
            evaluators.append(raw)
        evaluators.append(evaluator)
    state.evaluators = evaluators


def _check(hosted: Hosted, state: Any) -> None:
    """Refuse arguments that cannot work in Composer."""
    if state.fsdp_config_version == 1 or state.tp_config is not None:
        raise NotImplementedError(
            "each process must hold the full model or its FSDP2 shards: FSDP1 keeps flat parameters, whose average "
            "cannot be saved by name, and tensor parallelism is not supported in Composer; train with FSDP2 "
            '(parallelism_config={"fsdp": FSDP2Config()}), with DDP, or in polyak.Trainer'
        )
    ours = hosted_in(state)
    swapping = [a for a in ours if a.algorithm.swaps]
    check_one_swaps([*swapping, *(a for a in state.algorithms if isinstance(a, composers.EMA))])
    same = [a for a in ours if type(a) is type(hosted)]
    if len(same) > 1:
        raise ArgumentError(
            f"Composer keeps one state for each class of algorithms, so there can be one {type(hosted).__qualname__} "
            f"(got {same}); give the others subclasses"
        )

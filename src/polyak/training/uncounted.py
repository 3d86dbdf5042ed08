"""``Uncounted``: warnings about weights that move without a counted step."""

import warnings
from collections.abc import Callable

from torch import nn
from torch.optim import Optimizer

from polyak.averaging.swap import swap_of
from polyak.errors import PlanWarning
from polyak.training.moved import BetweenSteps, moved_names, norms_of, parameters_of
from polyak.training.optimizer import BY_HAND, moves_parameters
from polyak.training.steps import MANY, StepHooks


class Uncounted:
    """Warns, once, if weights have moved without a counted step.

    Args:
        model: The model in training, wrapped or not. Its weights are noted.
        hooks: The hooks on the optimizer whose steps are counted; None if they are counted by hand.
        replaced: Called when another optimizer seems to have replaced it.

    Attributes:
        hooks: As given.
    """

    def __init__(self, model: nn.Module, hooks: StepHooks | None, replaced: Callable[[], object]) -> None:
        self._model, self.hooks, self._warned = model, hooks, False
        self._before, self._counted = norms_of(parameters_of(model)), 0
        self._replaced = replaced
        self._between: BetweenSteps | None = None
        if hooks is not None:
            hooks.replaced, hooks.moves = self._check, self._moves
            hooks.between = self._between = BetweenSteps(model, hooks.steps, f"{BY_HAND}, after that")

    def reset(self, counted: int) -> None:
        """Note the weights again: they were loaded.

        Args:
            counted: The number of steps that were counted since this was made.
        """
        self._before, self._counted = norms_of(parameters_of(self._model)), counted
        if self._between is not None:
            self._between.forget()

    def _moves(self, other: Optimizer) -> bool:
        return moves_parameters(other, self._model)

    def _check(self, other: Optimizer) -> None:
        if self._moves(other):
            self._replaced()

    def warn(self, counted: int, *, ended: bool = False) -> None:
        """Warn if weights have moved since the last counted step, as far as that can be seen.

        Args:
            counted: The number of steps that were counted since this was made.
            ended: Whether the run has ended; its trainer may have loaded the best weights.
        """
        if self._warned or swap_of(self._model) is not None:
            return
        message = self._of_other_optimizers(counted) or self._of_weights(counted, ended=ended)
        if message is not None:
            self._warned = True
            warnings.warn(message, PlanWarning, stacklevel=5)

    def _of_other_optimizers(self, counted: int) -> str | None:
        hooks = self.hooks
        if hooks is None or not (hooks.others or hooks.besides >= MANY):
            return None
        steps, which = (hooks.others, "the same") if hooks.others else (hooks.besides, "other")
        optimizer = hooks.optimizer
        name = "the optimizer that was attached" if optimizer is None else type(optimizer).__name__
        gone = ", which is gone," if optimizer is None else ""
        return (
            f"steps must be counted to be averaged: {counted} of {name}{gone} were, and since then {steps} of "
            f"{hooks.other}, which steps {which} parameters, were not; attach the algorithm to that {hooks.other}, or "
            f"{BY_HAND}"
        )

    def _of_weights(self, counted: int, *, ended: bool) -> str | None:
        """Compare the weights with those of the last check, if no step was counted since then."""
        if counted != self._counted or (ended and counted):
            message = self._of_still_weights(counted)
            self._before, self._counted = norms_of(parameters_of(self._model)), counted
            return message
        moved = moved_names(self._before, norms_of(parameters_of(self._model, self._before.keys())))
        if not moved or (self.hooks is not None and callable(getattr(self.hooks.optimizer, "eval", None))):
            return None  # or the optimizer itself changes weights for an evaluation, as schedule-free ones do
        remedy = (
            f"let the loop call step() of {type(self.hooks.optimizer).__name__}, or {BY_HAND}"
            if self.hooks
            else "call step() of what attach returned once after each batch"
        )
        since = f" since the last check, after {counted} steps" if counted else ""
        loaded = "nothing is wrong" if counted else "load them before attach"
        return (
            f"steps must be counted to be averaged: {len(moved)} parameters have moved{since}, such as '{moved[0]}', "
            f"and 0 steps were counted; {remedy} (if these weights were loaded and not trained, {loaded})"
        )

    def _of_still_weights(self, counted: int) -> str | None:
        """Compare the weights, at the first check, with those at the start, if steps are counted by hand."""
        if self.hooks is not None or self._counted or counted < _MOVED or not self._before:
            return None
        if moved_names(self._before, norms_of(parameters_of(self._model, self._before.keys()))):
            return None
        return (
            f"weights must move to be averaged: {counted} steps were counted by hand, and no parameter has moved; give "
            "attach the model that the loop trains, and copy its weights into it before step() if they are kept "
            "elsewhere, as with torch.func"
        )


_MOVED = 2  # steps after which weights have moved: the first may have a learning rate of 0

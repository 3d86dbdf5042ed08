"""``StepHooks``: calls a function after each step of an optimizer that counts."""

import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from polyak.tensors import optimizers
from polyak.training.moved import BetweenSteps
from polyak.training.optimizer import BY_HAND, tensors_of

# After so many steps in a row, another optimizer is taken to have replaced one that still exists.
MANY = 100
# Functions of torch.distributed.checkpoint and torchtitan that step an optimizer to initialize a state to load into.
_REHEARSALS = frozenset({"_init_optim_state", "init_optim_state"})


@dataclass(slots=True)
class _Call:
    """A step that is running: the outermost one of its optimizer.

    Args:
        frame: The frame of torch's wrapper of ``step``, with which a nested step finds this one among its callers.
        rehearsal: Whether ``torch.distributed.checkpoint`` makes it, to initialize a state to load into.
        graded: Whether it began with gradients that it uses.
        versions: The versions of all tensors, if gradients may not show whether the step moved them.
        nested: The number of steps of a parent class that are running inside it.
    """

    frame: FrameType
    rehearsal: bool
    graded: bool
    versions: list[int]
    nested: int = 0


class StepHooks:
    """Hooks on the steps of an optimizer, until they are removed.

    These do not count: steps that mixed precision skips, steps without gradients, a subclass's call of its parent's
    step, and the step by which ``torch.distributed.checkpoint`` initializes a state to load into.

    Args:
        optimizer: As ``counted_optimizer`` returns it.
        after: Called after each step that counts.
        first: Called once, before the first step.

    Attributes:
        others: How many steps other optimizers have made on the same tensors since the last step that counted.
        besides: How many steps optimizers of other tensors of the model have made since then.
        other: The name of the last of these optimizers.
        moves: Returns whether an optimizer moves a tensor of the model.
        replaced: Called with another optimizer that steps instead of this one: if it steps the same tensors and this
            one no longer exists, in its first step, otherwise after many steps.
        between: Checks that weights do not change between two steps; None if nothing does.
    """

    def __init__(
        self, optimizer: Optimizer, after: Callable[[], object], first: Callable[[], object] | None = None
    ) -> None:
        self.others, self.besides, self.other = 0, 0, ""
        self.moves: Callable[[Optimizer], bool] = lambda _: False
        self.replaced: Callable[[Optimizer], object] | None = None
        self.between: BetweenSteps | None = None
        self._after, self._first = after, first
        self._optimizer = weakref.ref(optimizer)
        # Not weak references, with which torch cannot swap tensors. An id may be that of another tensor later.
        self._of = {id(tensor) for tensor in tensors_of(optimizer)}
        # By optimizer: how many tensors it had, and whether it steps one of these, or else one of the model.
        self._known = WeakKeyDictionary[Optimizer, tuple[int, bool, bool]]()
        self._call: _Call | None = None
        self._guarded = False  # whether the hook on all optimizers has just run for this step
        self._keeps_gradients = False  # whether its steps leave the gradients as they are, as most optimizers' do
        # An average moves inside the hooks, which cannot be traced: `torch.compile` runs them between two graphs.
        self._hooks = [
            optimizer.register_step_pre_hook(_untraced(self._enter)),
            optimizer.register_step_post_hook(_untraced(self._leave)),
        ]
        _observe_others(self)

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer, unless it no longer exists."""
        return self._optimizer()

    def _enter(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not self._guarded:  # the step is compiled
            optimizers.before_step(optimizer)
        self._guarded = False
        frame, rehearsal = _hooked_frame(), False
        # If a call is left over, this step is nested in it, or it is that of a step that raised. A counter of nested
        # steps would stay wrong after such an error. A rehearsal is made only if there is no state.
        if self._call is not None or not getattr(optimizer, "state", None):
            nested, rehearsal = self._callers(frame)
            if nested:
                return
        if self.between is not None and self.between.noted:
            self.between.check()
        # A closure computes new gradients, so those from before do not matter.
        has_closure = len(args) + len(kwargs) > 1 and any(map(callable, (*args[1:], *kwargs.values())))
        graded = not has_closure and _has_gradients(optimizer)
        versions = [] if graded or self._keeps_gradients else _versions(optimizer)
        self._call = _Call(frame, rehearsal, graded, versions)
        if self._first is not None and not rehearsal:
            first, self._first = self._first, None
            first()

    def _callers(self, frame: FrameType) -> tuple[bool, bool]:
        """Note a step that runs inside that of a subclass; return whether it does, and whether it is a rehearsal."""
        call, rehearsal = self._call, False
        outer = frame.f_back
        while outer is not None:
            if call is not None and outer is call.frame:
                call.nested += 1
                return True, False
            # Its effects alone do not show it: a real step in a warm-up from a learning rate of 0 has the same.
            rehearsal = rehearsal or outer.f_code.co_name in _REHEARSALS
            outer = outer.f_back
        return False, rehearsal

    def _leave(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        del args, kwargs
        call = self._call
        if call is None:
            return  # the hooks were registered inside this step
        # A step that `torch.compile` has split has another frame by now.
        if call.nested and call.frame is not _hooked_frame():
            call.nested -= 1
            return
        self._call = None
        moved = call.graded
        if not (moved and self._keeps_gradients):
            graded_after = _has_gradients(optimizer)
            self._keeps_gradients = self._keeps_gradients or graded_after
            # Some optimizers free inside a step the gradients that a closure computed.
            moved = moved or graded_after or (bool(call.versions) and _versions(optimizer) != call.versions)
        if not moved or call.rehearsal:
            return
        # With an inf in the gradients, a gradient scaler still calls a fused step, which then moves nothing.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None or not found_inf:
            self.others = self.besides = 0
            self._after()
            if self.between is not None:
                self.between.wait -= 1
                if not self.between.wait:
                    self.between.note()

    def observe(self, other: Optimizer) -> None:
        """Note that an optimizer is about to step.

        Args:
            other: The optimizer; it may be this one.
        """
        if other is self._optimizer():
            self._guarded = True
            return
        same, besides = self._relation(other)
        if not (same or besides) or not (other.state or not _is_rehearsal()):
            return
        self.others, self.besides, self.other = self.others + same, self.besides + besides, type(other).__name__
        if same and self.between is not None and self.between.noted:
            self.between.check()  # what this one moves now is not seen, and what it has moved after a step inside it is
        first = 1 if self._optimizer() is None else MANY
        if self.replaced is not None and ((same and self.others == first) or (besides and self.besides == MANY)):
            self.replaced(other)

    def _relation(self, other: Optimizer) -> tuple[bool, bool]:
        """Return whether an optimizer steps one of these tensors, or else another one of the model."""
        count = sum(len(group["params"]) for group in other.param_groups)
        known = self._known.get(other)
        if known is None or known[0] != count:
            same = any(id(tensor) in self._of for tensor in tensors_of(other))
            known = self._known[other] = count, same, not same and self.moves(other)
        return known[1], known[2]

    @property
    def counting(self) -> bool:
        """Whether steps are counted: the optimizer exists, and the hooks were not removed."""
        return bool(self._hooks) and self._optimizer() is not None

    def steps(self, tensor: Tensor) -> bool:
        """Return whether the optimizer steps a tensor.

        Args:
            tensor: Any tensor.
        """
        return id(tensor) in self._of

    def overlaps(self, other: "StepHooks") -> bool:
        """Return whether another optimizer moves one of the same tensors.

        Args:
            other: Hooks on that optimizer.
        """
        return not self._of.isdisjoint(other._of)  # noqa: SLF001

    def remove(self) -> bool:
        """Remove the hooks; return whether they were still there."""
        counting = bool(self._hooks)
        while self._hooks:
            self._hooks.pop().remove()
        _no_longer_observe(self)
        return counting


def _is_rehearsal() -> bool:
    """Return whether the running step only initializes a state to load into."""
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001
    while frame is not None and frame.f_code.co_name not in _REHEARSALS:
        frame = frame.f_back
    return frame is not None


def _untraced(hook: Callable[..., None]) -> Callable[..., None]:
    reason = f"polyak counts the steps of an optimizer in its hooks; to compile it with fullgraph=True, {BY_HAND}"
    return torch.compiler.disable(hook, reason=reason)


def _hooked_frame() -> FrameType:
    """Return the frame that runs the hook from which this is called, without those of ``torch.compiler.disable``."""
    frame = sys._getframe(2)  # noqa: SLF001
    while str(frame.f_globals.get("__name__")).startswith("torch._dynamo") and frame.f_back is not None:
        frame = frame.f_back
    return frame


def _has_gradients(optimizer: Optimizer) -> bool:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                return True
    return False


def _versions(optimizer: Optimizer) -> list[int]:
    try:
        return list(map(_VERSION, tensors_of(optimizer)))
    except (RuntimeError, ValueError):  # tensors of inference mode have none, nor have those of a lazily built model
        return []


_VERSION = attrgetter("_version")


# Steps of other optimizers

_OBSERVING: tuple["weakref.ref[StepHooks]", ...] = ()  # replaced as a whole, since threads read it in their steps
_LOCK = threading.Lock()


def _observe(optimizer: Optimizer) -> None:
    for reference in _OBSERVING:
        if (hooks := reference()) is not None:
            hooks.observe(optimizer)


# After the guards that refuse a step, so that only steps that are made are noted.
optimizers.guards.append(_observe)


def _observe_others(hooks: StepHooks) -> None:
    global _OBSERVING  # noqa: PLW0603
    optimizers.watch()
    with _LOCK:
        _OBSERVING = (*(other for other in _OBSERVING if other() is not None), weakref.ref(hooks))


def _no_longer_observe(hooks: StepHooks) -> None:
    global _OBSERVING  # noqa: PLW0603
    with _LOCK:
        _OBSERVING = tuple(other for other in _OBSERVING if other() not in (None, hooks))

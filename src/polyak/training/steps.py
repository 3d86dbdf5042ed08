"""The steps of an optimizer: which are counted, and how steps are noticed that are not."""

import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from polyak.errors import OptimizerError, PlanWarning
from polyak.sharding import local
from polyak.tensors import optimizers

# Wrappers whose `step` does nothing to the weights but call the step of the optimizer under this attribute: those of
# Accelerate, Fabric and Opacus. Any other wrapper may move the weights after that step, as Lookahead does.
_DELEGATES = {"AcceleratedOptimizer": "optimizer", "_FabricOptimizer": "optimizer", "DPOptimizer": "original_optimizer"}
_BY_HAND = "give attach(..., None) instead, and call step() of what it returns once after each batch"


def counted_optimizer(optimizer: object) -> Optimizer:
    """Return the optimizer whose steps are counted: the outermost one that runs torch's step hooks.

    Wrappers that only call another optimizer, as Accelerate's, are looked into. Others, such as Lookahead, are counted
    themselves, since they may move the weights after the optimizer that they wrap.

    Args:
        optimizer: Wrapped or not.

    Raises:
        OptimizerError: If it is no torch optimizer, or one that does not run torch's step hooks.

    Example:
        >>> sgd = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
        >>> counted_optimizer(sgd) is sgd
        True
    """
    for cls in type(optimizer).__mro__:
        inner = getattr(optimizer, _DELEGATES[cls.__name__], None) if cls.__name__ in _DELEGATES else None
        if inner is not None:
            return counted_optimizer(inner)
    name = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise OptimizerError(
            f"optimizer must be one torch.optim.Optimizer, and {name} is none; of several give the one that steps last "
            f"in a batch; if there is no such optimizer, {_BY_HAND}"
        )
    hooks = {"_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"}
    if not hooks <= vars(optimizer).keys() or not getattr(type(optimizer).step, "hooked", False):
        raise OptimizerError(
            f"optimizer must run torch's step hooks, and {name} does not, since its __init__ does not call that of "
            f"torch.optim.Optimizer; {_BY_HAND}"
        )
    return optimizer


def refuse_masters(optimizer: Optimizer, model: nn.Module) -> None:
    """Refuse an optimizer that steps other tensors than the model's, which are copied to the model afterwards.

    Engines with float32 masters do so: DeepSpeed's ZeRO, Megatron, apex O2. When such an optimizer has stepped, the
    model still has its old weights.

    Args:
        optimizer: Whose steps are to be counted.
        model: In training, wrapped or not.

    Raises:
        OptimizerError: If none of its tensors is a parameter of the model, or it has float32 masters of the model's
            trainable 16-bit parameters.
    """
    stepped = {id(tensor): tensor for tensor in _tensors(optimizer)}
    parameters = dict(model.named_parameters())
    ours = {id(parameter) for parameter in parameters.values()}
    foreign = [tensor for key, tensor in stepped.items() if key not in ours]
    what = f"{type(optimizer).__name__} (with {len(foreign)} of its {len(stepped)} tensors elsewhere)"
    if foreign and len(foreign) == len(stepped):
        raise OptimizerError(
            f"optimizer must step parameters of the model, and {what} has none of them; give it the optimizer of "
            f"list(model.parameters()) as they are now. If it steps float32 masters, as DeepSpeed, Megatron and apex "
            f"do, or another model, {_BY_HAND}, when the weights of the model have moved"
        )
    halves = [name for name, p in parameters.items() if id(p) not in stepped and _is_half(p)]
    masters = [tensor.numel() for tensor in foreign if tensor.dtype == torch.float32]
    if halves and _covers(masters, (parameters[name].numel() for name in halves)):
        raise OptimizerError(
            f"optimizer must step the model's parameters themselves, and {what} steps float32 masters of "
            f"'{halves[0]}' and {len(halves) - 1} others, which are copied to the model after its step; {_BY_HAND}, "
            "when that is done"
        )


def _is_half(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad and not is_lazy(parameter) and parameter.dtype in {torch.float16, torch.bfloat16}


def _covers(sizes: Iterable[int], wanted: Iterable[int]) -> bool:
    left = list(sizes)
    for size in wanted:
        if size not in left:
            return False
        left.remove(size)
    return True


def _tensors(optimizer: Optimizer) -> list[Tensor]:
    return [tensor for group in optimizer.param_groups for tensor in group["params"]]


@dataclass(slots=True)
class _Call:
    """A step that is running: the outermost one of its optimizer.

    Args:
        frame: Of torch's wrapper of ``step``, which finds the call among the callers of another.
        rehearsal: Whether ``torch.distributed.checkpoint`` makes it, to have a state to load into.
        graded: Whether it began with gradients that it is to use.
        versions: Of all tensors, if gradients may not tell whether it moved them.
        nested: How many steps of a parent class are running inside it.
    """

    frame: FrameType
    rehearsal: bool
    graded: bool
    versions: list[int]
    nested: int = 0

    def moved(self, optimizer: Optimizer) -> bool:
        """Whether tensors have changed: some optimizers free inside a step the gradients that a closure computed.

        Args:
            optimizer: Which has made this step.
        """
        return bool(self.versions) and _versions(optimizer) != self.versions


class StepHooks:
    """Hooks on the steps of an optimizer, until they are removed.

    Steps that mixed precision skips, steps without gradients, a subclass's call of its parent's step, and the one that
    ``torch.distributed.checkpoint`` takes to have a state to load into, do not count.

    Args:
        optimizer: As ``counted_optimizer`` returns it.
        after: Called after each step that counts.
        before: Called before each step.

    Attributes:
        others: How many steps of other optimizers of the same tensors came after the last step that counted.
        other: The name of the last of these optimizers.
    """

    def __init__(
        self, optimizer: Optimizer, after: Callable[[], object], before: Callable[[], object] | None = None
    ) -> None:
        self.others, self.other = 0, ""
        self._after, self._before = after, before
        self._optimizer = weakref.ref(optimizer)
        self._of = {id(tensor) for tensor in _tensors(optimizer)}
        self._call: _Call | None = None
        self._keeps_gradients = False  # whether its steps, as most, leave the gradients to others

        def pre(optimizer: Optimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            self._enter(optimizer, any(map(callable, (*args[1:], *kwargs.values()))))

        def post(optimizer: Optimizer, args: object, kwargs: object) -> None:
            del args, kwargs
            self._leave(optimizer)

        # An average moves inside them, which cannot be traced: `torch.compile` runs them between two graphs.
        self._hooks = [
            optimizer.register_step_pre_hook(_untraced(pre)),
            optimizer.register_step_post_hook(_untraced(post)),
        ]
        _watch_others(self)

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer, unless it is gone."""
        return self._optimizer()

    def _enter(self, optimizer: Optimizer, has_closure: bool) -> None:
        optimizers.before_step(optimizer)
        hooked = _hooked_frame()
        outer, rehearsal = hooked.f_back, False
        while outer is not None:
            # Not a counter alone, which would be wrong for good after a step that raised.
            if self._call is not None and outer is self._call.frame:
                self._call.nested += 1
                return
            # What it does to the optimizer could also be a real step, of a warm-up from a learning rate of 0.
            rehearsal = rehearsal or outer.f_code.co_name == "_init_optim_state"
            outer = outer.f_back
        # A closure computes new gradients, so those from before say nothing.
        graded = not has_closure and _has_gradients(optimizer)
        versions = [] if graded or self._keeps_gradients else _versions(optimizer)
        self._call = _Call(hooked, rehearsal, graded, versions)
        if self._before is not None and not rehearsal:
            self._before()

    def _leave(self, optimizer: Optimizer) -> None:
        call = self._call
        if call is None:
            return  # the hooks were registered inside this step
        # A step that `torch.compile` has split has another frame by now.
        if call.nested and call.frame is not _hooked_frame():
            call.nested -= 1
            return
        self._call = None
        graded_after = _has_gradients(optimizer)
        self._keeps_gradients = self._keeps_gradients or graded_after
        if not call.rehearsal and not _is_skipped(optimizer) and (call.graded or graded_after or call.moved(optimizer)):
            self.others = 0
            self._after()

    def hear_of(self, other: Optimizer) -> None:
        """Note that another optimizer is about to step.

        Args:
            other: The optimizer; it may be this one.
        """
        if other is not self.optimizer:
            first = (group["params"][0] for group in other.param_groups if group["params"])
            if any(id(tensor) in self._of for tensor in first):
                self.others, self.other = self.others + 1, type(other).__name__

    def remove(self) -> bool:
        """Stop calling; return whether that was not done before."""
        counting = bool(self._hooks)
        while self._hooks:
            self._hooks.pop().remove()
        _no_longer_watch(self)
        return counting


def _untraced(hook: Callable[..., None]) -> Callable[..., None]:
    reason = f"polyak counts the steps of an optimizer in its hooks; to compile it with fullgraph=True, {_BY_HAND}"
    return torch.compiler.disable(hook, reason=reason)


def _hooked_frame() -> FrameType:
    """Return the frame that runs the hook whose method asks, without what ``torch.compiler.disable`` adds."""
    frame = sys._getframe(3)  # noqa: SLF001
    while str(frame.f_globals.get("__name__")).startswith("torch._dynamo") and frame.f_back is not None:
        frame = frame.f_back
    return frame


def _has_gradients(optimizer: Optimizer) -> bool:
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])


def _versions(optimizer: Optimizer) -> list[int]:
    try:
        return list(map(_VERSION, _tensors(optimizer)))
    except (RuntimeError, ValueError):  # tensors of inference mode have none, nor have those of a lazily built model
        return []


_VERSION = attrgetter("_version")


def _is_skipped(optimizer: Optimizer) -> bool:
    """Whether this step moves nothing: a fused one is called even when the gradient scaler found an inf."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)


# Steps of other optimizers

_WATCHING: tuple["weakref.ref[StepHooks]", ...] = ()  # replaced as a whole, since threads read it in their steps
_LOCK = threading.Lock()
_hooked_all = False


def _hear(optimizer: Optimizer, args: object, kwargs: object) -> None:
    del args, kwargs
    if torch.compiler.is_compiling():
        return  # a step in one graph, which must stay one
    for watching in _WATCHING:
        if (hooks := watching()) is not None:
            hooks.hear_of(optimizer)


def _watch_others(hooks: StepHooks) -> None:
    global _WATCHING, _hooked_all  # noqa: PLW0603
    with _LOCK:
        if not _hooked_all:
            # Once and for good: torch iterates over these hooks in the steps of all threads.
            _hooked_all = True
            register_optimizer_step_pre_hook(_hear)
        _WATCHING = (*(other for other in _WATCHING if other() is not None), weakref.ref(hooks))


def _no_longer_watch(hooks: StepHooks) -> None:
    global _WATCHING  # noqa: PLW0603
    with _LOCK:
        _WATCHING = tuple(other for other in _WATCHING if other() not in (None, hooks))


class Unseen:
    """Notices, once, weights that have moved without a step that was counted.

    Args:
        model: In training, wrapped or not; noted as it is now.
        hooks: On the optimizer whose steps are counted; None if they are counted by hand.
    """

    def __init__(self, model: nn.Module, hooks: StepHooks | None) -> None:
        self._model, self._hooks, self._warned = model, hooks, False
        self._before = _norms(model)

    def begin_anew(self) -> None:
        """Note the weights as they are now: they were loaded."""
        self._before = _norms(self._model)

    def warn(self, counted: int) -> None:
        """Warn if weights have moved since the last step that was counted, as far as that can be told.

        Args:
            counted: How many steps were counted since this was made.
        """
        if counted:
            self._before = {}
        if self._warned:
            return
        message = self._message(counted)
        if message is not None:
            self._warned = True
            warnings.warn(message, PlanWarning, stacklevel=4)

    def _message(self, counted: int) -> str | None:
        hooks = self._hooks
        if hooks is not None and hooks.others:
            name = type(hooks.optimizer).__name__ if hooks.optimizer is not None else "the optimizer that was attached"
            gone = ", which is gone," if hooks.optimizer is None else ""
            return (
                f"steps must be counted to be averaged: {counted} of {name}{gone} were, and since then {hooks.others} "
                f"of {hooks.other}, which steps the same parameters, were not; attach the algorithm to that "
                f"{hooks.other}, or {_BY_HAND}"
            )
        moved = [name for name, norm in _norms(self._model, self._before.keys()).items() if self._differs(name, norm)]
        if not moved:
            return None
        remedy = (
            f"let the loop call step() of {type(hooks.optimizer).__name__}, or {_BY_HAND}"
            if hooks
            else ("call step() of what attach returned once after each batch")
        )
        return (
            f"steps must be counted to be averaged: {len(moved)} parameters have moved, such as '{moved[0]}', and "
            f"{counted} steps were counted; {remedy} (if these weights were loaded and not trained, load them before "
            "attach)"
        )

    def _differs(self, name: str, norm: Tensor) -> bool:
        before = self._before[name]
        return before.device == norm.device and not torch.equal(before.nan_to_num(), norm.nan_to_num())


@torch.no_grad()
def _norms(model: nn.Module, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """Return the norm of each trainable or named parameter's local shard, without waiting for a device."""
    here = {
        name: local(parameter).detach()
        for name, parameter in model.named_parameters()
        if (parameter.requires_grad if names is None else name in names) and _is_plain(parameter)
    }
    norms = dict[str, Tensor]()
    for wide in (False, True):
        # In at least float32: a sum of squares of 16-bit values may be above their range. Never in less than they have.
        names = [name for name, tensor in here.items() if (tensor.dtype == torch.float64) is wide]
        dtype = torch.float64 if wide else torch.float32
        found = torch._foreach_norm([here[name] for name in names], dtype=dtype) if names else []  # noqa: SLF001
        norms.update(zip(names, found, strict=True))
    return norms


def _is_plain(parameter: Tensor) -> bool:
    if is_lazy(parameter):
        return False
    tensor = local(parameter)
    plain = type(tensor) in {Tensor, nn.Parameter} and tensor.layout == torch.strided
    return plain and not tensor.is_meta and tensor.dtype in _NORMED


_NORMED = {torch.float16, torch.bfloat16, torch.float32, torch.float64}

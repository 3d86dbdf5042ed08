"""Checks by norms whether weights have moved, and warns if they have between two steps."""

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from polyak.errors import PlanWarning
from polyak.sharding import local
from polyak.tensors.slots import rescaled_in_forward

Norms = Mapping[str, tuple[Tensor, int]]


class BetweenSteps:
    """Warns, once, if weights change between two counted steps, for example because the loop clips them.

    An average takes the weights at the end of a step, and would miss such changes. Only steps 1 to 20, 100, 1000 and so
    on are watched, since some loops change weights in every fifth or tenth step only; for all others, the attributes
    tell the caller that there is nothing to do. After steps 1, 10, 100 and so on one change is enough for a warning,
    after the others it takes two: one may be a load. If the next step moves nothing, the loop sets the weights before a
    step on purpose, as tests do, and there is no warning.

    Args:
        model: The model in training, wrapped or not.
        steps: Returns whether the optimizer steps a tensor.
        instead: What the user should do, for the warning.

    Attributes:
        noted: The weights that are watched until the next step.
        wait: The number of steps until ``note`` must be called. The caller counts it down.
    """

    def __init__(self, model: nn.Module, steps: Callable[[Tensor], bool], instead: str) -> None:
        self._model, self._steps, self._instead = model, steps, instead
        self._passed, self._left, self._warned = 1, 0, False
        self._at = self._seen = 0  # the step after which weights were noted, and how many changes were seen
        self.noted, self._changed = dict[str, Tensor](), dict[str, Tensor]()
        self._norms: Norms = {}
        self.wait = 1

    def check(self) -> None:
        """Check, before a step, whether the noted weights have changed."""
        stepped, self.noted = self.noted, dict[str, Tensor]()
        if _is_capturing():
            return
        before, self._norms = self._norms, norms_of(stepped)
        self._changed = {name: stepped[name] for name in moved_names(before, self._norms, tolerance=_ROUNDING)}
        if self._changed:
            self._left, self.wait = self.wait, 1

    def note(self) -> None:
        """Note the weights after a watched step, or warn if they had changed before this one."""
        if self._changed:
            changed, self._changed = self._changed, dict[str, Tensor]()
            self.wait = self._left - 1
            if not _is_capturing() and moved_names(self._norms, norms_of(changed)):
                self._seen += 1
                if self._seen > 1 or str(self._at).rstrip("0") == "1":
                    self._warn([*changed])
            if self.wait:
                return
        self._at = self._passed
        then = self._passed + 1 if self._passed < _EACH else 10 ** len(str(self._passed))
        self.wait, self._passed = then - self._passed, then
        if not (self._warned or _is_capturing()):
            self.noted = parameters_of(self._model, steps=self._steps)
            self._norms = norms_of(self.noted)

    def _warn(self, names: Sequence[str]) -> None:
        self._warned = True
        warnings.warn(
            "weights must not change between two steps, since an average takes them where a step ends: "
            f"{len(names)} parameters have, such as '{names[0]}'. If they are clipped, masked or normalized after "
            f"each step, {self._instead} (if they were loaded, nothing is wrong)",
            PlanWarning,
            stacklevel=7,
        )

    def forget(self) -> None:
        """Forget what was noted: other weights were loaded."""
        self.noted = {}


_EACH = 20  # the first steps, which are all watched
# Some implementations of SAM perturb the weights and undo it, which leaves rounding errors.
_ROUNDING = 1e-5


def moved_names(before: Norms, now: Norms, tolerance: float = 0.0) -> list[str]:
    """Return the names whose norms differ. Norms of another device, dtype or size cannot be compared.

    Sizes differ because FSDP2 leaves some parameters unsharded after a forward pass.

    Args:
        before: As ``norms_of`` returned them.
        now: The same later, of some of these names.
        tolerance: Relative.
    """
    alike = dict[tuple[torch.device, torch.dtype], list[str]]()
    for name, (norm, size) in now.items():
        other, size_before = before[name]
        if (other.device, other.dtype, size_before) == (norm.device, norm.dtype, size):
            alike.setdefault((norm.device, norm.dtype), []).append(name)
    found = set[str]()
    for names in alike.values():  # one comparison, and one wait for the device, for all
        then, after = (torch.stack([norms[name][0] for name in names]).nan_to_num() for norms in (before, now))
        same = torch.isclose(then, after, rtol=tolerance, atol=0.0).tolist()
        found.update(name for name, holds in zip(names, same, strict=True) if not holds)
    return [name for name in now if name in found]


def parameters_of(
    model: nn.Module, names: Collection[str] | None = None, steps: Callable[[Tensor], bool] | None = None
) -> dict[str, Tensor]:
    """Return the parameters that are trainable, or named, without those that forward passes rescale.

    Args:
        model: Wrapped or not.
        names: Those to return, whether they are trainable or not.
        steps: Whether a parameter is one of those to return.
    """
    rescaled = rescaled_in_forward(model)  # which is no change by the loop
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) not in rescaled
        and (parameter.requires_grad if names is None else name in names)
        and (steps is None or steps(parameter))
        and _is_plain(parameter)
    }


@torch.no_grad()
def norms_of(parameters: Mapping[str, Tensor]) -> Norms:
    """Return the norm and size of each parameter's local shard, without waiting for a device.

    Args:
        parameters: The parameters, by name.
    """
    shards = {name: local(parameter).detach() for name, parameter in parameters.items()}
    norms = dict[str, tuple[Tensor, int]]()
    for wide in (False, True):
        # In float32 at least, since a sum of squares of 16-bit values may exceed their range; float64 in float64.
        names = [name for name, tensor in shards.items() if (tensor.dtype == torch.float64) is wide]
        dtype = torch.float64 if wide else torch.float32
        found: Sequence[Tensor] = torch._foreach_norm([shards[name] for name in names], dtype=dtype) if names else []  # noqa: SLF001
        norms.update((name, (norm, shards[name].numel())) for name, norm in zip(names, found, strict=True))
    return norms


def _is_plain(parameter: Tensor) -> bool:
    if is_lazy(parameter):
        return False
    tensor = local(parameter)
    plain = type(tensor) in {Tensor, nn.Parameter} and tensor.layout == torch.strided
    return plain and not tensor.is_meta and tensor.dtype in _NORMED


def _is_capturing() -> bool:
    """Return whether a CUDA graph is being captured; nothing may be read from the device then."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


_NORMED = {torch.float16, torch.bfloat16, torch.float32, torch.float64}

"""Puts a view in eval mode without changing the weights that it shares."""

import copy
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from types import BuiltinMethodType
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from polyak.averaging.replaced import storage_of
from polyak.averaging.structure import INSTEAD
from polyak.errors import CopyError, LoanError


def evaluate(view: nn.Module, tensors: Iterable[Tensor]) -> None:
    """Put a view in eval mode.

    Args:
        view: A module that shares tensors with others.
        tensors: The tensors that it shares.

    Raises:
        CopyError: If the view's own ``eval`` writes to them, such as one that merges LoRA's weights.
    """
    own = [m for m in view.modules() if _has_own_mode(m)]
    with _ReadOnly(tensors) if own else nullcontext():
        if own:
            view.eval()
        for module in view.modules():
            vars(module)["training"] = False  # some modules refuse an assignment
            if hasattr(type(module), "reset_running_stats"):
                vars(module)["reset_running_stats"] = _ResetOwn(module)


def keep_evaluating(view: nn.Module) -> None:
    """Refuse calls of a view in training mode, in which its BatchNorm layers would write to the average.

    Args:
        view: In eval mode. A copy of it may train.
    """
    view.register_forward_pre_hook(_InEvalMode(view))
    vars(view)["__prepare_scriptable__"] = _Unhooked(view)


class _InEvalMode:
    """A hook of one module; a copy of the module has one that does nothing.

    Args:
        view: The module.
    """

    def __init__(self, view: nn.Module) -> None:
        self._view = weakref.ref(view)

    def __call__(self, module: nn.Module, inputs: object) -> None:
        del inputs
        if module.training and self._view() is module:
            raise LoanError(
                "an averaged model must stay in eval mode, so that nothing writes to the average (it is in training "
                "mode); leave out train(), or train a copy: copy.deepcopy(ema.model).train()"
            )

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return getattr, ({}, "get")  # of (module, inputs) it returns the inputs; a file of the copy needs no polyak


class _Unhooked:
    """What ``torch.jit.script`` compiles in place of a module: the same one without the hook, which cannot be compiled.

    Args:
        view: The module.
    """

    def __init__(self, view: nn.Module) -> None:
        self._view = weakref.ref(view)

    def __call__(self) -> nn.Module:
        view: Any = self._view()
        bare = copy.copy(view)
        hooks = view._forward_pre_hooks.items()  # noqa: SLF001
        # Of a copy of the module the hook is a method of a dict.
        kept = [(key, hook) for key, hook in hooks if not isinstance(hook, _InEvalMode | BuiltinMethodType)]
        vars(bare)["_forward_pre_hooks"] = OrderedDict(kept)
        del vars(bare)["__prepare_scriptable__"]
        return bare

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Unhooked":
        return _Unhooked(memo[id(self._view())])

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return partial, (copy.copy, self._view())


class _ResetOwn:
    """``reset_running_stats`` of a layer of a view: it gives the layer statistics of its own before it resets them.

    ``update_bn``, also torch's, measures the statistics of a view then, and those of the average stay. A copy of the
    layer has the method of its class again.

    Args:
        layer: Of a view.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._layer = weakref.ref(layer)

    def __call__(self) -> None:
        layer: Any = self._layer()
        held = layer._buffers  # noqa: SLF001
        held.update({name: buffer.clone() for name, buffer in held.items() if buffer is not None})
        del vars(layer)["reset_running_stats"]
        layer.reset_running_stats()

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return getattr, (self._layer(), "reset_running_stats")  # of the copy, which has nothing in its place yet


def _has_own_mode(module: nn.Module) -> bool:
    methods = [getattr(module, name) for name in ("train", "eval")]
    return not all(getattr(m, "__module__", "").startswith("torch.") for m in methods)


def _memory_of(tensor: Tensor) -> object:
    """Return a key that tensors over the same memory share, also on the meta device."""
    if type(tensor) in {Tensor, nn.Parameter} and tensor.is_meta:
        return "meta", tensor.untyped_storage()._cdata  # noqa: SLF001
    return storage_of(tensor)


class _ReadOnly(TorchDispatchMode):
    """Refuses operations that write to the memory of given tensors."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self._memory = {memory for memory in map(_memory_of, tensors) if memory is not None}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        for place, argument in enumerate(func._schema.arguments):  # noqa: SLF001
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            for tensor in [value] if isinstance(value, Tensor) else value or ():
                if isinstance(tensor, Tensor) and _memory_of(tensor) in self._memory:
                    raise CopyError(
                        f"ema_model must leave the weights as they are, and the model's eval() writes to one ({func}); "
                        f"{INSTEAD}"
                    )
        return func(*args, **kwargs)

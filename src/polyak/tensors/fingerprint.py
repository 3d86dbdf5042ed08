"""Checks whether a model still has the tensors that were listed, at the addresses that kernels have noted.

With the C kernel one call checks all tensors (``fingerprint_c.py``). Otherwise a few passes in Python check the same.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from operator import attrgetter, eq, is_
from typing import Any

import torch
from torch import Tensor, nn

from polyak.kernels import serving_cpu
from polyak.sharding import local
from polyak.tensors import fingerprint_c, optimizers
from polyak.tensors.memory import is_wrapper

Check = Callable[[], bool]


class Fingerprint:
    """A fingerprint of a model and of further tensors, taken when it is made.

    It no longer holds when a module, parameter or buffer was added, removed, replaced or renamed, when a tensor has
    another address, dtype, shape, layout or storage size, and when a frozen parameter has become trainable.

    Args:
        model: Wrapped or not.
        averages: Further tensors that must keep their addresses.
    """

    def __init__(self, model: nn.Module, averages: Sequence[Tensor] = ()) -> None:
        modules = list(model.modules())
        # A scripted module has no dicts: it makes something like them for each caller.
        scripted = [module for module in modules if isinstance(module, torch.jit.ScriptModule)]
        self._modules = [module for module in modules if not isinstance(module, torch.jit.ScriptModule)]
        self._dicts = [(read, list(map(read, self._modules))) for read in _DICTS]
        dicts = list(chain.from_iterable(held for _, held in self._dicts))
        found = [tensor for dict_ in dicts for tensor in dict_.values() if isinstance(tensor, Tensor)]
        found += _tensors_of(scripted)
        outer = [tensor for tensor in found if local(tensor) is not tensor]  # the memory is that of another tensor
        tensors = [tensor for tensor in found if local(tensor) is tensor] + list(map(local, [*outer, *averages]))
        self._same = take(dicts, tensors)
        self._rest = list[Check]()
        if scripted:
            self._rest.append(_same_tensors(lambda: _tensors_of(scripted)))
        if outer:
            self._rest.append(_same_tensors(lambda: list(map(local, outer))))
        parameters = (tensor for tensor in found if isinstance(tensor, nn.Parameter))
        self._moves = optimizers.moves()
        self._frozen = [p for p in parameters if not (p.requires_grad or optimizers.is_moved(p))]

    def holds(self) -> bool:
        """Return whether the model and the averages are unchanged."""
        for read, dicts in self._dicts:
            if not all(map(is_, map(read, self._modules), dicts)):
                return False
        if not self._same() or any(map(_REQUIRES_GRAD, self._frozen)):
            return False
        for check in self._rest:
            if not check():
                return False
        if self._moves != (moves := optimizers.moves()):
            if any(map(optimizers.is_moved, self._frozen)):
                return False
            self._moves = moves  # only after the check: the next call must have the same answer
        return True


def take(dicts: Sequence[dict[str, Any]], tensors: Sequence[Tensor]) -> Check:
    """Take a fingerprint of dicts and tensors; return a callable that checks it.

    Args:
        dicts: Those of modules.
        tensors: Tensors of any kind, in the dicts or not.
    """
    in_c = fingerprint_c.AVAILABLE and "c" in serving_cpu()
    return (in_c and fingerprint_c.take(dicts, tensors)) or take_in_python(dicts, tensors)


def take_in_python(dicts: Sequence[dict[str, Any]], tensors: Sequence[Tensor]) -> Check:
    """Do what ``take`` does, without C.

    Args:
        dicts: Those of modules.
        tensors: Tensors of any kind, in the dicts or not.
    """
    empty, filled = [dict_ for dict_ in dicts if not dict_], [dict_ for dict_ in dicts if dict_]
    names, values = list(map(tuple, filled)), list(chain.from_iterable(map(_VALUES, filled)))
    same_memory = _same_memory(tensors)

    def check() -> bool:
        return (
            not any(empty)
            and all(map(eq, map(tuple, filled), names))
            and all(map(is_, chain.from_iterable(map(_VALUES, filled)), values))
            and same_memory()
        )

    return check


def _same_memory(tensors: Sequence[Tensor]) -> Check:
    """Return a check that tensors have the addresses, dtypes, shapes, layouts and storage sizes that they have now.

    Of tensors without an address, such as lazily built, sparse and wrapper tensors, it checks the class.
    """
    once = list({id(tensor): tensor for tensor in tensors}.values())
    known, unknown = [t for t in once if _has_address(t)], [t for t in once if not _has_address(t)]
    # An address belongs to one device. Tensors without elements, or on the meta device, have none.
    nowhere = [tensor for tensor in known if tensor.data_ptr() == 0]
    contiguous, strided = ([t for t in known if t.is_contiguous() is wanted] for wanted in (True, False))
    # One by one: to compare lists of thousands of new tuples takes several times as long.
    noted = [
        (read, some, list(map(read, some)))
        for read, some in (
            (Tensor.data_ptr, known),
            (attrgetter("shape"), known),
            (attrgetter("dtype"), known),
            (Tensor.stride, strided),
            (attrgetter("device"), nowhere),
            (type, unknown),
        )
    ]
    sizes = list(map(_SIZE, map(_STORAGE, known)))

    def check() -> bool:
        try:
            for read, some, values in noted:
                if not all(map(eq, map(read, some), values)):
                    return False
            # A storage may shrink under its tensors.
            return all(map(_IS_CONTIGUOUS, contiguous)) and all(map(eq, map(_SIZE, map(_STORAGE, known)), sizes))
        except (RuntimeError, ValueError):  # one no longer has an address
            return False

    return check


def _has_address(tensor: Tensor) -> bool:
    if tensor.layout != torch.strided or tensor.is_nested or is_wrapper(tensor):
        return False
    try:
        tensor.data_ptr()
        tensor.untyped_storage()
    except (RuntimeError, ValueError):  # lazily built
        return False
    return True


def _same_tensors(read: Callable[[], list[Tensor]]) -> Check:
    """Return a check that ``read`` returns the same tensors as now."""
    noted = read()

    def check() -> bool:
        now = read()
        return len(now) == len(noted) and all(map(is_, now, noted))

    return check


def _tensors_of(scripted: Sequence[nn.Module]) -> list[Tensor]:
    held = (tensor for module in scripted for _, tensor in chain(module._parameters.items(), module._buffers.items()))  # noqa: SLF001
    return [tensor for tensor in held if tensor is not None]


_DICTS = tuple(map(attrgetter, ("_modules", "_parameters", "_buffers")))
_VALUES = dict[str, Any].values
_STORAGE, _SIZE, _IS_CONTIGUOUS = Tensor.untyped_storage, torch.UntypedStorage.nbytes, Tensor.is_contiguous
_REQUIRES_GRAD = attrgetter("requires_grad")

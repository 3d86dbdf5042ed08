"""Whether a model is as it was: what a kernel that knows the addresses of its tensors relies on.

In C it is one call for all dicts of all modules and all their tensors, through torch's stable C interface; where that
is not there, a few passes in Python. Both see another tensor, address, device, dtype, shape or layout.
"""

import ctypes
from array import array
from collections.abc import Callable, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from polyak.kernels import cpu
from polyak.kernels.build import LIBRARY

Look = Callable[[], bool]


def unchanged_in_python(dicts: Sequence[dict[str, Any]], tensors: Sequence[Tensor]) -> Look:
    """Note what dicts hold and where tensors are, and return what tells whether all is as it was.

    It is not if a dict holds other objects, or under other keys, or in another order.

    Args:
        dicts: Those of modules.
        tensors: Of any kind, in the dicts or not.
    """
    keys, values, looks = list(map(list, dicts)), _values(dicts), _looks(tensors)
    return lambda: list(map(list, dicts)) == keys and all(map(is_, _values(dicts), values)) and _looks(tensors) == looks


def _values(dicts: Sequence[dict[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(map(dict[str, Any].values, dicts)))


def _storage_size(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()  # it may shrink under its tensors


_LOOKS = (Tensor.data_ptr, *map(attrgetter, ("device", "dtype", "shape")), Tensor.stride, _storage_size)


def _looks(tensors: Sequence[Tensor]) -> list[list[Any]]:
    try:
        return [list(map(look, tensors)) for look in _LOOKS]
    except (RuntimeError, ValueError):  # a lazily built module has parameters that are nowhere yet
        return [[-1 if is_lazy(tensor) else tensor.data_ptr() for tensor in tensors]]


# Functions of torch's stable C interface, torch/csrc/inductor/aoti_torch/c/shim.h, in the order of look.c.
_QUESTIONS = ("data_ptr", "dim", "sizes", "strides", "dtype", "device_type", "device_index", "storage_size")
_HEAD = 4  # integers that C notes of each tensor, before its shape and strides


_word_of = attrgetter("_cdata")  # with which torch's handle of a tensor, or of its storage, begins


class _Library:
    """The function in C, and what it has to know of torch.

    Attributes:
        look: The function, to be called with the interpreter's lock held.
        fixed: Its first arguments.
    """

    def __init__(self) -> None:
        torch_itself = cpu.torch_library()
        functions = (getattr(torch_itself, f"aoti_torch_get_{question}") for question in _QUESTIONS)
        self._questions = array("q", (ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions))
        # Where in a tensor's Python object torch's handle of it is.
        tensor, words = torch.empty(0), range(object.__basicsize__, Tensor.__basicsize__, 8)
        handle_at = next(at for at in words if ctypes.c_int64.from_address(id(tensor) + at).value == _word_of(tensor))
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self.look = ctypes.PyDLL(str(LIBRARY)).polyak_look
        self.look.argtypes = [pointer, pointer, number, pointer, number, pointer, number, pointer, number]
        self.look.restype = number
        next_item = ctypes.cast(ctypes.pythonapi.PyDict_Next, pointer).value
        self.fixed = next_item, self._questions.buffer_info()[0], handle_at


def _load() -> _Library | None:
    try:
        return None if cpu.WHY_NOT else _Library()
    except (OSError, AttributeError, StopIteration):  # a torch without that interface, or laid out otherwise
        return None


_library = _load()
HAS_C = _library is not None


def unchanged_in_c(dicts: Sequence[dict[str, Any]], tensors: Sequence[Tensor]) -> Look | None:
    """Do what ``unchanged_in_python`` does, at 0.03 us a tensor, or return None where a tensor has no address to tell.

    Args:
        dicts: As there.
        tensors: As there.
    """
    assert _library is not None
    held = [(dict_, list(dict_.items())) for dict_ in dicts], list(tensors)  # as long as their addresses are used
    try:
        known = {id(t): (id(t), _word_of(t), _word_of(t.untyped_storage())) for t in tensors}
    except (RuntimeError, ValueError):  # lazily built, sparse, a wrapper
        return None
    rows, in_dicts = list[tuple[int, ...]](), set[int]()
    for _, pairs in held[0]:
        rows += [(id(key), *known.get(id(value), (id(value), 0, 0))) for key, value in pairs]
        rows.append((0, 0, 0, 0))
        in_dicts.update(id(value) for _, value in pairs)
    rows += [(0, *row) for number, row in known.items() if number not in in_dicts]
    dims = {id(tensor): tensor.dim() for tensor in tensors}
    notes = array("q", bytes(8 * sum(_HEAD + 2 * dims[row[1]] for row in rows if row[2])))
    addresses, items = array("q", map(id, dicts)), array("q", chain.from_iterable(rows))
    places = *(addresses.buffer_info()[0], len(dicts)), *(items.buffer_info()[0], len(rows)), notes.buffer_info()[0]
    look, arguments = _library.look, (*_library.fixed, *places)

    def unchanged() -> bool:
        _ = held, addresses, items, notes  # kept
        return look(*arguments, 1) == 1

    return unchanged if look(*arguments, 0) == 1 else None

"""The fingerprint in C: all dicts of all modules and all tensors in one call, at 0.03 us a tensor.

It asks torch through functions of its stable C interface, torch/csrc/inductor/aoti_torch/c/shim.h, and Python through
``PyDict_Next``. Where a torch lacks that interface there is no fingerprint in C.
"""

import ctypes
from array import array
from collections.abc import Callable, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from polyak.kernels import c
from polyak.kernels.build import LIBRARY
from polyak.tensors.memory import is_wrapper

# Functions of the interface, in the order of fingerprint.c.
_QUESTIONS = ("data_ptr", "dim", "sizes", "strides", "dtype", "device_type", "device_index", "storage_size")
_HEAD = 4  # integers that C notes of each tensor, before its shape and strides

_handle_of = attrgetter("_cdata")  # the address of what torch knows of a tensor, or of its storage


class _Library:
    """The function in C, and the facts about torch that it needs.

    Attributes:
        check: The function, to be called with the interpreter's lock held.
        fixed: Its first arguments.
    """

    def __init__(self) -> None:
        torch_itself = c.torch_library()
        functions = (getattr(torch_itself, f"aoti_torch_get_{question}") for question in _QUESTIONS)
        self._questions = array("q", (ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions))
        # Where in a tensor's Python object its handle is.
        tensor, offsets = torch.empty(0), range(object.__basicsize__, Tensor.__basicsize__, 8)
        handle_at = next(
            at for at in offsets if ctypes.c_int64.from_address(id(tensor) + at).value == _handle_of(tensor)
        )
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self.check = ctypes.PyDLL(str(LIBRARY)).polyak_fingerprint
        self.check.argtypes = [pointer, pointer, number, pointer, number, pointer, number, pointer, number]
        self.check.restype = number
        next_item = ctypes.cast(ctypes.pythonapi.PyDict_Next, pointer).value
        self.fixed = next_item, self._questions.buffer_info()[0], handle_at


def _load() -> _Library | None:
    try:
        return None if c.WHY_NOT else _Library()
    except (OSError, AttributeError, StopIteration):  # a torch without that interface, or with another layout
        return None


_library = _load()
AVAILABLE = _library is not None


def take(dicts: Sequence[dict[str, Any]], tensors: Sequence[Tensor]) -> Callable[[], bool] | None:
    """Take a fingerprint; return a callable that checks it, or None if a lazily built or sparse tensor has no address.

    Args:
        dicts: Those of modules.
        tensors: Tensors, in the modules' dicts or not. Only the identity of wrapper tensors is checked.
    """
    assert _library is not None
    # The caller of C keeps all objects whose addresses it passes: C reads no memory that may have been freed.
    held = [(dict_, list(dict_.items())) for dict_ in dicts], list(tensors)
    plain = [tensor for tensor in tensors if tensor.layout == torch.strided and not is_wrapper(tensor)]
    try:
        handles = {id(t): (id(t), _handle_of(t), _handle_of(t.untyped_storage())) for t in plain}
    except (RuntimeError, ValueError):
        return None
    rows, in_dicts = list[tuple[int, ...]](), set[int]()
    for _, pairs in held[0]:
        rows += [(id(key), *handles.get(id(value), (id(value), 0, 0))) for key, value in pairs]
        rows.append((0, 0, 0, 0))
        in_dicts.update(id(value) for _, value in pairs)
    rows += [(0, *row) for number, row in handles.items() if number not in in_dicts]
    dims = {id(tensor): tensor.dim() for tensor in plain}
    notes = array("q", bytes(8 * sum(_HEAD + 2 * dims[row[1]] for row in rows if row[2])))
    addresses, items = array("q", map(id, dicts)), array("q", chain.from_iterable(rows))
    places = *(addresses.buffer_info()[0], len(dicts)), *(items.buffer_info()[0], len(rows)), notes.buffer_info()[0]
    function, arguments = _library.check, (*_library.fixed, *places)

    def check() -> bool:
        _ = held, addresses, items, notes  # kept
        return function(*arguments, 1) == 1

    return check if function(*arguments, 0) == 1 else None

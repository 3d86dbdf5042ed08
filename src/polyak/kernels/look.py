"""Whether a model is as it was: what a kernel that knows the addresses of its tensors relies on.

In C it is one call for all dicts of all modules, and one for all tensors, through the C exchange API of DLPack; where
that is not there, a few passes in Python. Both see another tensor, address, device, dtype, shape or layout.
"""

import ctypes
from array import array
from collections.abc import Callable, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy

from polyak.kernels import cpu
from polyak.kernels.build import LIBRARY

Look = Callable[[], bool]


def same_in_python(dicts: Sequence[dict[str, Any]]) -> Look:
    """Note what dicts hold, and return what tells whether they still hold it, under the same keys in the same order.

    Args:
        dicts: Those of modules.
    """
    keys, values = list(map(list, dicts)), _values(dicts)
    return lambda: list(map(list, dicts)) == keys and all(map(is_, _values(dicts), values))


def _values(dicts: Sequence[dict[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(map(dict[str, Any].values, dicts)))


def unmoved_in_python(tensors: Sequence[Tensor]) -> Look:
    """Note where tensors are, and return what tells whether they still are there, as they were.

    Args:
        tensors: Of any kind.
    """
    noted = _looks(tensors)
    return lambda: _looks(tensors) == noted


_LOOKS = (Tensor.data_ptr, *map(attrgetter, ("device", "dtype", "shape")), Tensor.stride)


def _looks(tensors: Sequence[Tensor]) -> list[list[Any]]:
    try:
        return [list(map(look, tensors)) for look in _LOOKS]
    except (RuntimeError, ValueError):  # a lazily built module has parameters that are nowhere yet
        return [[-1 if is_lazy(tensor) else tensor.data_ptr() for tensor in tensors]]


def _load() -> tuple[ctypes.PyDLL, int] | None:
    """Return the library, to be called with the interpreter's lock held, and the address of torch's exchange API."""
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)  # from torch 2.10 on
    if capsule is None or cpu.WHY_NOT:
        return None
    pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_of.argtypes, pointer_of.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_void_p
    api = pointer_of(capsule, b"dlpack_exchange_api")
    library = ctypes.PyDLL(str(LIBRARY))
    library.polyak_can_look.argtypes, library.polyak_can_look.restype = [ctypes.c_void_p], ctypes.c_int64
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.polyak_look.argtypes = [pointer, pointer, pointer, number, pointer, number]
    library.polyak_same.argtypes = [pointer, pointer, number, pointer]
    library.polyak_look.restype = library.polyak_same.restype = ctypes.c_int64
    return (library, api) if library.polyak_can_look(api) else None


_loaded = _load()
HAS_C = _loaded is not None
_next_item = ctypes.cast(ctypes.pythonapi.PyDict_Next, ctypes.c_void_p)


def same_in_c(dicts: Sequence[dict[str, Any]]) -> Look:
    """Do what ``same_in_python`` does, at 0.01 us a tensor.

    Args:
        dicts: As there.
    """
    assert _loaded is not None
    library, _ = _loaded
    held = [(dict_, list(dict_.items())) for dict_ in dicts]  # for as long as their addresses as objects are used
    addresses = array("q", (id(dict_) for dict_, _ in held))
    items = array("q")
    for _, pairs in held:
        items.extend(chain.from_iterable((id(key), id(value)) for key, value in pairs))
        items.extend((0, 0))
    arguments = _next_item, addresses.buffer_info()[0], len(held), items.buffer_info()[0]
    same = library.polyak_same

    def is_same() -> bool:
        _ = held, addresses, items  # kept
        return same(*arguments) == 1

    return is_same


def unmoved_in_c(tensors: Sequence[Tensor]) -> Look | None:
    """Do what ``unmoved_in_python`` does, at 0.05 us a tensor, or return None where a tensor has no address to be told.

    Args:
        tensors: As there.
    """
    assert _loaded is not None
    library, api = _loaded
    held = list(tensors)  # for as long as their addresses as objects are used
    objects = array("q", map(id, held))
    look = library.polyak_look
    try:
        hints = array("q", chain.from_iterable(map(_hint, held)))
        notes = array("q", bytes(8 * sum(3 + 2 * tensor.dim() for tensor in held)))
        arguments = api, objects.buffer_info()[0], hints.buffer_info()[0], len(held), notes.buffer_info()[0]
        look(*arguments, 0)
    except (RuntimeError, ValueError, BufferError):  # lazily built, sparse, on the meta device, a wrapper
        return None

    def unmoved() -> bool:
        _ = held, objects, hints, notes  # kept
        try:
            return look(*arguments, 1) == 1
        except (RuntimeError, BufferError):  # it has no address any more
            return False

    return unmoved


def _hint(tensor: Tensor) -> tuple[int, int]:
    """Return where what torch keeps of a tensor is, or zeros: it makes the look quicker, and nothing else."""
    return getattr(tensor, "_cdata", 0), getattr(tensor.untyped_storage(), "_cdata", 0)

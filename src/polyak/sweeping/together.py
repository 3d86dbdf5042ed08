"""Detects whether an evaluation communicates between ranks. If so, all ranks must evaluate the same average."""

from collections.abc import Callable, Iterator
from functools import partial
from inspect import unwrap
from itertools import chain
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from polyak.sharding import is_fsdp, is_sharded

# How far a function is searched: a helper that it calls, the object that has the model, a list of models.
_DEPTH = 5


def communicates(function: Callable[..., Any]) -> bool:
    """Return whether a function visibly uses a model whose ranks communicate, without calling anything.

    Args:
        function: What a user gives to evaluate weights.
    """
    return any(map(_is_divided, _modules(function, _DEPTH, set())))


def messages() -> int:
    """Return how many messages this process has sent to other ranks, over all process groups."""
    from torch.distributed import distributed_c10d as c10d  # noqa: PLC0415

    # Nothing else lists them. Those of polyak itself are for threads, such as that of a Recorder.
    named = c10d._world.pg_names.items()  # noqa: SLF001
    return sum(_messages_of(one) for one, name in named if one.size() > 1 and not name.startswith("polyak-"))


def _messages_of(group: Any) -> int:
    backends = [group._get_backend(kind) for kind in group._device_types]  # noqa: SLF001
    count = 0
    for backend in dict.fromkeys(backends):
        try:
            count += backend._get_sequence_number_for_group()  # noqa: SLF001
        except RuntimeError:  # it does not count
            continue
    return count


def _is_divided(model: nn.Module) -> bool:
    if is_fsdp(model) or any(map(is_sharded, chain(model.parameters(), model.buffers()))):
        return True
    ddps = (one for one in model.modules() if isinstance(one, nn.parallel.DistributedDataParallel))
    # A forward pass sends the buffers of rank 0 to all, in evaluation too.
    return any(one.broadcast_buffers and next(one.module.buffers(), None) is not None for one in ddps)


def _modules(value: Any, depth: int, seen: set[int]) -> Iterator[nn.Module]:
    """Yield the modules that a value has or uses."""
    if depth == 0 or id(value) in seen or isinstance(value, ModuleType | type | torch.Tensor):
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        yield value
        return
    for inner in _inside(value):
        yield from _modules(inner, depth - 1, seen)


def _inside(value: Any) -> Iterator[Any]:
    if isinstance(value, partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, FunctionType):
        function = unwrap(value)
        yield from (cell.cell_contents for cell in function.__closure__ or () if _is_full(cell))
        yield from (function.__globals__.get(name) for name in _names(function.__code__))
        yield from function.__defaults__ or ()
    elif type(value) in (list, tuple, dict):  # others may compute what they yield
        yield from value.values() if type(value) is dict else value
    elif hasattr(value, "__dict__"):
        yield from vars(value).values()
        yield getattr(type(value), "__call__", None)  # noqa: B004  its code, if it is one that is called


def _names(code: CodeType) -> Iterator[str]:
    """Yield the names that code uses, with those of the functions and comprehensions in it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _is_full(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # of a name that is not bound yet
        return False

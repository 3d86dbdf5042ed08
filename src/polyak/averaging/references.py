"""Finds the objects that a module refers to: attributes, containers, closures, hooks, weak references and globals."""

import dis
import gc
import logging
import sysconfig
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from types import BuiltinFunctionType, CellType, CodeType, EllipsisType, FunctionType, MethodType, ModuleType, NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Sampler

# These refer to nothing. There are too many Python modules to walk, so only attributes that code names are followed.
_ATOMIC: frozenset[type] = frozenset({
    NoneType, EllipsisType, bool, int, float, complex, str, bytes, range, CodeType, ModuleType, torch.Size,
    torch.device, torch.dtype, torch.layout, torch.memory_format,
})  # fmt: skip
# These belong to the training: a view shares them, and they are not walked.
_SERVING = (
    Optimizer, torch.optim.lr_scheduler.LRScheduler, DataLoader, Dataset, Sampler, logging.Logger, threading.Thread,
)  # fmt: skip
_SERVING_PACKAGES = (
    "polyak", "lightning", "pytorch_lightning", "lightning_fabric", "accelerate.accelerator", "transformers.trainer",
    "composer.trainer", "composer.core", "ignite.engine", "torch.distributed.fsdp._fully_shard",
)  # fmt: skip
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_EMPTY: frozenset[type] = frozenset({dict, OrderedDict, list, set})
_GLOBAL = ("LOAD_GLOBAL", "LOAD_NAME")
_ATTRIBUTE = ("LOAD_ATTR", "LOAD_METHOD")
_HEAP_TYPE = 1 << 9  # of classes that Python code defines


def is_atomic(thing: object) -> bool:
    """Return whether ``thing`` refers to nothing that could be a module or a tensor.

    Args:
        thing: Any object.
    """
    return type(thing) in _ATOMIC


def serves_training(thing: object) -> bool:
    """Return whether ``thing`` is an optimizer, a trainer, a loader, a thread, a logger or one of polyak's objects.

    Args:
        thing: Any object.
    """
    kind = type(thing)
    if issubclass(kind, nn.Module | Tensor):
        return False
    if issubclass(kind, _SERVING):
        return True
    names = (base.__module__ for base in kind.__mro__)
    return any(name == package or name.startswith(f"{package}.") for name in names for package in _SERVING_PACKAGES)


@lru_cache(maxsize=4096)
def _global_names(code: CodeType) -> frozenset[tuple[str, str | None]]:
    """Return the globals that ``code`` reads, each with the attribute that it reads next, if it does."""
    instructions = list(dis.get_instructions(code))
    found = set[tuple[str, str | None]]()
    for one, after in zip(instructions, [*instructions[1:], None], strict=True):
        if one.opname in _GLOBAL:
            attribute = after.argval if after is not None and after.opname in _ATTRIBUTE else None
            found.add((one.argval, attribute))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found |= _global_names(constant)
    return frozenset(found)


def _is_installed(namespace: dict[str, Any]) -> bool:
    """Return whether a module is part of a library, which was imported before any model was made."""
    file = namespace.get("__file__")
    return isinstance(file, str) and (file.startswith(_LIBRARIES) or "site-packages" in Path(file).parts)


class References:
    """All objects that are reached from a module, and the references between them.

    Args:
        root: The module to begin with.
        stops: Ids of objects that are not walked.

    Attributes:
        objects: The objects by id. They stay alive, so that ids stay unique.

    Example:
        >>> inner = nn.Linear(1, 1)
        >>> outer = nn.Identity()
        >>> outer.forward = lambda x: inner(x)
        >>> found = References(outer)
        >>> id(inner) in found.objects, id(outer.forward) in found.leading_to([id(inner)], through=[])
        (True, True)
        >>> found.where(id(inner))
        'forward'
    """

    def __init__(self, root: nn.Module, stops: Iterable[int] = ()) -> None:
        self.objects: dict[int, object] = {id(root): root}
        self._stops = frozenset(stops)
        self._parents: dict[int, list[int]] = {id(root): []}
        self._attributes = dict[int, tuple[int, str]]()  # the module and the name of an attribute
        self._serving = dict[type, bool]()
        self._installed = dict[int, bool]()
        self._names = {id(module): name for name, module in root.named_modules()}
        pending = [root]
        while pending:
            pending += self._visit(pending.pop())

    def _visit(self, thing: object) -> list[Any]:
        new, parent = list[Any](), id(thing)
        for name, child in self._children(thing):
            if type(child) in _ATOMIC:
                continue
            key = id(child)
            if key in self._parents:
                self._parents[key].append(parent)
                continue
            self._parents[key], self.objects[key] = [parent], child
            if name is not None:
                self._attributes[key] = (parent, name)
            if key not in self._stops and not self.serves(child):
                new.append(child)
        return new

    def serves(self, thing: object) -> bool:
        """Return whether ``thing`` serves the training, and is shared.

        Args:
            thing: Any object.
        """
        kind = type(thing)
        if kind not in self._serving:
            self._serving[kind] = serves_training(thing)
        return self._serving[kind]

    def leading_to(self, targets: Iterable[int], *, through: Iterable[int]) -> set[int]:
        """Return the ids of all objects from which one of the targets is reached, and the targets.

        Args:
            targets: Ids.
            through: Ids of objects whose references are ignored.
        """
        closed = set(through)
        found = {key for key in targets if key in self._parents and key not in closed}
        pending = list(found)
        while pending:
            for parent in self._parents[pending.pop()]:
                if parent not in found and parent not in closed:
                    found.add(parent)
                    pending.append(parent)
        return found

    def serving(self) -> set[int]:
        """Return the ids of objects that serve the training, and of those that hold an optimizer, as trainers do."""
        served = {key for key, thing in self.objects.items() if self.serves(thing)}
        optimizers = [key for key in served if isinstance(self.objects[key], Optimizer)]
        if not optimizers:
            return served
        computing = (nn.Module, Tensor, FunctionType, MethodType, BuiltinFunctionType, CellType, weakref.ref, type)
        computers = [key for key, thing in self.objects.items() if isinstance(thing, computing)]
        return served | self.leading_to(optimizers, through=computers)

    def where(self, key: int) -> str:
        """Return the attribute from which an object was reached, with the name of its module, or the class.

        Args:
            key: Its id.
        """
        while key in self._parents:
            if isinstance(kind := self.objects[key], type):
                return f"class {kind.__qualname__}"
            if key in self._attributes:
                owner, attribute = self._attributes[key]
                module = self._names.get(owner)
                if module is None:
                    module = self.where(owner)
                return f"{module}.{attribute}" if module else attribute
            key = next(iter(self._parents[key]), 0)
        return "the model"

    def named(self, module: nn.Module, attribute: str) -> str:
        """Return the name of an attribute, with that of its module.

        Args:
            module: A module that was reached.
            attribute: The name of one of its attributes.
        """
        name = self._names.get(id(module), "")
        return f"{name}.{attribute}" if name else attribute

    # References. Each child comes with its name if it is an attribute of a module.

    def _children(self, thing: object) -> Iterator[tuple[str | None, object]]:
        kind = type(thing)
        if kind in weakref.ProxyTypes:  # first: its `__class__` is that of its referent
            yield None, referent(thing)
        elif isinstance(thing, nn.Module):
            yield from self._of_module(thing)
        elif isinstance(thing, type):
            yield from self._of_class(thing)
        elif isinstance(thing, FunctionType):
            yield from self._of_function(thing)
        elif isinstance(thing, Tensor):
            yield from ((None, value) for value in vars(thing).values())
        elif isinstance(thing, weakref.ref):
            yield None, thing()
        else:
            for child in gc.get_referents(thing):
                if not isinstance(child, type) or child is kind or "<locals>" in child.__qualname__:
                    yield None, child

    @staticmethod
    def _of_module(module: nn.Module) -> Iterator[tuple[str | None, object]]:
        for name, value in vars(module).items():
            if name in {"_modules", "_parameters", "_buffers"}:
                yield from value.items()
            elif type(value) not in _EMPTY or value:
                yield name, value
        yield None, type(module)

    def _of_class(self, kind: type) -> Iterator[tuple[str | None, object]]:
        """Yield the methods that the author of a model wrote, and the class attributes that these use."""
        if not kind.__flags__ & _HEAP_TYPE or kind in {nn.Module, Tensor, nn.Parameter}:
            return
        yield from ((None, base) for base in kind.__bases__)
        used = set[str]()
        own = list[tuple[str, object]]()
        for name, value in vars(kind).items():
            function = _function_of(value)
            if function is None:
                own.append((name, value))
            elif name not in _NOT_RUN and (not self._from_library(function) or _is_patched(function)):
                yield None, function
                used.update(function.__code__.co_names)
        yield from ((None, value) for name, value in own if name in used)

    def _from_library(self, function: FunctionType) -> bool:
        namespace = function.__globals__
        key = id(namespace)
        if key not in self._installed:
            self._installed[key] = _is_installed(namespace)
        return self._installed[key]

    def _of_function(self, function: FunctionType) -> Iterator[tuple[str | None, object]]:
        for part in (function.__closure__ or (), function.__defaults__ or ()):
            yield from ((None, value) for value in part)
        for attributes in (function.__kwdefaults__, function.__dict__):
            yield from ((None, value) for value in (attributes or {}).values())
        yield from ((None, value) for value in self.globals_of(function).values())
        for name, attribute in _global_names(function.__code__) if not self._from_library(function) else ():
            module = function.__globals__.get(name)
            if isinstance(module, ModuleType) and attribute is not None and not _is_installed(vars(module)):
                yield None, vars(module).get(attribute)

    def globals_of(self, function: FunctionType) -> dict[str, object]:
        """Return the globals that a function names, unless it is in a library, which does not refer to a model.

        Args:
            function: Any function.
        """
        if self._from_library(function):
            return {}
        names = {name for name, _ in _global_names(function.__code__)}
        found = {name: function.__globals__[name] for name in names if name in function.__globals__}
        return {name: value for name, value in found.items() if not isinstance(value, type)}


# These are not run on a view.
_NOT_RUN = {"__init__", "__new__", "__del__", "__init_subclass__", "__getstate__", "__setstate__", "__reduce__"}


def referent(proxy: Any) -> object:
    """Return the referent of a weak proxy, or None if it is gone.

    Args:
        proxy: Made by ``weakref.proxy``.
    """
    try:
        return proxy.__repr__.__self__
    except ReferenceError:
        return None


def _function_of(value: object) -> FunctionType | None:
    """Return the function in a class attribute, if there is one."""
    held = getattr(value, "__func__", None) or getattr(value, "fget", None)
    return next((function for function in (value, held) if isinstance(function, FunctionType)), None)


def _is_patched(function: FunctionType) -> bool:
    """Return whether a library's method closes over a module, a tensor or a method: it was wrapped after its import."""
    for cell in function.__closure__ or ():
        try:
            content = cell.cell_contents
        except ValueError:
            continue
        if isinstance(content, nn.Module | Tensor | MethodType) or (
            isinstance(content, FunctionType) and not _is_installed(content.__globals__)
        ):
            return True
    return False

"""Copies the objects that a model refers to, each once: modules, tensors, containers, functions and others."""

import copy
import functools
import sys
import weakref
from collections import ChainMap, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from itertools import chain
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from polyak.averaging.references import References, is_atomic, referent
from polyak.averaging.replaced import Replaced
from polyak.errors import CopyError
from polyak.sharding import is_sharded, local, rewrapped
from polyak.sharding.fsdp import attributes_before, class_before

# The attributes that every module has. A copied wrapper has only these.
_BARE = frozenset(vars(nn.Module()))
INSTEAD = "evaluate the model itself, in a block of `with attached.applied():`"
_CONTAINERS: frozenset[type] = frozenset({list, dict, tuple, set, frozenset, OrderedDict, defaultdict, deque})
# These are shared if they do not lead to the model.
_BY_REFERENCE = (FunctionType, BuiltinFunctionType, weakref.ref, *weakref.ProxyTypes, functools.partial)


def _wrapped(module: nn.Module) -> str | None:
    """Return the name of the inner module, if this is a wrapper that only changes how it runs."""
    eval_frame = sys.modules.get("torch._dynamo.eval_frame")
    if eval_frame is not None and isinstance(module, eval_frame.OptimizedModule):
        return "_orig_mod"
    return "module" if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)) else None


class Copies:
    """The copies of what a model refers to, each made once.

    Args:
        model: The model to be copied.
        replacements: As for ``module_over``.

    Attributes:
        at: The attribute of the model that was copied last, for errors.
        found: The objects that the model refers to.
        shared: Ids of the objects that serve the training.
        modules: The model's modules by id.
        own: Its tensors by id, and other tensors over their memory.
        leading: Ids of the objects that lead to one of these, and their own ids.
        memo: The copies by the id of the original; ``copy.deepcopy`` uses it too.
    """

    def __init__(self, model: nn.Module, replacements: Mapping[int, Tensor]) -> None:
        self.at = "the model"
        self.found = found = References(model)
        self.shared = found.serving()
        self.modules = {id(module): module for module in model.modules()}
        self.own = {id(t): t for t in chain(model.parameters(), model.buffers())}
        self._memory = Replaced((t, replacements[key]) for key, t in self.own.items() if key in replacements)
        tensors = [thing for thing in found.objects.values() if isinstance(thing, Tensor)]
        # Also what others hold of their memory, such as `weight.detach()`.
        self.own |= {id(tensor): tensor for tensor in tensors if self._memory.holds(tensor)}
        self.leading = found.leading_to([*self.modules, *self.own], through=self.shared)
        self.memo = dict[int, Any]()
        self._kept = list[object]()  # an object in the memo must live, or its id may become another's
        self._late = list[Callable[[], object]]()
        for key in self.own.keys() & replacements.keys():
            self._remember(self.own[key], self._replaced(self.own[key], replacements[key]))
        # First, since `copy.deepcopy` refuses tensors with a history.
        for tensor in tensors:
            if tensor.requires_grad and not isinstance(tensor, nn.Parameter):
                self.of(tensor)

    def tensors(self) -> list[Tensor]:
        """Return the tensors that the view shares with the average and with the model."""
        return [self.memo[key] for key in self.own if key in self.memo]

    def of(self, thing: Any) -> Any:
        """Return the copy of ``thing``.

        Args:
            thing: Any object.
        """
        if is_atomic(thing) or isinstance(thing, type | ModuleType):
            return thing
        key = id(thing)
        if key in self.memo:
            return self.memo[key]
        if key in self.shared:
            return thing
        return self._remember(thing, self._copy(thing))

    def finish(self) -> None:
        """Complete the copies that had to wait until all modules were copied."""
        while self._late:
            self._late.pop()()
        # A module may leave out an attribute when it is copied, as Lightning's modules leave out their trainer.
        for key, module in self.modules.items() if self.shared else ():
            shared = {name: value for name, value in vars(module).items() if id(value) in self.shared}
            if key in self.memo:
                vars(self.memo[key]).update(shared)

    def _remember(self, thing: object, copied: Any) -> Any:
        # If a copy was begun while this one was made, others refer to that one.
        copied = self.memo.setdefault(id(thing), copied)
        self._kept.append(thing)
        return copied

    def _copy(self, thing: Any) -> Any:
        kind = type(thing)  # a proxy has another `__class__`
        if issubclass(kind, Tensor):
            return self._tensor(thing)
        if issubclass(kind, nn.Module):
            return self._module(thing)
        if kind in _CONTAINERS:
            return self._container(thing)
        if isinstance(thing, MethodType):
            return MethodType(self.of(thing.__func__), self.of(thing.__self__))
        if id(thing) in self.leading:
            return self._leading_one(thing)
        return thing if isinstance(thing, _BY_REFERENCE) else self._without_model(thing)

    def _leading_one(self, thing: Any) -> Any:
        """Return the copy of an object that leads to the model and is not part of it."""
        if isinstance(thing, FunctionType):
            return self._function(thing)
        if isinstance(thing, BuiltinFunctionType):
            return getattr(self.of(thing.__self__), thing.__name__)
        if type(thing) in weakref.ProxyTypes:
            return weakref.proxy(self.of(referent(thing)))
        if type(thing) is weakref.ref:
            return weakref.ref(self.of(thing()))
        return thing.__deepcopy__(self.memo) if hasattr(type(thing), "__deepcopy__") else self._rebuilt(thing)

    # Tensors

    def _replaced(self, tensor: Tensor, by: Tensor) -> Tensor:
        attributes = vars(tensor)
        values = local(by).detach()
        if (wrapped := rewrapped(tensor, values)) is not values:
            return nn.Parameter(wrapped, requires_grad=False) if isinstance(tensor, nn.Parameter) else wrapped
        if not isinstance(tensor, nn.Parameter) and not attributes:
            return by.detach()  # an object of its own, whose end shows that nobody holds it
        # A sharded tensor may have a replacement without shards, and has no class of its own.
        new = _alias(by, type(by) if is_sharded(tensor) else type(tensor))
        if attributes:
            # Such as muP's shapes and geoopt's manifolds, which may be modules.
            self._late.append(lambda: vars(new).update({name: self.of(value) for name, value in attributes.items()}))
        return new

    def _tensor(self, tensor: Tensor) -> Tensor:
        """Return the copy of a tensor that has no replacement."""
        if self._memory.holds(tensor):
            if (alias := self._memory.view(tensor)) is not None:
                return nn.Parameter(alias, requires_grad=False) if isinstance(tensor, nn.Parameter) else alias
            if self._memory.overlaps(tensor):
                raise CopyError(
                    f"ema_model must hold the average, and {self.found.where(id(tensor))} views the memory of an "
                    f"averaged tensor in a way that the copy cannot; {INSTEAD}"
                )
        if isinstance(tensor, nn.Parameter) and not nn.parameter.is_lazy(tensor):
            # An alias, so that changes of the copy, such as .half(), do not change the model.
            return self._replaced(tensor, tensor.detach())
        plain = tensor.detach() if tensor.requires_grad else tensor
        try:
            return copy.deepcopy(plain, self.memo)
        except (RuntimeError, NotImplementedError):  # as of tensors that only have a shape, in a graph
            return plain

    # Containers and objects

    def _container(self, thing: Any) -> Any:
        if type(thing) in {tuple, frozenset}:
            return type(thing)([self.of(value) for value in thing])
        new: Any = deque(maxlen=thing.maxlen) if isinstance(thing, deque) else type(thing)()
        self._remember(thing, new)
        if isinstance(thing, dict):
            for key, value in thing.items():
                new[self.of(key)] = self.of(value)
            if isinstance(thing, defaultdict):
                new.default_factory = self.of(thing.default_factory)
        elif isinstance(thing, set):
            new.update([self.of(value) for value in thing])
        else:
            new.extend([self.of(value) for value in thing])
        return new

    def _without_model(self, thing: Any) -> Any:
        """Return a deep copy of an object that does not lead to the model, or itself if it has none, such as a lock."""
        trial = ChainMap(dict[int, Any](), self.memo)
        self._kept.append(trial)
        try:
            copied = copy.deepcopy(thing, trial)  # type: ignore[arg-type]
        except Exception:  # whatever it is, it does not lead to the model
            return thing
        self.memo.update(trial.maps[0])
        return copied

    def _rebuilt(self, thing: Any) -> Any:
        """Return a copy made from ``__reduce_ex__``, as ``copy.deepcopy`` makes it."""
        reduced = thing.__reduce_ex__(4)
        if isinstance(reduced, str):
            return thing
        make, arguments, state, items, pairs, *_ = (*reduced, None, None, None)
        new = self._remember(thing, make(*[self.of(argument) for argument in arguments]))
        if state is not None:
            self._kept.append(state)  # which may have been made for this call
            _give_state(new, self.of(state))
        for item in items or ():
            new.append(self.of(item))
        for key, value in pairs or ():
            new[self.of(key)] = self.of(value)
        return new

    # Modules

    def _module(self, module: nn.Module) -> nn.Module:
        """Return a copy with all attributes, also those that the module does not deep-copy or pickle."""
        if isinstance(module, torch.jit.ScriptModule):
            if id(module) not in self.modules:
                return module  # its weights have no average
            name = self.found.where(id(module))
            raise CopyError(f"ema_model must copy the model, and {name} is scripted by torch.jit; {INSTEAD}")
        inner = _wrapped(module)
        new = self._remember(module, object.__new__(_own_class(module)))
        held = vars(new)
        for name, value in attributes_before(module).items():
            if inner is None or name in _BARE:
                self.at = self.found.named(module, name)
                held[name] = self.of(value)
        if inner is not None:
            # It only calls the inner module: uncompiled, without communication.
            held["_super_module_initialized"] = True
            held["forward"] = held["_modules"][inner].__call__
        return new

    # Functions

    def _function(self, function: FunctionType) -> Any:
        compiled = getattr(function, "_torchdynamo_orig_callable", None)
        if compiled is not None:
            return self.of(compiled)
        named = {n: v for n, v in self.found.globals_of(function).items() if id(v) in self.leading}
        namespace = dict(function.__globals__) if named else function.__globals__
        cells = tuple(map(self._cell, function.__closure__ or ()))
        new = FunctionType(function.__code__, namespace, function.__name__, None, cells or None)
        self._remember(function, new)
        new.__qualname__, new.__module__, new.__doc__ = function.__qualname__, function.__module__, function.__doc__
        new.__annotations__ = function.__annotations__

        def fill() -> None:
            namespace.update({name: self.of(value) for name, value in named.items()})
            new.__defaults__ = self.of(function.__defaults__)
            new.__kwdefaults__ = self.of(function.__kwdefaults__)
            vars(new).update({name: self.of(value) for name, value in vars(function).items()})

        self._late.append(fill)
        return new

    def _cell(self, cell: CellType) -> CellType:
        """Return a cell for the copy of a function; one that does not lead to the model is shared."""
        if id(cell) not in self.leading:
            return cell
        if id(cell) not in self.memo:
            new = self._remember(cell, CellType())

            def fill() -> None:
                new.cell_contents = self.of(cell.cell_contents)

            self._late.append(fill)
        return self.memo[id(cell)]


def _own_class(module: nn.Module) -> type:
    """Return the class of a copy: of a parametrized module a new one, whose property its own removal deletes."""
    kind = class_before(module)
    if not parametrize.is_parametrized(module):
        return kind
    return type(
        kind.__name__, kind.__bases__, {name: value for name, value in vars(kind).items() if name != "__dict__"}
    )


def _alias(by: Tensor, cls: type[Tensor]) -> Tensor:
    """Return an alias of ``by`` with the class of the tensor that it replaces, if that is possible."""
    if type(by) not in {Tensor, nn.Parameter} or cls is nn.Parameter:
        return nn.Parameter(by, requires_grad=False) if issubclass(cls, nn.Parameter) else by.detach()
    return Tensor._make_subclass(cls, by.detach(), False)  # noqa: SLF001


def _give_state(new: Any, state: Any) -> None:
    """Set the state that ``__reduce_ex__`` returned on a copy."""
    if hasattr(new, "__setstate__"):
        new.__setstate__(state)
        return
    attributes, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
    if attributes:
        vars(new).update(attributes)
    for name, value in (slots or {}).items():
        setattr(new, name, value)

"""Reads pickles as data. Containers, numbers and text are built; only the names of classes and functions are kept.

Nothing in a pickle is imported or called. An object whose class or function is not in the given table becomes
a `StandIn`, which does nothing. The size of what is built is bounded by the size of the pickle and by limits.
"""

import io
import operator
import pickletools
from collections.abc import Callable, Mapping
from functools import partialmethod
from typing import Any, cast

from polyak.compat.words import shown
from polyak.errors import CheckpointError

# The size of the pickle alone: tensors are stored outside it.
MOST_BYTES = 64 << 20
# An opcode makes at most about 100 bytes, so this bounds the memory to about 600 MB.
MOST_OPCODES = 6_000_000


class Name:
    """The name of a class or function in a pickle.

    Args:
    path: The path with the module, such as ``collections.OrderedDict``.
    """

    __slots__ = ("path",)

    def __init__(self, path: str) -> None:
        self.path = path


class StandIn(dict[Any, Any]):
    """Stands for an object that was not built. It has the items of a mapping, and what the object was made from.

    Args:
        of: Its class or function.
        arguments: The arguments that it would have been made with.
    """

    __slots__ = ("arguments", "of", "state")

    def __init__(self, of: str, arguments: object = None) -> None:
        self.of = of
        self.arguments = arguments
        self.state: object = None

    # Hashed and compared by identity, so that it can be the key of a mapping.

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


Builders = Mapping[str, Callable[..., Any]]

_ATOMS = (str, int, float, bool, type(None), bytes, complex)
_MARK = object()
_CHUNK = 1 << 12
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}


def as_key(value: object) -> Any:
    """Return a value that can be the key of a mapping: the value itself if its hash is cheap, or else a stand-in.

    Args:
    value: Any value. The hash of a deeply nested tuple would overflow the stack.
    """
    if type(value) in _ATOMS or isinstance(value, (StandIn, Name)):
        return value
    if type(value) is tuple and all(type(item) in _ATOMS for item in value):
        return value
    return StandIn(f"a key that is a {type(value).__name__}")


def _pairs(items: object = ()) -> dict[Any, Any]:
    if isinstance(items, Mapping):
        return dict(items)
    if not isinstance(items, (list, tuple)) or not all(
        isinstance(one, (list, tuple)) and len(one) == 2 for one in items
    ):
        raise CheckpointError("a pickle of a mapping must hold pairs")
    return {as_key(key): value for key, value in items}


def _listed(items: object = (), *_: object) -> list[Any]:
    if not isinstance(items, (list, tuple, set, frozenset)):
        raise CheckpointError("a pickle of a sequence must hold a list")
    return list(items)


def _encoded(text: object, encoding: object = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in {"latin1", "latin-1"}:
        raise CheckpointError("a pickle's bytes must be encoded as latin1")
    return text.encode("latin1")


_CONTAINERS: Builders = {
    "collections.OrderedDict": _pairs,
    "collections.Counter": _pairs,
    "collections.defaultdict": lambda factory=None, items=(): _pairs(items),
    "collections.deque": _listed,
    "builtins.dict": _pairs,
    "builtins.list": _listed,
    "builtins.tuple": lambda items=(): tuple(_listed(items)),
    "builtins.set": lambda items=(): {as_key(item) for item in _listed(items)},
    "builtins.frozenset": lambda items=(): {as_key(item) for item in _listed(items)},
    "builtins.complex": lambda real=0.0, imaginary=0.0: complex(float(real), float(imaginary)),
    "_codecs.encode": _encoded,
}

_NUMBERS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT")
_BYTES = ("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8")
_TEXTS = ("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")
# These push their argument.
_PUSHED = frozenset((*_NUMBERS, *_BYTES, *_TEXTS))
_CONSTANTS: Mapping[str, Callable[[], Any]] = {
    "MARK": lambda: _MARK,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": set,
}
_IGNORED = frozenset({"PROTO", "FRAME"})


class Unpickler:
    """Reads one pickle.

    Args:
    builders: Our functions, by the name of what they make, in addition to those that make containers.
    constants: What other names stand for, such as dtypes.
    persistent: Makes an object that lies outside the pickle from its id.

    Attributes:
    unknown: The names that are not in any of the tables, in order.
    """

    def __init__(
        self, builders: Builders, constants: Mapping[str, object], persistent: Callable[[object], Any]
    ) -> None:
        self._builders = {**_CONTAINERS, **builders}
        self._constants = constants
        self._persistent = persistent
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._spent = 0
        self.unknown: list[str] = []

    def load(self, file: Any) -> Any:
        """Return what the pickle holds, and leave the file at its end.

        Args:
            file: Open for reading.

        Raises:
            CheckpointError: If it is not a pickle, is too large, or does what no pickler does.
        """
        try:
            for opcode, argument, _ in pickletools.genops(file):
                self.spend(1)
                self._do(opcode.name, argument)
        except (ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"its pickle is damaged ({type(error).__name__}: {shown(error)})") from None
        result = self._stack.pop()
        self._stack.clear()
        self._memo.clear()
        return result

    def spend(self, cost: int) -> None:
        """Count what was built.

        Args:
            cost: The cost in opcodes.

        Raises:
            CheckpointError: If there is more than `MOST_OPCODES` in all.
        """
        self._spent += cost
        if self._spent > MOST_OPCODES:
            raise CheckpointError(f"its pickle has more than {MOST_OPCODES:,} objects")

    def _do(self, name: str, argument: Any) -> None:
        if name in _PUSHED:
            self._stack.append(argument)
        elif name in _CONSTANTS:
            if name == "EMPTY_SET":  # the largest of them
                self.spend(4)
            self._stack.append(_CONSTANTS[name]())
        elif name not in _IGNORED:
            getattr(self, f"_op_{name.lower()}")(argument)

    # What is on the stack

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise CheckpointError("its pickle is damaged (a mark in the place of a value)")
        return value

    def _to_mark(self) -> list[Any]:
        at = len(self._stack) - 1
        while self._stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise CheckpointError("its pickle is damaged (there is no mark)")
        items = self._stack[at + 1 :]
        del self._stack[at:]
        return items

    def _op_stop(self, _: object) -> None:
        if len(self._stack) != 1 or self._stack[0] is _MARK:
            raise CheckpointError("its pickle is damaged (it must end with one value)")

    def _op_pop(self, _: object) -> None:
        self._stack.pop()

    def _op_pop_mark(self, _: object) -> None:
        self._to_mark()

    def _op_dup(self, _: object) -> None:
        self._stack.append(self._stack[-1])

    def _op_get(self, at: int) -> None:
        self._stack.append(self._memo[at])

    _op_binget = _op_long_binget = _op_get

    def _op_put(self, at: int) -> None:
        self._memo[at] = self._stack[-1]

    _op_binput = _op_long_binput = _op_put

    def _op_memoize(self, _: object) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    # Containers

    def _op_tuple(self, _: object) -> None:
        self._stack.append(tuple(self._to_mark()))

    def _last(self, count: int, _: object) -> None:
        items = [self._pop() for _ in range(count)]
        self._stack.append(tuple(reversed(items)))

    _op_tuple1 = partialmethod(_last, 1)
    _op_tuple2 = partialmethod(_last, 2)
    _op_tuple3 = partialmethod(_last, 3)

    def _op_list(self, _: object) -> None:
        self._stack.append(self._to_mark())

    def _op_append(self, _: object) -> None:
        self._append([self._pop()])

    def _op_appends(self, _: object) -> None:
        self._append(self._to_mark())

    def _op_additems(self, _: object) -> None:
        items = self._to_mark()
        if isinstance(self._stack[-1], set):
            self._stack[-1].update(as_key(item) for item in items)
        else:
            self._append(items)

    def _append(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, StandIn):
            raise CheckpointError("its pickle is damaged (what is appended to must be a list)")

    def _op_frozenset(self, _: object) -> None:
        self._stack.append(frozenset(as_key(item) for item in self._to_mark()))

    def _op_dict(self, _: object) -> None:
        items = self._to_mark()
        self._stack.append({})
        self._set(items)

    def _op_setitem(self, _: object) -> None:
        value, key = self._pop(), self._pop()
        self._set([key, value])

    def _op_setitems(self, _: object) -> None:
        self._set(self._to_mark())

    def _set(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise CheckpointError("its pickle is damaged (keys and values must be of a mapping)")
        for key, value in zip(items[::2], items[1::2], strict=True):
            kept = as_key(key)
            if kept is not key:
                self.unknown.append(kept.of)
            target[kept] = value

    # Names, and what would be made by them

    def _name(self, module: str, name: str) -> None:
        path = f"{_PYTHON_2.get(module, module)}.{name}"
        if path in self._constants:
            self._stack.append(self._constants[path])
            return
        if path not in self._builders:
            self.unknown.append(path)
            self.spend(2)
        self._stack.append(Name(path))

    def _op_global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._name(module, name)

    def _op_stack_global(self, _: object) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise CheckpointError("its pickle is damaged (a name must be text)")
        self._name(module, name)

    def _op_ext1(self, number: int) -> None:
        self._name("extension", str(number))

    _op_ext2 = _op_ext4 = _op_ext1

    def _make(self, what: object, arguments: object) -> None:
        self.spend(2)
        if not isinstance(what, Name):
            self.unknown.append("the result of a call")
            self._stack.append(StandIn("the result of a call", arguments))
            return
        builder = self._builders.get(what.path)
        if builder is not None and isinstance(arguments, tuple):
            self._stack.append(builder(*arguments))
        elif what.path == "copyreg._reconstructor" and isinstance(arguments, tuple) and len(arguments) == 3:
            made = StandIn(getattr(arguments[0], "path", what.path))
            if isinstance(arguments[2], Mapping):
                made.update(arguments[2])
            self._stack.append(made)
        else:
            self._stack.append(StandIn(what.path, arguments))

    def _op_reduce(self, _: object) -> None:
        arguments, what = self._pop(), self._pop()
        self._make(what, arguments)

    _op_newobj = _op_reduce

    def _op_newobj_ex(self, _: object) -> None:
        self._pop()  # keyword arguments
        self._op_reduce(None)

    def _op_obj(self, _: object) -> None:
        what, *arguments = self._to_mark()
        self._make(what, tuple(arguments))

    def _op_inst(self, argument: str) -> None:
        arguments = self._to_mark()
        self._op_global(argument)
        self._make(self._stack.pop(), tuple(arguments))

    def _op_build(self, _: object) -> None:
        state, made = self._pop(), self._stack[-1]
        if isinstance(made, StandIn):
            made.state = state

    def _op_persid(self, argument: object) -> None:
        self._stack.append(self._persistent(argument))

    def _op_binpersid(self, _: object) -> None:
        self._stack.append(self._persistent(self._pop()))


class Window:
    """A part of a file, for reading.

    Args:
    data: What is read.
    most: How many bytes may be read in all; None for no limit.
    at_once: How many bytes one call may read.
    viewed: Reads of at least so many bytes return a view of the file, which does not count; None for never.
    """

    def __init__(
        self,
        data: memoryview,
        most: int | None = MOST_BYTES,
        at_once: int = MOST_BYTES,
        viewed: int | None = None,
    ) -> None:
        self._data = data
        self._at = 0
        self._left = most
        self._at_once = at_once
        self._viewed = viewed

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes.

        Args:
            size: How many; -1 for the rest.

        Raises:
            CheckpointError: If these are more than may be read.
        """
        size = min(size if size >= 0 else len(self._data), max(0, len(self._data) - self._at))
        if self._viewed is not None and size >= self._viewed:
            self._at += size
            return cast(bytes, self._data[self._at - size : self._at])  # pickletools asks only for its length
        return self._take(size)

    def readline(self) -> bytes:
        """Return the bytes up to the end of the line."""
        for begin in range(self._at, len(self._data), _CHUNK):
            if (end := bytes(self._data[begin : begin + _CHUNK]).find(b"\n")) >= 0:
                return self._take(begin + end + 1 - self._at)
        return self._take(max(0, len(self._data) - self._at))

    def _take(self, size: int) -> bytes:
        if self._left is not None:
            self._left -= size
        if size > self._at_once or (self._left is not None and self._left < 0):
            raise CheckpointError(f"what it holds other than tensors is larger than {MOST_BYTES >> 20} MiB")
        found = bytes(self._data[self._at : self._at + size])
        self._at += size
        return found

    def tell(self) -> int:
        """Return the position."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Change the position, and return it.

        Args:
            offset: The offset from where ``whence`` says.
            whence: As for files.
        """
        self._at = max(0, offset + (0, self._at, len(self._data))[operator.index(whence)])
        return self._at

    def seekable(self) -> bool:
        """Return True."""
        return True

"""``block``: a method that can be used in ``with`` with or without calling it."""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, overload

P = ParamSpec("P")
T = TypeVar("T")
Owner = TypeVar("Owner")


class Block(Generic[P, T]):
    """Makes a context manager when it is called, or when it is entered without a call.

    Args:
        make: Returns a new context manager.
    """

    def __init__(self, make: Callable[P, AbstractContextManager[T]]) -> None:
        self._make = make
        self._entered = list[AbstractContextManager[T]]()

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> AbstractContextManager[T]:
        return self._make(*args, **kwargs)

    def __enter__(self) -> T:
        make: Callable[[], AbstractContextManager[T]] = self._make  # type: ignore[assignment]
        manager = make()
        value = manager.__enter__()
        self._entered.append(manager)
        return value

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return self._entered.pop().__exit__(kind, error, traceback)


class block(Generic[Owner, P, T]):  # noqa: N801  a decorator
    """``contextlib.contextmanager`` for a method, which allows ``with thing.method:`` for ``with thing.method():``.

    Args:
        function: A generator function, the method.
    """

    def __init__(self, function: Callable[Concatenate[Owner, P], Iterator[T]]) -> None:
        self._manager = contextmanager(function)
        functools.update_wrapper(self, function)  # type: ignore[arg-type]

    @overload
    def __get__(self, owner: None, kind: type) -> "block[Owner, P, T]": ...
    @overload
    def __get__(self, owner: Owner, kind: type) -> Block[P, T]: ...
    def __get__(self, owner: Owner | None, kind: type) -> "block[Owner, P, T] | Block[P, T]":
        if owner is None:
            return self
        make: Any = functools.partial(self._manager, owner)  # type checkers do not follow it
        return Block(make)

"""``Methods``: replaces methods of one object for a time."""

from collections.abc import Callable
from typing import Any


class Methods:
    """Replacements of methods of one object.

    Args:
        owner: The object.
    """

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        self._replaced = list[tuple[str, Callable[..., Any], bool, Any]]()
        self.active = True

    def around(self, name: str, call: Callable[..., Any]) -> None:
        """Replace a method by ``call``.

        Args:
            name: The name of the method.
            call: Given the method as it was, and the arguments. It is no longer called after ``remove``.
        """
        inner, own = getattr(self._owner, name), name in vars(self._owner)

        def method(*args: Any, **kwargs: Any) -> Any:
            return call(inner, *args, **kwargs) if self.active else inner(*args, **kwargs)

        setattr(self._owner, name, method)
        self._replaced.append((name, method, own, inner))

    def remove(self) -> None:
        """Restore the object's methods. If somebody else has replaced one since, it then only calls the original."""
        self.active = False
        for name, method, own, inner in reversed(self._replaced):
            if vars(self._owner).get(name) is method:
                setattr(self._owner, name, inner) if own else delattr(self._owner, name)
        self._replaced.clear()

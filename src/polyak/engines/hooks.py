"""``Methods``: methods of one object that are replaced until they are removed."""

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
        """Let ``call`` run instead of a method.

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
        """Give the object its methods back, unless somebody else has replaced them since: then they do nothing more."""
        self.active = False
        for name, method, own, inner in reversed(self._replaced):
            if vars(self._owner).get(name) is method:
                setattr(self._owner, name, inner) if own else delattr(self._owner, name)
        self._replaced.clear()

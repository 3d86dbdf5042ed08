"""What docstrings say about arguments is what signatures say."""

import dataclasses
import enum
import inspect
import re
from collections.abc import Iterator
from typing import Any, Protocol

import pytest

import polyak

_HEADER = re.compile(r"(Args|Attributes|Example|Examples|Note|Raises|References|Returns|Warns|Yields):")
_ENTRY = re.compile(r"    (\*{0,2}\w+): \S")


def documented(docstring: str) -> list[str] | None:
    """Return the names under ``Args:`` in order, or None if there is no such section."""
    section, names = None, []
    for line in inspect.cleandoc(docstring).splitlines():
        if header := _HEADER.fullmatch(line):
            section = header[1]
            if section == "Args" and names:
                names.append("a second Args section")
        elif section == "Args" and line.startswith("    ") and not line.startswith("     "):
            entry = _ENTRY.match(line)
            names.append(entry[1].lstrip("*") if entry else f"{line.strip()!r}, which is not 'name: text'")
        elif line and not line.startswith(" "):
            section = None
    return names if names else None


def parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if not name.startswith("_")]


def is_ours(thing: Any) -> bool:
    return (getattr(thing, "__module__", None) or "").split(".")[0] in {"polyak", __name__.split(".")[0]}


def is_protocol(cls: type) -> bool:
    return getattr(cls, "_is_protocol", False)


def compare(where: str, has: list[str], docstring: str | None, *, required: bool) -> Iterator[str]:
    if not docstring:
        yield f"{where} has no docstring"
        return
    says = documented(docstring)
    if (says is not None and says != has) or (says is None and has and required):
        yield f"{where} takes {has}, and its docstring documents {says}"


def docstring_of_member(cls: type, name: str) -> str | None:
    """Find a member's docstring: its own, an inherited one, or that of a protocol the class has all members of."""
    if own := inspect.getdoc(getattr(cls, name)):
        return own
    exported = (getattr(polyak, public) for public in polyak.__all__)
    nearby = vars(inspect.getmodule(cls)).values()
    for protocol in (thing for thing in (*nearby, *exported) if inspect.isclass(thing) and is_protocol(thing)):
        members = {member for member in vars(protocol) if not member.startswith("_")}
        if name in members and all(hasattr(cls, member) for member in members):
            return inspect.getdoc(getattr(protocol, name))
    return None


def constructor_owner(cls: type) -> type | None:
    """Return the class of ours whose docstring must document the arguments of ``cls``, if there is one."""
    if issubclass(cls, enum.Enum) or is_protocol(cls):
        return None
    owner = next(base for base in cls.__mro__ if "__init__" in vars(base) or "__new__" in vars(base))
    return owner if is_ours(owner) and not is_protocol(owner) else None


def problems(thing: Any, name: str) -> Iterator[str]:
    """Yield where the documentation of a public class or function is not true."""
    if not inspect.isclass(thing):
        yield from compare(name, parameters(thing), inspect.getdoc(thing), required=True)
        return
    owner = constructor_owner(thing)
    has = parameters(thing) if owner else []
    # A class that adds no argument may leave them to the class that takes them.
    yield from compare(name, has, vars(thing).get("__doc__"), required=owner is thing)
    for member, raw in vars(thing).items():
        if member.startswith("_"):
            continue
        where = f"{name}.{member}"
        if isinstance(raw, property):
            yield from compare(where, [], docstring_of_member(thing, member), required=False)
        elif inspect.isroutine(raw):
            has = parameters(getattr(thing, member))
            has = has[1:] if inspect.isfunction(raw) else has  # without self
            # A method may say all in one line: asked for is a docstring, and that what it documents is true.
            yield from compare(where, has, docstring_of_member(thing, member), required=False)


def public() -> list[str]:
    return [
        name
        for name in polyak.__all__
        if inspect.isroutine(getattr(polyak, name)) or inspect.isclass(getattr(polyak, name))
    ]


@pytest.mark.parametrize("name", public())
def test_documented_arguments_are_the_arguments(name: str) -> None:
    assert list(problems(getattr(polyak, name), name)) == []


class Walker(Protocol):
    """What walks."""

    def walk(self, steps: int, pace: float) -> None:
        """Walk.

        Args:
            steps: How many.
            pace: How fast.

        Raises:
            ValueError: If ``steps``
                is negative.
        """


@dataclasses.dataclass(frozen=True)
class Dog:
    """A dog.

    Args:
        name: What it answers to: one word,
            or: none.
        age: In years.

    Raises:
        ValueError: Never.
    """

    name: str
    age: int = 0

    def walk(self, steps, pace):
        pass


class Puppy(Dog):
    """A young dog."""


def greet(*names: str, loudly: bool = False, **others: str) -> None:
    """Greet.

    Args:
        *names: Whom.
        loudly: Whether so.
        **others: Who else.
    """


@pytest.mark.parametrize("thing", [Dog, Puppy, Walker, greet])
def test_true_documentation_passes(thing: Any) -> None:
    assert list(problems(thing, "thing")) == []


def renamed(paws: int) -> None:
    """Count.

    Args:
        feet: How many.
    """


def reordered(a: int, b: int) -> None:
    """Add.

    Args:
        b: One.
        a: The other.
    """


def forgotten(a: int, b: int) -> None:
    """Add.

    Args:
        a: One.
    """


def typed(a: int) -> None:
    """Negate.

    Args:
        a (int): A number.
    """


def undocumented(a: int) -> None:
    """Negate."""


def silent(a: int) -> None:
    pass


@dataclasses.dataclass
class Grown:
    """A dataclass that got a field.

    Args:
        a: A field.
    """

    a: int
    b: int


class Method:
    """A class with a method that changed."""

    def move(self, distance: int) -> None:
        """Move.

        Args:
            steps: How many.
        """


class Bare:
    """A class with a member that says nothing."""

    @property
    def colour(self) -> str:
        return "red"


@pytest.mark.parametrize(
    "thing", [renamed, reordered, forgotten, typed, undocumented, silent, Grown, Method, Bare], ids=lambda t: t.__name__
)
def test_drift_is_found(thing: Any) -> None:
    assert len(list(problems(thing, "thing"))) == 1

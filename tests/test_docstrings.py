"""Everything public is documented: all arguments, all fields of dataclasses, members by their protocols.

pydoclint (``.flake8``) compares the arguments that a function's own docstring documents with its signature.
"""

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


def missing(where: str, takes: list[str], docstring: str | None) -> Iterator[str]:
    """Yield what a docstring of a public thing lacks; pydoclint compares the arguments that it documents."""
    if not docstring:
        yield f"{where} has no docstring"
    elif takes and documented(docstring) is None:
        yield f"{where} takes {takes}, and its docstring has no Args section"


def different(where: str, takes: list[str], docstring: str) -> Iterator[str]:
    """Yield if a docstring documents other arguments, where pydoclint cannot know of which function it speaks."""
    says = documented(docstring)
    if says is not None and says != takes:
        yield f"{where} takes {takes}, and its docstring documents {says}"


def inherited_docstring(cls: type, name: str) -> str | None:
    """Return what documents a member without a docstring: a base class, or a protocol the class has all members of."""
    if found := inspect.getdoc(getattr(cls, name)):
        return found
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
    """Yield where the documentation of a public class or function is incomplete."""
    if not inspect.isclass(thing):
        yield from missing(name, parameters(thing), inspect.getdoc(thing))
        return
    owner = constructor_owner(thing)
    takes = parameters(thing) if owner else []
    docstring = vars(thing).get("__doc__")
    # A class that adds no argument may leave them to the class that takes them.
    yield from missing(name, takes if owner is thing else [], docstring)
    if docstring:
        yield from different(name, takes, docstring)
    for member, raw in vars(thing).items():
        if not member.startswith("_") and (isinstance(raw, property) or inspect.isroutine(raw)):
            yield from problems_of_member(thing, member, f"{name}.{member}")


def problems_of_member(cls: type, member: str, where: str) -> Iterator[str]:
    raw = vars(cls)[member]
    if getattr(getattr(raw, "__func__", raw), "__doc__", None):  # without Args, if it says all in one line
        return
    docstring = inherited_docstring(cls, member)
    yield from missing(where, [], docstring)
    if docstring and inspect.isroutine(raw):
        takes = parameters(getattr(cls, member))
        yield from different(where, takes[1:] if inspect.isfunction(raw) else takes, docstring)


def public() -> list[str]:
    return [
        name
        for name in polyak.__all__
        if inspect.isroutine(getattr(polyak, name)) or inspect.isclass(getattr(polyak, name))
    ]


@pytest.mark.parametrize("name", public())
def test_everything_public_is_documented(name: str) -> None:
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
def test_complete_documentation_passes(thing: Any) -> None:
    assert list(problems(thing, "thing")) == []


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


class Strayed:
    """A class that has all members of a protocol, and other arguments."""

    def walk(self, steps, speed):
        pass


class Bare:
    """A class with a member that says nothing."""

    @property
    def colour(self) -> str:
        return "red"


@pytest.mark.parametrize("thing", [undocumented, silent, Grown, Strayed, Bare], ids=lambda t: t.__name__)
def test_incomplete_documentation_is_found(thing: Any) -> None:
    assert len(list(problems(thing, "thing"))) == 1

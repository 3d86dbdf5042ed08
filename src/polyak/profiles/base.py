"""The protocol of profiles, and their registry. The profiles themselves are in ``polyak.profiles``."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, Self, TypeVar

from polyak.errors import ProfileError
from polyak.time import Time, TimeUnit


class Profile(Protocol):
    """The members that averaging needs of a profile. A custom class needs only these three."""

    @property
    def unit(self) -> TimeUnit | None:
        """The unit of the clock, or None for a clock that counts updates."""
        ...

    @property
    def recursive(self) -> bool:
        """Whether one buffer can follow the profile during training."""
        ...

    def decay(self, before: float, now: float) -> float:
        """Return the share of the average at ``now`` that was in it at ``before``."""
        ...


@dataclass(frozen=True, slots=True)
class Form:
    """The form of a profile on a command line: ``--NAME VALUE``, or ``NAME=VALUE`` in a list.

    Args:
        name: The name of the option, without dashes.
        metavar: Stands for the value in the help.
        help: What the profile is, for the help.
        example: A value that can be parsed.
    """

    name: str
    metavar: str
    help: str
    example: str


class NamedProfile(ABC):
    """A profile with its forms on the command line and its words for people.

    All members but ``unit`` and ``decay`` have a default. The first of ``FORMS`` is the option of the class; the others
    are valid in lists only.
    """

    __slots__ = ()

    FORMS: ClassVar[tuple[Form, ...]] = ()

    @classmethod
    def parse(cls, form: str, text: str) -> Self:
        """Return the profile that a command line gives; a class with ``FORMS`` has this method.

        Args:
            form: The name of one of ``FORMS``.
            text: The value.

        Raises:
            PolyakError: If the value is out of range.
            ValueError: If the text is not a value.
        """
        raise ProfileError(f"a profile on the command line must have a form (got {form}={text} for {cls.__name__})")

    @property
    @abstractmethod
    def unit(self) -> TimeUnit | None:
        """The unit of the clock, or None for a clock that counts updates."""

    @property
    def recursive(self) -> bool:
        """Whether one buffer can follow the profile during training."""
        return True

    @abstractmethod
    def decay(self, before: float, now: float) -> float:
        """Return the share of the average at ``now`` that was in it at ``before``.

        Args:
            before: The earlier reading of the clock.
            now: The later reading.
        """

    def placed(self, edges: Sequence[float]) -> tuple["NamedProfile", float]:
        """Return the profile as it applies to means between edges, and the share of the last raw weights besides.

        Args:
            edges: Readings of the clock between which there are means, in order; the last is the moment of the average.

        Raises:
            ProfileError: If it needs weights from before the first edge, and cannot do without them.
        """
        del edges
        return self, 0.0

    @property
    def online(self) -> str:
        """For error messages: what to do, since one buffer cannot follow the profile."""
        return "record the run and take this average from the record, or use HalfLife"

    @property
    def constant(self) -> bool:
        """Whether the decay depends only on ``now - before``."""
        return False

    @property
    def forgets_nothing(self) -> bool:
        """Whether the average is meant to keep the first weights."""
        return False

    @property
    def half_life(self) -> Time | None:
        """The half-life, or None for a profile that is not given by one."""
        return None

    @property
    def argument(self) -> str:
        """The argument of ``EMA`` that gives the profile, for error messages."""
        return f"profile={self!r}"

    @property
    def options(self) -> str | None:
        """The options of ``polyak reconstruct`` that give the profile; None if none do."""
        return None

    def describe(self) -> str:
        """Return the profile's name and value, for tables and headings."""
        return str(self)

    def debiased(self) -> "NamedProfile | None":
        """Return the variant in which the first weights do not count more than others; None if there is none."""
        return None


@dataclass(frozen=True, slots=True, repr=False)
class _Custom(NamedProfile):
    """A class that has only the members of ``Profile``, with defaults for the rest."""

    profile: Profile

    @property
    def unit(self) -> TimeUnit | None:
        return self.profile.unit

    @property
    def recursive(self) -> bool:
        return self.profile.recursive

    def decay(self, before: float, now: float) -> float:
        return self.profile.decay(before, now)

    def __repr__(self) -> str:
        return repr(self.profile)

    def __str__(self) -> str:
        return str(self.profile)


def in_order(before: float, now: float) -> None:
    """Check the two readings that a decay is computed from.

    Args:
        before: The earlier.
        now: The later.

    Raises:
        ProfileError: If they are not in order, or below 0.
    """
    if not 0 <= before <= now:
        raise ProfileError(f"a decay needs 0 <= before <= now (got before={before!r}, now={now!r})")


def named(profile: Profile) -> NamedProfile:
    """Return the profile itself if it has forms and words, else the profile with defaults for them.

    Args:
        profile: Any object with the members of ``Profile``.

    Example:
        >>> from polyak.profiles import HalfLife
        >>> named(HalfLife("500ba")).describe()
        'half-life 500ba'
    """
    return profile if isinstance(profile, NamedProfile) else _Custom(profile)


_REGISTRY: list[type[NamedProfile]] = []

_Registered = TypeVar("_Registered", bound=type[NamedProfile])


def register(profile: _Registered) -> _Registered:
    """Add a class to the registry, which the command line reads.

    Args:
        profile: The class.
    """
    _REGISTRY.append(profile)
    return profile


def options() -> list[Form]:
    """Return the forms that are options, in the order of the classes."""
    return [profile.FORMS[0] for profile in _REGISTRY if profile.FORMS]


def forms() -> dict[str, Form]:
    """Return all forms by name, in the order of the classes.

    Example:
        >>> list(forms())[:3]
        ['half-life', 'unbiased', 'window']
    """
    return {form.name: form for profile in _REGISTRY for form in profile.FORMS}


def parse(form: str, text: str) -> NamedProfile:
    """Return the profile that a command line gives.

    Args:
        form: A name out of ``forms``.
        text: The value.

    Raises:
        PolyakError: If the value is out of range.
        ValueError: If the text is not a value.

    Example:
        >>> parse("power", "0.1").describe()
        'power function 0.1'
    """
    (profile,) = [one for one in _REGISTRY if any(known.name == form for known in one.FORMS)]
    return profile.parse(form, text)


def parse_words(text: str) -> NamedProfile:
    """Return the profile that words give: the name of a form, then its value.

    Args:
        text: Such as ``"half-life 500ba"`` or ``"cooldown 20%, 1-sqrt, floor 0.1"``.

    Raises:
        PolyakError: If there is no such form, or the value is out of range.
        ValueError: If the text is not a value.

    Example:
        >>> parse_words("cooldown 20%, 1-sqrt, floor 0.1").describe()
        'cooldown 0.2dur, 1-sqrt, floor 0.1'
    """
    name, _, value = text.strip().partition(" ")
    if name not in forms() or not value.strip():
        raise ProfileError(
            f"a profile in words must be a name and a value, such as 'cooldown 20%, 1-sqrt' (got {text!r}); the names "
            f"are {', '.join(forms())}"
        )
    return parse(name, value.strip())

"""The work of writing an output, in units: processes share them, and a run that resumes skips the finished ones."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from polyak.checkpoints.plan import Plan
from polyak.compat.folders import Box

# Of the tensors that a unit writes, if one alone is not larger.
UNIT_BYTES = 64 << 20
Facts = Mapping[str, Mapping[str, Any]]
# What an output was made from: the name of it in metadata.
SAID = "polyak.average"


@dataclass(frozen=True, slots=True)
class Unit:
    """A part of an output. It can be written before or after any other, and again.

    Args:
        name: Of its own, as the name of a file.
        write: Writes it; returns what ``finish`` of the writer needs to know, as JSON has it.
    """

    name: str
    write: Callable[[], Mapping[str, Any]]


class Read(Protocol):
    """Returns the average of a tensor."""

    def __call__(self, name: str, box: Box | None = None) -> Tensor:
        """Return a part of it, or all.

        Args:
            name: The name of the tensor.
            box: Where the part begins and ends in each dimension; None for all.
        """
        ...


@dataclass(frozen=True, slots=True)
class Job:
    """What is written.

    Args:
        plan: What is averaged.
        read: Returns the average of a tensor.
        said: What the output says of itself, where it can.
    """

    plan: Plan
    read: Read
    said: Mapping[str, str]


class Writer(Protocol):
    """The members of a module that writes a format."""

    @property
    def prepare(self) -> Callable[[Job, Path], None]:
        """Make the files with all but the tensors in them. One process calls it."""
        ...

    @property
    def units(self) -> Callable[[Job, Path], Sequence[Unit]]:
        """Return the work in the files that ``prepare`` made, the same on each process."""
        ...

    @property
    def finish(self) -> Callable[[Job, Path, Facts], Sequence[Path]]:
        """Complete the files once all units are done; return those whose headers have the placeholders of hashes."""
        ...


def in_groups(names: Sequence[str], size_of: Callable[[str], int], most: int = UNIT_BYTES) -> list[list[str]]:
    """Return names in groups, in order: each has tensors of at most so many bytes together, or one tensor.

    Args:
        names: The names of tensors.
        size_of: Returns the size of one.
        most: How many bytes.

    Example:
        >>> in_groups(["a", "b", "c"], {"a": 3, "b": 9, "c": 4}.__getitem__, most=10)
        [['a'], ['b'], ['c']]
    """
    groups, held = list[list[str]](), 0
    for name in names:
        size = size_of(name)
        if not groups or held + size > most:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return groups

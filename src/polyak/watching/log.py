"""The moments that were read, in a JSON Lines file that is complete after each of them."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from polyak.errors import PolyakError
from polyak.printable import printable
from polyak.storage.lines import Lines, complete_lines
from polyak.watching.moment import Moment

FILE = "watch.jsonl"


class WatchError(PolyakError, ValueError):
    """A file of moments is not as ``watch`` writes it, or is of another record."""


@dataclass(slots=True)
class Log:
    """A file of moments, open inside a ``with`` block: one JSON object per line.

    Args:
        path: The file; None keeps the moments in memory only.

    Raises:
        WatchError: If the file is not such a file, or another process is writing it.
    """

    path: Path | None
    moments: list[Moment] = field(default_factory=list[Moment], init=False)
    _file: Lines | None = field(default=None, init=False)

    def __enter__(self) -> Self:
        if self.path is not None:
            self._file = Lines(self.path, _busy(self.path))
            try:
                self.moments = read_moments(self.path)
            except BaseException:
                self.__exit__()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def add(self, moment: Moment) -> None:
        """Append a moment. It replaces those that are not before it, for example after a run was resumed.

        Args:
            moment: The moment.
        """
        self.moments = _in_order([*self.moments, moment])
        if self._file is not None:
            self._file.add(moment.to_plain())


def read_moments(path: Path) -> list[Moment]:
    """Return the moments in a file, oldest first. If the run was resumed, later entries replace earlier ones.

    Args:
        path: The file.

    Raises:
        WatchError: If a complete line is not a moment.
        OSError: If the file cannot be read.
    """
    found = list[Moment]()
    for number, line in enumerate(complete_lines(path.read_bytes()), start=1):
        try:
            found.append(Moment.from_plain(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError):
            shown = printable(line[:60].decode(errors="replace").rstrip())
            raise WatchError(
                f"line {number} of {path} must be a moment of polyak watch (got {shown}); remove the line"
            ) from None
    return _in_order(found)


def _in_order(moments: Iterable[Moment]) -> list[Moment]:
    found = list[Moment]()
    for moment in moments:
        while found and found[-1].updates >= moment.updates:
            found.pop()
        found.append(moment)
    return found


def _busy(path: Path) -> Callable[[str], WatchError]:
    def busy(owner: str) -> WatchError:
        return WatchError(f"{path} must have one writer at a time (it has {owner}); wait, or choose another file")

    return busy

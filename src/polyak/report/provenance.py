"""Where a report comes from: the records, the command, the date and the versions."""

import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a report comes from.

    Args:
        records: The folders of the records.
        command: The command that wrote it.
        date: The date.
        versions: The versions of polyak, torch and Python.
    """

    records: tuple[str, ...]
    command: str
    date: str
    versions: str

    @property
    def rows(self) -> list[tuple[str, str]]:
        """Return what is shown, each with its name."""
        records = ("record" if len(self.records) == 1 else "records", ", ".join(self.records))
        return [records, ("command", self.command), ("date", self.date), ("versions", self.versions)]


def provenance(folders: Sequence[str]) -> Provenance:
    """Return where a report that is written now comes from.

    Args:
        folders: The folders of the records.
    """
    program = "polyak" if Path(sys.argv[0]).stem in {"polyak", "__main__"} else f"python {shlex.quote(sys.argv[0])}"
    versions = [f"{name} {version(name)}" for name in ("polyak", "torch")]
    return Provenance(
        records=tuple(dict.fromkeys(folders)),
        command=" ".join([program, *map(shlex.quote, sys.argv[1:])]),
        date=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        versions=", ".join([*versions, f"Python {platform.python_version()}"]),
    )

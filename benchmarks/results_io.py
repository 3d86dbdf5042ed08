"""Shared by the benchmarks: writing results, with the machine, the versions and the command."""

import contextlib
import json
import os
import platform
import shlex
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import polyak
from polyak.storage.atomic import replacing

RESULTS = Path(__file__).parent / "results"


def row(*cells: object) -> str:
    """Return a row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> list[str]:
    """Return a Markdown table, with all columns but the first aligned to the right."""
    return [row(*head), row("---", *["---:"] * (len(head) - 1)), *(row(*cells) for cells in rows)]


def paragraph(text: str) -> list[str]:
    """Break a paragraph into lines."""
    return textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False)


def item(text: str) -> list[str]:
    """Break an item of a list into lines."""
    return textwrap.wrap(
        text, 120, initial_indent="- ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def provenance(*packages: str) -> dict[str, str]:
    """Return the command, the versions and the hardware of this run."""
    found = {"polyak": polyak.__version__}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    listed = ", ".join(f"{name} {number}" for name, number in found.items())
    threads = torch.get_num_threads()
    return {
        "command": f"python {shlex.join(sys.argv)}",
        "versions": f"{listed}, Python {platform.python_version()}",
        "hardware": f"{processor()}, {os.cpu_count()} cores; {threads} thread{'' if threads == 1 else 's'}",
    }


def measured(how: Mapping[str, str], wall_s: float | None = None) -> list[str]:
    """Return the section on how it was measured."""
    lines = [
        "## How it was measured",
        "",
        f"- Command: `{how['command']}`",
        f"- Versions: {how['versions']}",
        f"- Hardware: {how['hardware']}",
    ]
    return lines if wall_s is None else [*lines, f"- Time: {wall_s:.0f} s"]


def write(path: Path, lines: Sequence[str], data: Mapping[str, Any] | None = None) -> None:
    """Write a page, and its numbers as JSON next to it, each by a safe write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join([*lines, ""])
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")
    if data is not None:
        with replacing(path.with_suffix(".json")) as draft:
            draft.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(text)


def progress() -> Progress:
    """Return a progress bar on stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))

"""Show what a record contains: the part of the run, its resolution, its size.

The finest half-life is the shortest that the record resolves at its end; further back the record is coarser.
"""

import json
from argparse import ArgumentParser, Namespace
from collections import Counter
from math import prod
from typing import TYPE_CHECKING, Any

from polyak.cli.asking import add_record, open_record
from polyak.cli.command import require
from polyak.cli.output import clocks, size
from polyak.compat.words import printable
from polyak.record import Record, Stretch, load_manifest
from polyak.time import TimeUnit

if TYPE_CHECKING:
    from rich.table import Table

NAME = "inspect"

_EPILOG = """\
examples:
  polyak inspect my-record
  polyak inspect my-record --verify               compare all files with their hashes
  polyak inspect my-record --json | jq .finest
"""


def configure(parser: ArgumentParser) -> None:
    """Add the arguments.

    Args:
        parser: The parser of this command.
    """
    parser.epilog = _EPILOG
    add_record(parser)
    parser.add_argument("--verify", action="store_true", help="read all files and compare them with their hashes")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def run(arguments: Namespace) -> int:
    """Print the contents of a record.

    Args:
        arguments: The parsed arguments.

    Raises:
        RecordError: If there is no record, or with ``--verify`` a file has changed.
    """
    if not arguments.json:
        require("cli", {"rich": "rich"})
    record = open_record(arguments.record)
    if arguments.verify:
        record.verify()
    plain = _describe(record, verified=arguments.verify)
    if arguments.json:
        print(json.dumps(plain, indent=2, ensure_ascii=True))
    else:
        _show(plain)
    return 0


def _describe(record: Record, *, verified: bool) -> dict[str, Any]:
    manifest = load_manifest(record.folder)
    segments = record.stretches
    averaged = [info for info in record.tensors.values() if info.averaged]
    pinned = manifest.files - set(manifest.current_files)
    plain: dict[str, Any] = {
        "record": str(record.folder),
        "from": None,
        "to": None,
        "max_duration": None if record.max_duration is None else str(record.max_duration),
        "stretches": len(segments),
        "in_parts": sum(segment.sharded for segment in segments),
        "per_level": manifest.per_level,
        "levels": [_level(level, segments) for level in sorted({one.level for one in segments}, reverse=True)],
        "size_bytes": sum(segment.size_bytes for segment in segments),
        "tensors": {
            "averaged": len(averaged),
            "last_value": len(record.tensors) - len(averaged),
            "tied": len(record.aliases),
            "averaged_numbers": sum(prod(info.shape) for info in averaged),
            "dtypes": dict(Counter(str(info.dtype).removeprefix("torch.") for info in averaged)),
        },
        "finest": None,
        "pins": {name: {"path": pin.path, "files": len(pin.files)} for name, pin in manifest.pins.items()},
        "pinned_only_files": len(pinned),
        "verified": verified,
    }
    if segments:
        longest = max(segments[-2:], key=lambda one: one.num_updates)
        start, end = segments[0].start, segments[-1].end
        units = clocks(end.timestamp)
        plain["from"] = {"updates": 0} | {unit.value: start.clock(unit) for unit in units}
        plain["to"] = {"updates": end.updates} | {unit.value: value for unit, value in units.items()}
        plain["finest"] = {
            "updates": record.finest,
            "ba": longest.end.clock(TimeUnit.BATCH) - longest.start.clock(TimeUnit.BATCH),
        }
    return plain


def _level(level: int, segments: tuple[Stretch, ...]) -> dict[str, Any]:
    found = [one for one in segments if one.level == level]
    return {
        "level": level,
        "stretches": len(found),
        "updates_each": max(one.num_updates for one in found),
        "from": found[0].start.updates,
        "to": found[-1].end.updates,
        "size_bytes": sum(one.size_bytes for one in found),
    }


_WORDS = {
    "updates": "updates recorded",
    "iter": "iterations",
    "ep": "epochs",
    "ba": "batches",
    "sp": "samples",
    "tok": "tokens",
    "sec": "seconds",
}


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.2f}"


def _show(plain: dict[str, Any]) -> None:
    from rich.console import Console  # noqa: PLC0415  an extra

    console = Console(highlight=False, markup=False, emoji=False)
    console.print(_overview(plain))
    if plain["stretches"]:
        console.print(_levels(plain))
    else:
        console.print("No segment has ended yet: there is nothing to average.")


def _overview(plain: dict[str, Any]) -> "Table":
    from rich.table import Table  # noqa: PLC0415  an extra

    tensors, finest = plain["tensors"], plain["finest"]
    table = Table(title=printable(f"Record {plain['record']}"), title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for unit, end in (plain["to"] or {}).items():
        table.add_row(_WORDS[unit], f"{_number(plain['from'][unit])} to {_number(end)}")
    if plain["max_duration"]:
        table.add_row("planned run", printable(plain["max_duration"]))
    table.add_section()
    tied = f", {tensors['tied']} further names of tied tensors" if tensors["tied"] else ""
    table.add_row("tensors", f"{tensors['averaged']} averaged, {tensors['last_value']} with their last value{tied}")
    dtypes = ", ".join(tensors["dtypes"])
    table.add_row("numbers averaged", f"{tensors['averaged_numbers']:,} as {dtypes}")
    table.add_row("size", f"{size(plain['size_bytes'])} in {_files(plain)}")
    if finest:
        table.add_row("finest half-life", f"{finest['updates']:,} updates, {_number(finest['ba'])}ba")
    pins = ", ".join(f"{name} ({pin['path'] or 'no path'})" for name, pin in plain["pins"].items())
    table.add_row("pinned by", printable(pins or "no checkpoint"))
    if plain["pinned_only_files"]:
        table.add_row("", f"{plain['pinned_only_files']} further files, kept for these checkpoints only")
    if plain["verified"]:
        table.add_row("verified", "all files match their hashes")
    return table


def _files(plain: dict[str, Any]) -> str:
    if not plain["in_parts"]:
        return f"{plain['stretches']} files"
    of_them = "" if plain["in_parts"] == plain["stretches"] else f" in {plain['in_parts']} of them"
    return f"{plain['stretches']} segments, one file per rank{of_them}"


def _levels(plain: dict[str, Any]) -> "Table":
    from rich.table import Table  # noqa: PLC0415  an extra

    merged = "never merged" if plain["per_level"] is None else f"at most {plain['per_level'] + 1} of each length"
    table = Table("level", title=f"{plain['stretches']} segments, {merged}", title_justify="left")
    for heading in ("segments", "updates in each", "from update", "to update", "size"):
        table.add_column(heading, justify="right")
    for one in plain["levels"]:
        numbers = (one["stretches"], one["updates_each"], one["from"], one["to"])
        table.add_row(str(one["level"]), *(f"{number:,}" for number in numbers), size(one["size_bytes"]))
    return table

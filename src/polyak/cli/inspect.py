"""Show what is in a record: which part of the run, how finely, in how many bytes.

The finest half-life is what can be told at the record's end; further back the record is coarser.
"""

import json
from argparse import ArgumentParser, Namespace
from collections import Counter
from math import prod
from typing import Any

from polyak.cli.asking import add_record, clocks, open_record, size
from polyak.cli.command import require
from polyak.compat.words import printable
from polyak.record import Record, Stretch, load_manifest
from polyak.time import TimeUnit

NAME = "inspect"

_EPILOG = """\
examples:
  polyak inspect my-record
  polyak inspect my-record --verify               read all files, and compare them with their hashes
  polyak inspect my-record --json | jq .finest
"""


def configure(parser: ArgumentParser) -> None:
    """Add the arguments.

    Args:
        parser: Of this command.
    """
    parser.epilog = _EPILOG
    add_record(parser)
    parser.add_argument("--verify", action="store_true", help="read all files, and compare them with their hashes")
    parser.add_argument("--json", action="store_true", help="for machines")


def run(arguments: Namespace) -> int:
    """Show it.

    Args:
        arguments: As parsed.

    Raises:
        RecordError: If there is no record, or with ``--verify`` a file is not what was written.
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
    stretches = record.stretches
    averaged = [info for info in record.tensors.values() if info.averaged]
    pinned = manifest.files - {stretch.file for stretch in stretches}
    plain: dict[str, Any] = {
        "record": str(record.folder),
        "from": None,
        "to": None,
        "max_duration": None if record.max_duration is None else str(record.max_duration),
        "stretches": len(stretches),
        "in_parts": sum(stretch.sharded for stretch in stretches),
        "per_level": manifest.per_level,
        "levels": [_level(level, stretches) for level in sorted({one.level for one in stretches}, reverse=True)],
        "size_bytes": sum(stretch.size_bytes for stretch in stretches),
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
    if stretches:
        longest = max(stretches[-2:], key=lambda one: one.num_updates)
        start, end = stretches[0].start, stretches[-1].end
        units = clocks(end.timestamp)
        plain["from"] = {"updates": 0} | {unit.value: start.clock(unit) for unit in units}
        plain["to"] = {"updates": end.updates} | {unit.value: value for unit, value in units.items()}
        plain["finest"] = {
            "updates": record.finest,
            "ba": longest.end.clock(TimeUnit.BATCH) - longest.start.clock(TimeUnit.BATCH),
        }
    return plain


def _level(level: int, stretches: tuple[Stretch, ...]) -> dict[str, Any]:
    here = [one for one in stretches if one.level == level]
    return {
        "level": level,
        "stretches": len(here),
        "updates_each": max(one.num_updates for one in here),
        "from": here[0].start.updates,
        "to": here[-1].end.updates,
        "size_bytes": sum(one.size_bytes for one in here),
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
    from rich.table import Table  # noqa: PLC0415

    console = Console(highlight=False, markup=False, emoji=False)
    tensors, finest = plain["tensors"], plain["finest"]
    table = Table(title=printable(f"Record {plain['record']}"), title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for unit, end in (plain["to"] or {}).items():
        table.add_row(_WORDS[unit], f"{_number(plain['from'][unit])} to {_number(end)}")
    if plain["max_duration"]:
        table.add_row("planned run", printable(plain["max_duration"]))
    table.add_section()
    tied = f", {tensors['tied']} more names of tied ones" if tensors["tied"] else ""
    table.add_row("tensors", f"{tensors['averaged']} averaged, {tensors['last_value']} with their last value{tied}")
    dtypes = ", ".join(tensors["dtypes"])
    table.add_row("numbers averaged", f"{tensors['averaged_numbers']:,} as {dtypes}")
    files = f"{plain['stretches']} files"
    if plain["in_parts"]:
        of_them = "" if plain["in_parts"] == plain["stretches"] else f" in {plain['in_parts']} of them"
        files = f"{plain['stretches']} stretches, a file of each rank{of_them}"
    table.add_row("size", f"{size(plain['size_bytes'])} in {files}")
    if finest:
        table.add_row("finest half-life", f"{finest['updates']:,} updates, {_number(finest['ba'])}ba")
    pins = ", ".join(f"{name} ({pin['path'] or 'no path'})" for name, pin in plain["pins"].items())
    table.add_row("pinned by", printable(pins or "no checkpoint"))
    if plain["pinned_only_files"]:
        table.add_row("", f"{plain['pinned_only_files']} more files, kept for these alone")
    if plain["verified"]:
        table.add_row("verified", "all files are what was written")
    console.print(table)
    if not plain["stretches"]:
        console.print("No stretch has ended yet: there is nothing to average.")
        return
    merged = "never merged" if plain["per_level"] is None else f"at most {plain['per_level'] + 1} of each length"
    table = Table("level", title=f"{plain['stretches']} stretches, {merged}", title_justify="left")
    for heading in ("stretches", "updates in each", "from update", "to update", "size"):
        table.add_column(heading, justify="right")
    for one in plain["levels"]:
        numbers = (one["stretches"], one["updates_each"], one["from"], one["to"])
        table.add_row(str(one["level"]), *(f"{number:,}" for number in numbers), size(one["size_bytes"]))
    console.print(table)

"""Show what a record, a checkpoint or a folder of checkpoints contains: the part of the run, its resolution, its size.

The finest half-life is the shortest that the record resolves at its end; further back the record is coarser. Of a
checkpoint, in any format that polyak average reads, it shows the state dicts and when it was saved.
"""

from argparse import ArgumentParser, Namespace
from collections import Counter
from math import prod
from typing import TYPE_CHECKING, Any

from polyak.cli.asking import add_record, open_record
from polyak.cli.command import Answer, UsageError
from polyak.cli.inspect_checkpoint import JSON as JSON_OF_CHECKPOINT
from polyak.cli.inspect_checkpoint import inspect_checkpoint, is_checkpoint
from polyak.cli.inspect_series import JSON as JSON_OF_SERIES
from polyak.cli.inspect_series import inspect_series
from polyak.cli.output import clocks, fields, size, table, terminal_width, written
from polyak.printable import printable
from polyak.time import TimeUnit

if TYPE_CHECKING:
    from polyak.record import Record, Segment

NAME = "inspect"

JSON = {
    "record": "the folder",
    "from, to": "the part of the run: updates, and each unit that the run counted; null without a segment",
    "max_duration": "the planned length of the run; null if it was not known",
    "segments": "how many segments there are",
    "in_parts": "how many of them have one file per rank",
    "per_level": "how many segments of a length are kept before two are merged; null: all",
    "levels": "a list with an object for each length of segments",
    "size_bytes": "the size of all segments",
    "tensors": "how many tensors there are of each kind, and their dtypes",
    "finest": "the finest half-life in updates and in batches (ba); null without a segment",
    "pins": "the checkpoints that keep files, by name",
    "pinned_only_files": "how many files are kept for them alone",
    "verified": "whether all files were compared with their hashes",
}

_EPILOG = (
    """\
examples:
  polyak inspect my-record
  polyak inspect my-record --verify
  polyak inspect my-record --json | jq .finest
  polyak inspect checkpoint-500
  polyak inspect folder-of-checkpoints

the object of --json for a checkpoint:
"""
    + "\n".join(f"  {key:<16}  {meaning}" for key, meaning in JSON_OF_CHECKPOINT.items())
    + """

the object of --json for a folder of checkpoints:
"""
    + "\n".join(f"  {key:<16}  {meaning}" for key, meaning in JSON_OF_SERIES.items())
)


def configure(parser: ArgumentParser) -> None:
    """Add the arguments.

    Args:
        parser: The parser of this command.
    """
    parser.epilog = _EPILOG
    add_record(parser)
    parser.add_argument("--verify", action="store_true", help="read all files and compare them with their hashes")


def run(arguments: Namespace) -> Answer:
    """Return the contents of a record or a checkpoint.

    Args:
        arguments: The parsed arguments.

    Raises:
        UsageError: If ``--verify`` is given for a checkpoint.
        CheckpointError: If a checkpoint cannot be read.
        RecordError: If there is no record, or with ``--verify`` a file has changed.
    """
    from polyak.checkpoints.series import holds_checkpoints
    from polyak.record.manifest import MANIFEST

    if not (arguments.record / MANIFEST).exists() and holds_checkpoints(arguments.record):
        return inspect_series(arguments)
    if is_checkpoint(arguments.record):
        if arguments.verify:
            raise UsageError(f"--verify must be for a record ({arguments.record} is none); leave it out")
        return inspect_checkpoint(arguments.record)
    record = open_record(arguments.record, arguments)
    if arguments.verify:
        record.verify()
    plain = _describe(record, verified=arguments.verify)
    return Answer(_text(plain), plain)


def _describe(record: "Record", *, verified: bool) -> dict[str, Any]:
    from polyak.record import load_manifest

    manifest = load_manifest(record.folder)
    segments = record.segments
    averaged = [info for info in record.tensors.values() if info.averaged]
    pinned = manifest.files - set(manifest.current_files)
    plain: dict[str, Any] = {
        "record": str(record.folder),
        "from": None,
        "to": None,
        "max_duration": None if record.max_duration is None else str(record.max_duration),
        "segments": len(segments),
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


def _level(level: int, segments: "tuple[Segment, ...]") -> dict[str, Any]:
    found = [one for one in segments if one.level == level]
    return {
        "level": level,
        "segments": len(found),
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


def _text(plain: dict[str, Any]) -> str:
    segments = _levels(plain) if plain["segments"] else "No segment has ended yet: there is nothing to average."
    heading = written(f"Record {plain['record']}")
    return f"{heading}\n\n{fields(_overview(plain), terminal_width())}\n\n{segments}"


def _overview(plain: dict[str, Any]) -> list[tuple[str, str]]:
    tensors, finest = plain["tensors"], plain["finest"]
    rows = [
        (_WORDS[unit], f"{_number(plain['from'][unit])} to {_number(end)}") for unit, end in (plain["to"] or {}).items()
    ]
    if plain["max_duration"]:
        rows.append(("planned run", plain["max_duration"]))
    tied = f", {tensors['tied']} further names of tied tensors" if tensors["tied"] else ""
    rows += [
        ("tensors", f"{tensors['averaged']} averaged, {tensors['last_value']} with their last value{tied}"),
        ("numbers averaged", f"{tensors['averaged_numbers']:,} as {', '.join(tensors['dtypes'])}"),
        ("size", f"{size(plain['size_bytes'])} in {_files(plain)}"),
    ]
    if finest:
        rows.append(("finest half-life", f"{finest['updates']:,} updates, {_number(finest['ba'])}ba"))
    pins = ", ".join(f"{name} ({pin['path'] or 'no path'})" for name, pin in plain["pins"].items())
    rows.append(("pinned by", pins or "no checkpoint"))
    if plain["pinned_only_files"]:
        rows.append(("", f"{plain['pinned_only_files']} further files, kept for these checkpoints only"))
    if plain["verified"]:
        rows.append(("verified", "all files match their hashes"))
    return [(name, printable(value)) for name, value in rows]


def _files(plain: dict[str, Any]) -> str:
    if not plain["in_parts"]:
        return f"{plain['segments']} files"
    of_them = "" if plain["in_parts"] == plain["segments"] else f" in {plain['in_parts']} of them"
    return f"{plain['segments']} segments, one file per rank{of_them}"


def _levels(plain: dict[str, Any]) -> str:
    merged = "never merged" if plain["per_level"] is None else f"at most {plain['per_level'] + 1} of each length"
    headings = ("level", "segments", "updates in each", "from update", "to update", "size")
    rows = [
        [
            str(one["level"]),
            *(f"{one[key]:,}" for key in ("segments", "updates_each", "from", "to")),
            size(one["size_bytes"]),
        ]
        for one in plain["levels"]
    ]
    heading = written(f"{plain['segments']} segments, {merged}")
    return f"{heading}\n{table(headings, rows, terminal_width())}"

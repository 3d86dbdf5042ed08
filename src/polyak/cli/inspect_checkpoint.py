"""What ``polyak inspect`` says of a checkpoint of any library."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyak.cli.checkpoints import allow_many_files
from polyak.cli.command import Answer
from polyak.cli.output import fields, size, table, terminal_width, written
from polyak.printable import printable
from polyak.time import Time

if TYPE_CHECKING:
    from polyak.checkpoints.summary import Summary

JSON = {
    "checkpoint": "the path",
    "format": "what it is",
    "files": "how many files have weights",
    "size_bytes": "the size of these files",
    "moment": "when it was saved: by unit, such as ba and ep, as far as it is known",
    "metrics": "measured when it was saved, by name, as far as they are known",
    "state_dicts": "a list of objects: key (null: the file itself), tensors, numbers, dtypes, size_bytes, unread",
    "made_from": "of an average that polyak wrote: a list of objects: path, weights, moment, weight, sha256",
}


def is_checkpoint(path: Path) -> bool:
    """Return whether a path is to be read as a checkpoint, and not as a record.

    Args:
        path: The path of a record or a checkpoint.
    """
    from polyak.record.manifest import MANIFEST

    return path.is_file() or (path.is_dir() and not (path / MANIFEST).exists())


def inspect_checkpoint(path: Path) -> Answer:
    """Return what is in a checkpoint. No tensor is read.

    Args:
        path: Where it is.

    Raises:
        CheckpointError: If it cannot be read safely, or has no state dict.
    """
    from polyak.checkpoints import provenance_of, summarize

    allow_many_files()
    plain = {**_plain(summarize(path)), "made_from": provenance_of(path)}
    return Answer(_text(plain), plain)


def _plain(found: "Summary") -> dict[str, Any]:
    return {
        "checkpoint": str(found.path),
        "format": found.format,
        "files": found.files,
        "size_bytes": found.size_bytes,
        "moment": {str(unit): value for unit, value in found.moment.items()},
        "metrics": dict(found.metrics),
        "state_dicts": [
            {
                "key": one.place or None,
                "tensors": len(one.tensors),
                "numbers": one.numel,
                "dtypes": one.dtypes,
                "size_bytes": one.size_bytes,
                "unread": dict(one.unread),
            }
            for one in found.state_dicts
        ],
    }


def _text(plain: dict[str, Any]) -> str:
    several = "" if plain["files"] == 1 else f" in {plain['files']} files"
    rows = [("format", plain["format"]), ("size", f"{size(plain['size_bytes'])}{several}")]
    if plain["moment"]:
        rows.append(("saved at", ", ".join(str(Time(value, unit)) for unit, value in plain["moment"].items())))
    if plain["metrics"]:
        rows.append(("metrics", ", ".join(f"{name} {value:g}" for name, value in plain["metrics"].items())))
    if made := plain["made_from"]:
        rows.append(("made from", ", ".join(f"{one.get('path')} ({one.get('weight')!s:.6})" for one in made)))
    states = plain["state_dicts"]
    for one in states:
        if one["unread"]:
            kinds = ", ".join(f"{name} ({kind})" for name, kind in one["unread"].items())
            rows.append(("cannot be read", kinds))
    if len(states) > 1:
        rows.append(("note", "there are several state dicts: --key says which one a command reads"))
    cells = [
        (
            printable(one["key"] or "the file itself"),
            f"{one['tensors']:,}",
            f"{one['numbers']:,}",
            ", ".join(one["dtypes"]),
            size(one["size_bytes"]),
        )
        for one in states
    ]
    width = terminal_width()
    heading = written(f"Checkpoint {plain['checkpoint']}")
    shown = fields([(name, printable(value)) for name, value in rows], width)
    return f"{heading}\n\n{shown}\n\n{table(('state dict', 'tensors', 'numbers', 'dtypes', 'size'), cells, width)}"

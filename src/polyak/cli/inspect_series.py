"""What ``polyak inspect`` says of the checkpoints of a run of another library."""

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from polyak.cli.asking import open_record
from polyak.cli.command import Answer
from polyak.cli.output import clocks, fields, size, table, terminal_width, written
from polyak.errors import ProfileError
from polyak.printable import printable
from polyak.profiles import HalfLife, named
from polyak.time import Time, TimeUnit

if TYPE_CHECKING:
    from polyak.record import Record
    from polyak.record.series import SeriesRecord

JSON = {
    "checkpoints": "the folder",
    "kind": "what they are",
    "averages": "a list of objects: name, updates, clock, profile (null: the weights of the moment)",
    "left_out": "what is in the folder and was not taken, with the reason",
    "errors": "the expected error of averages at the end, by half-life; null where it is above the limit",
    "size_bytes": "the size of all weights",
    "verified": "whether all files were read and compared with their checksums",
}

_MOST_ROWS = 24
_SHARES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)


def inspect_series(arguments: Namespace) -> Answer:
    """Return what is in the checkpoints of a run.

    Args:
        arguments: The parsed arguments of ``polyak inspect``.

    Raises:
        CheckpointError: If one cannot be read safely, or they are not of one run.
    """
    from polyak.record.series import SeriesRecord

    record = open_record(arguments.record, arguments)
    assert isinstance(record, SeriesRecord)
    if arguments.verify:
        record.verify()
    plain = _plain(record, verified=arguments.verify)
    return Answer(_text(plain), plain)


def _plain(record: "SeriesRecord", *, verified: bool) -> dict[str, Any]:
    from polyak.record.stored import all_stored

    segments = record.segments
    assert all_stored(segments)
    return {
        "checkpoints": str(record.folder),
        "kind": record.kind,
        "averages": [
            {
                "name": one.name,
                "updates": one.end.updates,
                "clock": {unit.value: value for unit, value in clocks(one.end.timestamp).items()},
                "profile": None if one.profile is None else named(one.profile).describe(),
            }
            for one in segments
        ],
        "left_out": list(record.left_out),
        "errors": _errors(record),
        "size_bytes": sum(one.size_bytes for one in segments),
        "verified": verified,
    }


def _errors(record: "Record") -> dict[str, float | None]:
    from polyak.record import fit

    first, last = (edge.clock(TimeUnit.BATCH) for edge in (record.segments[0].start, record.segments[-1].end))
    found = dict[str, float | None]()
    for share in _SHARES:
        half_life = Time(float(f"{(last - first) * share:.3g}"), TimeUnit.BATCH)
        try:
            fitted = fit(HalfLife(half_life, unbiased=True), record.segments, max_duration=record.max_duration)
            found[str(half_life)] = fitted.expected_error
        except ProfileError:
            found[str(half_life)] = None
    return found


def _text(plain: dict[str, Any]) -> str:
    from polyak.record.solving import MOST_ERROR

    width, averages = terminal_width(), plain["averages"]
    errors = [
        f"{half_life}: {'refused' if error is None else f'{error:.1%}'}" for half_life, error in plain["errors"].items()
    ]
    rows = [
        ("kind", plain["kind"]),
        ("size", f"{size(plain['size_bytes'])} in {len(averages)} averages"),
        ("expected error", ", ".join(errors)),
        ("", f"by half-life, of |last weights - average|; above {MOST_ERROR:.0%} an average is refused"),
    ]
    rows += [("left out", one) for one in plain["left_out"]]
    if plain["verified"]:
        rows.append(("verified", "all files were read, and match the checksums that they have"))
    shown = averages if len(averages) <= _MOST_ROWS else [*averages[:3], *averages[-3:]]
    cells = [
        (
            printable(one["name"]),
            ", ".join(str(Time(value, unit)) for unit, value in one["clock"].items()),
            "the weights of the moment" if one["profile"] is None else printable(one["profile"]),
        )
        for one in shown
    ]
    heading = written(f"Checkpoints of a run in {plain['checkpoints']}")
    text = fields([(name, printable(value)) for name, value in rows], width)
    note = "" if shown is averages else f"\n{written(f'The first and last 3 of {len(averages)}.')}"
    return f"{heading}\n\n{text}\n\n{table(('average', 'saved at', 'profile'), cells, width)}{note}"

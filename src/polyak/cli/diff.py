"""Show how far two checkpoints are from each other, tensor by tensor.

It reads what polyak average reads, in any two formats. A distance is |second - first| / |first|, in float64; the
largest come first. The command needs memory for a small piece of a tensor.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyak.cli.checkpoints import add_place, allow_many_files
from polyak.cli.command import Answer, whole
from polyak.cli.output import fields, table, terminal_width
from polyak.printable import printable

if TYPE_CHECKING:
    from polyak.checkpoints.distance import Distance

NAME = "diff"

JSON = {
    "first, second": "the paths",
    "relative": "the distance of all tensors together, |second - first| / |first|; null for NaN or nothing in common",
    "equal": "how many tensors are the same",
    "tensors": "a list of objects, the largest distance first: name, relative, largest, shapes, dtypes",
    "only_in_first": "names of tensors",
    "only_in_second": "names of tensors",
}

_EPILOG = """\
examples:
  polyak diff raw.safetensors averaged.safetensors
  polyak diff checkpoint-500 checkpoint-1000 --top 10
  polyak diff a.ckpt b.pt --key state_dict --second-key ema
"""
_TOP = 20


def configure(parser: ArgumentParser) -> None:
    """Add the arguments.

    Args:
        parser: The parser of this command.
    """
    parser.epilog = _EPILOG
    parser.add_argument("first", type=Path, metavar="A", help="a checkpoint")
    parser.add_argument("second", type=Path, metavar="B", help="another")
    parser.add_argument(
        "--top", type=whole(1), metavar="N", help=f"show the N largest distances (default: {_TOP}; with --json, all)"
    )
    add_place(parser)
    parser.add_argument("--second-key", metavar="KEY", help="the key in B, where it is another than in A")


def run(arguments: Namespace) -> Answer:
    """Compare two checkpoints.

    Args:
        arguments: The parsed arguments.

    Raises:
        CheckpointError: If one cannot be read.
    """
    from polyak.checkpoints import open_checkpoint
    from polyak.checkpoints.distance import distances, overall
    from polyak.checkpoints.plan import named_as

    allow_many_files()
    first = open_checkpoint(arguments.first, arguments.key, arguments.prefix)
    second = open_checkpoint(arguments.second, arguments.second_key or arguments.key, arguments.prefix)
    second = named_as(second, first)
    found = sorted(distances(first, second), key=_rank)
    plain: dict[str, Any] = {
        "first": str(first.path),
        "second": str(second.path),
        "relative": overall(found),
        "equal": sum(one.largest == 0 for one in found),
        "tensors": [_plain(one) for one in found[: arguments.top]],
        "only_in_first": [name for name in first.tensors if name not in second.tensors],
        "only_in_second": [name for name in second.tensors if name not in first.tensors],
    }
    return Answer(_text(plain, found[: arguments.top or _TOP], len(found)), plain)


def _rank(one: "Distance") -> tuple[int, float, float]:
    """Sort what cannot be compared first, then the largest distances."""
    return (0, 0.0, 0.0) if isnan(one.relative) else (1, -one.relative, -one.largest)


def _plain(one: "Distance") -> dict[str, Any]:
    return {
        "name": one.name,
        "relative": one.relative,
        "largest": one.largest,
        "shapes": [list(shape) for shape in one.shapes],
        "dtypes": [str(dtype).removeprefix("torch.") for dtype in one.dtypes],
    }


def _row(one: "Distance") -> tuple[str, str, str, str]:
    shapes, dtypes = one.shapes, [str(dtype).removeprefix("torch.") for dtype in one.dtypes]
    kind = " to ".join(dict.fromkeys(f"{dtype} {list(shape)}" for dtype, shape in zip(dtypes, shapes, strict=True)))
    if shapes[0] != shapes[1]:
        return printable(one.name), "-", "-", kind
    return printable(one.name), f"{one.relative:.3g}", f"{one.largest:.3g}", kind


def _text(plain: dict[str, Any], shown: "Sequence[Distance]", total: int) -> str:
    from polyak.compat.words import listed

    relative = plain["relative"]
    above = f"; the {len(shown)} largest distances are above" if len(shown) < total else ""
    rows = [
        ("overall", f"{relative:.3g}" if not isnan(relative) else "NaN" if total else "no tensor has one name in both"),
        ("tensors", f"{total} compared, {plain['equal']} of them the same{above}"),
    ]
    for name in ("first", "second"):
        if only := plain[f"only_in_{name}"]:
            rows.append((f"only in {'A' if name == 'first' else 'B'}", f"{len(only)}: {listed(only)}"))
    width = terminal_width()
    if not shown:
        return fields(rows[:1] + rows[2:], width)
    found = table(("tensor", "relative", "largest", "dtype and shape"), [_row(one) for one in shown], width)
    return f"{found}\n\n{fields(rows, width)}"

"""Average checkpoints that are on disk, without a record.

A checkpoint is a file of torch (.pt, .pth, .ckpt, .bin) or safetensors, or a folder: of Transformers, diffusers, peft
or Accelerate, or of torch.distributed.checkpoint (.distcp; FSDP, torchtitan, Composer, Lightning). The command finds
the weights in it; if there are several, --key says which. It runs no code from a file, and needs memory for about one
tensor, whatever the number and size of the checkpoints.
"""

import glob
import os
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from polyak.cli.asking import profile_of
from polyak.cli.command import Answer, UsageError, whole
from polyak.cli.output import fields, size, table, terminal_width
from polyak.printable import printable
from polyak.profiles import options
from polyak.time import Time

if TYPE_CHECKING:
    from polyak.checkpoints import Plan

NAME = "average"

JSON = {
    "checkpoints": "a list of objects with path, format, key (where the weights are), moment and weight, oldest first",
    "tensors": "how many tensors the average has",
    "size_bytes": "their size",
    "notes": "what there is to know about it, a list of sentences",
    "output": "the file or folder that was written, or with --dry-run would be",
    "written": "whether it was written",
}

_EPILOG = """\
examples:
  polyak average checkpoint-*.pt -o averaged.safetensors
  polyak average 'out/checkpoint-*' --last 5 -o averaged          (Transformers: a folder for from_pretrained)
  polyak average run/step-* --half-life 2000ba -o averaged.pt
  polyak average a.ckpt b.ckpt --weights 1,2 --key state_dict -o averaged.safetensors --dry-run
"""


def configure(parser: ArgumentParser) -> None:
    """Add the arguments.

    Args:
        parser: The parser of this command.
    """
    parser.epilog = _EPILOG
    parser.add_argument("checkpoints", nargs="+", metavar="CKPT", help="a checkpoint, or a pattern such as 'run/*.pt'")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="OUT",
        help="a .safetensors or .pt file; without a suffix a folder as the newest checkpoint is",
    )
    parser.add_argument("--last", type=whole(1), metavar="N", help="take the last N checkpoints only")
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--weights", type=_numbers, metavar="W,W,...", help="the weight of each checkpoint, in the order given"
    )
    for form in options():
        group.add_argument(
            f"--{form.name}", dest="profile", type=profile_of(form.name), metavar=form.metavar, help=form.help
        )
    parser.add_argument(
        "--times", type=_times, metavar="T,T,...", help="when each was saved, such as 100ba,200ba (default: found)"
    )
    parser.add_argument("--key", metavar="KEY", help="where the weights are in a file, such as model or ema")
    parser.add_argument("--prefix", metavar="PREFIX", help="take the tensors whose names begin so, such as teacher.")
    parser.add_argument("--common", action="store_true", help="average the tensors that all checkpoints have")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, and write nothing")
    parser.add_argument("--force", action="store_true", help="replace an existing output file")


def _numbers(text: str) -> list[float]:
    try:
        return [float(one) for one in text.split(",")]
    except ValueError:
        raise ArgumentTypeError(f"it must be numbers, such as 1,1,2 (got {text!r})") from None


def _times(text: str) -> list[Time]:
    try:
        return [Time.from_timestring(one) for one in text.split(",")]
    except ValueError:
        raise ArgumentTypeError(f"it must be times, such as 100ba,200ba (got {text!r})") from None


def run(arguments: Namespace) -> Answer:
    """Average the checkpoints, and return what was done.

    Args:
        arguments: The parsed arguments.

    Raises:
        UsageError: If the arguments exclude each other, or do not fit the checkpoints.
        PolyakError: If a checkpoint cannot be read, or they are not of one model.
    """
    from polyak.checkpoints import choose, open_checkpoint
    from polyak.checkpoints.output import check_output, write_average

    output: Path = arguments.output
    if output.exists() and not _is_empty_folder(output) and not (arguments.force and output.is_file()):
        said = "a folder that has files; choose another" if output.is_dir() else "there; choose another, or add --force"
        raise UsageError(f"-o must be new (got {output}, which is {said})")
    _allow_many_files()
    paths = _expanded(arguments.checkpoints)
    opened = [open_checkpoint(path, arguments.key, arguments.prefix) for path in paths]
    made = choose(
        opened,
        weights=arguments.weights,
        profile=arguments.profile,
        last=arguments.last,
        times=arguments.times,
        common=arguments.common,
    )
    check_output(output, made)
    if not arguments.dry_run:
        write_average(made, output, _Progress(len(made.names)))
    return _answer(made, output, written=not arguments.dry_run)


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _allow_many_files() -> None:
    """Let the process open as many files as the system allows: each checkpoint may be many."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _expanded(given: Sequence[str]) -> list[Path]:
    """Return the paths that were given, those of a pattern in natural order."""
    from polyak.checkpoints.moments import in_natural_order
    from polyak.compat.words import listed

    found = list[Path]()
    for one in given:
        matching = [one] if Path(one).exists() or not glob.has_magic(one) else glob.glob(one)  # noqa: PTH207  may be absolute
        if not matching:
            raise UsageError(f"a pattern must match checkpoints ({one} matches none); check the path")
        found += sorted(map(Path, matching), key=in_natural_order)
    real = [os.path.realpath(path) for path in found]
    if twice := [path for i, path in enumerate(found) if real[i] in real[:i]]:
        raise UsageError(f"each checkpoint must be given once (twice: {listed(twice)}); leave one out")
    return found


def _answer(made: "Plan", output: Path, *, written: bool) -> Answer:
    rows, plain = [], []
    for one, weight in zip(made.checkpoints, made.weights, strict=True):
        moment = next((str(Time(value, unit)) for unit, value in one.moment.items()), None)
        rows.append((printable(str(one.path)), moment or "-", f"{weight:.4f}", one.place or f"all of the {one.format}"))
        entry = {"path": str(one.path), "format": one.format, "key": one.place or None}
        plain.append({**entry, "moment": moment, "weight": weight})
    notes, size_bytes = list(_notes(made)), sum(one.size_bytes for one in made.tensors.values())
    said = f"{output}, {size(size_bytes)} of {len(made.names)} tensors"
    lines = [("written", said)] if written else [("dry run", f"nothing is written; the output would be {said}")]
    width = terminal_width()
    shown = table(("checkpoint", "saved at", "weight", "weights in it"), rows, width)
    text = f"{shown}\n{fields([*(('note', note) for note in notes), *lines], width)}"
    return Answer(
        text,
        {
            "checkpoints": plain,
            "tensors": len(made.names),
            "size_bytes": size_bytes,
            "notes": notes,
            "output": str(output),
            "written": written,
        },
    )


def _notes(made: "Plan") -> Iterator[str]:
    from polyak.checkpoints.output import files_of_folder
    from polyak.compat.words import listed

    if made.left_out:
        yield f"left out, since not all checkpoints have them: {listed(made.left_out)}"
    integers = [
        name for name, one in made.tensors.items() if not one.dtype.is_floating_point and not one.dtype.is_complex
    ]
    if integers:
        yield f"of the newest checkpoint, since they are no numbers to average: {listed(integers)}"
    if layers := [name.removesuffix(".running_var") for name in made.names if name.endswith(".running_var")]:
        yield (
            f"{len(layers)} layers have running statistics ({listed(layers)}): their average is not that of the "
            "averaged weights; recompute it with polyak.update_bn"
        )
    if made.newest.layout and (others := files_of_folder(made.newest.path)):
        yield f"for a folder as the output, of the newest: {listed(one.name for one in others)}"


class _Progress:
    """Counts tensors on a terminal."""

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0

    def __call__(self, name: str) -> None:
        del name
        self._done += 1
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{self._done} of {self._total} tensors" + ("\n" if self._done == self._total else ""))

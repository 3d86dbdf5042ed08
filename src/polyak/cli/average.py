"""Average checkpoints that are on disk, without a record.

A checkpoint is a file of torch (.pt, .pth, .ckpt, .bin), safetensors or NeMo, or a folder: of Transformers, diffusers,
peft or Accelerate, or of torch.distributed.checkpoint (.distcp; FSDP, torchtitan, Composer, Lightning). The command
finds the weights in it; if there are several, --key says which. It runs no code from a file, and needs memory for
about one tensor, whatever the number and size of the checkpoints.
"""

import re
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyak.cli.asking import add_profiles
from polyak.cli.batchnorm import recomputed_statistics
from polyak.cli.checkpoints import (
    add_checkpoints,
    add_direction,
    add_place,
    maximize_of,
    open_all,
    require_new,
    writing,
)
from polyak.cli.command import Answer, UsageError, whole
from polyak.cli.output import fields, size, table, terminal_width
from polyak.printable import printable
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

# In the name of a file; of one of one it has all.
_SHARD = re.compile(r"-\d+-of-(?!0*1\.)\d+\.")

_EPILOG = """\
examples:
  polyak average checkpoint-*.pt -o averaged.safetensors
  polyak average 'out/checkpoint-*' --last 5 -o averaged          (Transformers: a folder for from_pretrained)
  polyak average 'run/*.ckpt' --best 5 --metric val_loss -o averaged.safetensors
  polyak average run/step-* --half-life 2000ba -o averaged.pt
  polyak average a.ckpt b.ckpt --weights 1,2 --key state_dict -o averaged.safetensors --dry-run
"""


def configure(parser: ArgumentParser) -> None:
    """Add the arguments.

    Args:
        parser: The parser of this command.
    """
    parser.epilog = _EPILOG
    add_checkpoints(parser)
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="OUT",
        help="a .safetensors or .pt file; without a suffix a folder as the newest checkpoint is",
    )
    parser.add_argument(
        "--as",
        dest="form",
        choices=("hf", "safetensors", "pt", "dcp"),
        help="the format of OUT: a folder for from_pretrained, a file, or a folder of .distcp files",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--last", type=whole(1), metavar="N", help="take the last N checkpoints only")
    which.add_argument("--best", type=whole(1), metavar="N", help="take the N checkpoints with the best --metric only")
    parser.add_argument(
        "--metric", metavar="NAME", help="a metric in the checkpoints, their names or --log, such as val_loss"
    )
    add_direction(parser)
    parser.add_argument(
        "--log", type=Path, metavar="FILE", help="a JSON object on each line: step or epoch, and metrics"
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--weights", type=_numbers, metavar="W,W,...", help="the weight of each checkpoint, in the order given"
    )
    add_profiles(group)
    parser.add_argument(
        "--times", type=_times, metavar="T,T,...", help="when each was saved, such as 100ba,200ba (default: found)"
    )
    add_place(parser)
    parser.add_argument("--common", action="store_true", help="average the tensors that all checkpoints have")
    parser.add_argument("--mixed", action="store_true", help="checkpoints of one folder may be of several runs")
    parser.add_argument(
        "--update-bn",
        "--bn",
        metavar="FILE:LOADER",
        help="FILE.py:FUNCTION that returns a model and batches of training data, to recompute the statistics of "
        "BatchNorm layers; the model is in memory then",
    )
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


def run(arguments: Namespace) -> Answer | None:
    """Average the checkpoints; return what was done, or None on other ranks than rank 0.

    Args:
        arguments: The parsed arguments.

    Raises:
        UsageError: If the arguments exclude each other, or do not fit the checkpoints.
        PolyakError: If a checkpoint cannot be read, or they are not of one model.
    """
    from polyak.checkpoints import choose
    from polyak.checkpoints.output import check_output, write_average
    from polyak.checkpoints.processes import all_processes

    output: Path = arguments.output
    require_new(output, force=arguments.force)
    if arguments.metric is None and (arguments.log or arguments.minimize or arguments.maximize):
        raise UsageError("--log, --minimize and --maximize must come with --metric (got none); add it")
    made = choose(
        open_all(arguments),
        weights=arguments.weights,
        profile=arguments.profile,
        last=arguments.last,
        best=arguments.best,
        metric=arguments.metric,
        maximize=arguments.metric is not None and maximize_of(arguments, arguments.metric),
        log=arguments.log,
        times=arguments.times,
        common=arguments.common,
        mixed=arguments.mixed,
    )
    form = check_output(output, made, arguments.form)
    with all_processes() as communicator:
        if not arguments.dry_run:
            given = None if arguments.update_bn is None else recomputed_statistics(made, arguments.update_bn)
            progress = _Progress(len(made.names))
            with writing(output):
                write_average(made, output, progress, given=given, form=form, communicator=communicator)
        if communicator.rank:
            return None
    wanted = arguments.last or arguments.best
    notes = list(_notes(made, output, wanted=wanted, recomputed=arguments.update_bn is not None))
    return _answer(made, output, notes, written=not arguments.dry_run)


def _answer(made: "Plan", output: Path, notes: list[str], *, written: bool) -> Answer:
    rows, plain = list[tuple[str, ...]](), list[dict[str, Any]]()
    for one, weight in zip(made.checkpoints, made.weights, strict=True):
        moment = next((str(Time(value, unit)) for unit, value in one.moment.items()), None)
        rows.append((printable(str(one.path)), moment or "-", f"{weight:.4f}", one.place or f"all of the {one.format}"))
        entry = {"path": str(one.path), "format": one.format, "key": one.place or None}
        plain.append({**entry, "moment": moment, "weight": weight})
    size_bytes = sum(one.size_bytes for one in made.tensors.values())
    said = printable(f"{output}, {size(size_bytes)} of {len(made.names)} tensors")
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


def _notes(made: "Plan", output: Path, *, wanted: int | None, recomputed: bool) -> Iterator[str]:
    from polyak.checkpoints.companions import companions
    from polyak.compat.words import listed

    if wanted and wanted > len(made.checkpoints):
        yield f"{wanted} checkpoints were asked for, and there are {len(made.checkpoints)}: all are averaged"
    if made.left_out:
        yield f"left out, since not all checkpoints have them: {listed(made.left_out)}"
    integers = [
        name for name, one in made.tensors.items() if not one.dtype.is_floating_point and not one.dtype.is_complex
    ]
    if integers:
        yield f"of the newest checkpoint, since they are no numbers to average: {listed(integers)}"
    if spelled := [one for name in made.names if (one := f"ema_{name.replace('.', '_')}") in made.names]:
        yield (
            f"averages of mmcv's EMAHook are next to the weights ({listed(spelled)}), and averaged as they are; to "
            "take them alone, give each checkpoint to polyak convert first"
        )
    if shards := [one.path.name for one in made.checkpoints if _SHARD.search(one.path.name)]:
        yield f"each of these files has a part of a model alone ({listed(shards)}): give the folders, to average all"
    if left := [*made.newest.left, *(made.newest.extra if output.suffix in ("", ".safetensors") else ())]:
        yield f"left out, since they are no tensors: {listed(left)}"
    if not recomputed and (
        layers := [name.removesuffix(".running_var") for name in made.names if name.endswith(".running_var")]
    ):
        yield (
            f"{len(layers)} layers have running statistics ({listed(layers)}): their average is not that of the "
            "averaged weights; recompute it with --update-bn, or polyak.update_bn"
        )
    if made.newest.layout and (others := companions(made.newest.path)):
        yield f"for a folder as the output, of the newest: {listed(one.name for one in others)}"


class _Progress:
    """Counts tensors on a terminal."""

    def __init__(self, total: int) -> None:
        self._total, self._done = total, set[str]()

    def __call__(self, name: str) -> None:
        if name in self._done:  # one of its shards
            return
        self._done.add(name)
        done = len(self._done)
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{done} of {self._total} tensors" + ("\n" if done == self._total else ""))

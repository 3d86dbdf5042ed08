"""``polyak soup --sweep``: evaluates means of the newest checkpoints, by number and distance, and writes the best."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyak.cli.checkpoints import open_all, writing
from polyak.cli.command import Answer, UsageError
from polyak.cli.functions import load_function
from polyak.cli.output import fields, size, table, terminal_width
from polyak.cli.progress import Progress
from polyak.printable import printable

if TYPE_CHECKING:
    from polyak.sweeping import CheckpointSweep

JSON = {
    "metric": "the metric that decides",
    "direction": "minimize or maximize",
    "best": "one of the means",
    "means": "a list of objects, in order: name, count, every (the distance), paths, metrics, seconds",
    "results": "the file that keeps the results",
    "output": "the file or folder that was written",
}
_OPTIONS = ("counts", "spacings", "results", "fresh", "mixed")


def add_sweep(parser: ArgumentParser) -> None:
    """Add the arguments of a sweep.

    Args:
        parser: The parser of the command.
    """
    group = parser.add_argument_group("instead of a greedy soup")
    group.add_argument("--sweep", action="store_true", help="evaluate means of the newest, by number and distance")
    group.add_argument(
        "--counts", type=_numbers, metavar="N,N,...", help="how many checkpoints (default: 1,2,3,5,10,20,30,50 and all)"
    )
    group.add_argument(
        "--spacings", type=_numbers, metavar="K,K,...", help="take every K-th, back from the newest (default: 1,2,4)"
    )
    group.add_argument(
        "--results", type=Path, metavar="FILE", help="keeps the results, which are reused (default: OUT.sweep.jsonl)"
    )
    group.add_argument("--fresh", action="store_true", help="evaluate again what has a result")
    group.add_argument("--mixed", action="store_true", help="checkpoints of one folder may be of several runs")


def _numbers(text: str) -> list[int]:
    try:
        found = [int(one) for one in text.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise ArgumentTypeError(f"it must be whole numbers of at least 1, such as 1,2,5 (got {text!r})")
    return found


def require_no_sweep(arguments: Namespace) -> None:
    """See that no argument of a sweep is given without a sweep.

    Args:
        arguments: The parsed arguments.

    Raises:
        UsageError: If one is.
    """
    if given := [name for name in _OPTIONS if getattr(arguments, name)]:
        raise UsageError(f"--{given[0]} must come with --sweep (got none); add it, or leave --{given[0]} out")


def run_sweep(arguments: Namespace) -> Answer:
    """Evaluate or resume, and write the best mean; return the results.

    Args:
        arguments: The parsed arguments of ``polyak soup``.

    Raises:
        PolyakError: If a checkpoint cannot be read, they are not of one run, or an evaluation fails.
    """
    from polyak.checkpoints.averaging import plan
    from polyak.checkpoints.output import check_output, write_average
    from polyak.sweeping import sweep_checkpoints

    output: Path = arguments.output
    results = arguments.results or output.with_name(f"{output.name}.sweep.jsonl")
    opened = open_all(arguments)
    check_output(output, plan(opened, [1.0] * len(opened), common=arguments.common))
    with Progress("polyak soup") as progress:
        found = sweep_checkpoints(
            opened,
            load_function(arguments.evaluate, "--evaluate"),
            counts=arguments.counts,
            spacings=arguments.spacings or (1, 2, 4),
            metric=arguments.metric,
            maximize=arguments.maximize or None,
            minimize=arguments.minimize or None,
            common=arguments.common,
            mixed=arguments.mixed,
            results=results,
            fresh=arguments.fresh,
            progress=progress.show,
        )
    check_output(output, found.best.plan)
    with writing(output):
        write_average(found.best.plan, output)
    plain = _plain(found, results, output)
    return Answer(_text(found, plain), plain)


def _plain(found: "CheckpointSweep", results: Path, output: Path) -> dict[str, Any]:
    means = {
        one.which: {
            "name": one.which.describe(),
            "count": one.which.count,
            "every": one.which.every,
            "paths": [str(checkpoint.path) for checkpoint in one.plan.checkpoints],
            "metrics": dict(one.result.metrics),
            "seconds": round(one.result.seconds, 3),
        }
        for one in found.tried
    }
    return {
        "metric": found.metric,
        "direction": "maximize" if found.maximize else "minimize",
        "best": means[found.best.which],
        "means": [*means.values()],
        "results": str(results),
        "output": str(output),
    }


def _text(found: "CheckpointSweep", plain: dict[str, Any]) -> str:
    width, best = terminal_width(), found.best
    shown = table(("checkpoints", "since", found.metric), [[*map(printable, row)] for row in found.rows()], width)
    size_bytes = sum(one.size_bytes for one in best.plan.tensors.values())
    said = [
        ("best", f"{best.which.describe()}: {found.metric} {found.value(best):.6g}"),
        ("written", printable(f"{plain['output']}, {size(size_bytes)} of {len(best.plan.names)} tensors")),
        ("results", printable(f"{plain['results']}; the same command reuses them")),
    ]
    return f"{shown}\n{fields(said, width)}"

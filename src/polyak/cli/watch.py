"""Evaluate the averages of a run while it trains: what it would score with them, or if it were annealed now.

Run it in another terminal while the run records. At each interval the newest mean of the record, which is nearly raw,
is evaluated, half-lives of a sixteenth and other shares of the run so far, and virtual cooldowns of 10 and 20 %. The
record is read as it is, and nothing of the run is changed. It ends with the run, with Ctrl-C, or if the record is
deleted. The raw weights are evaluated when the run has ended. With --json, each moment is one object on a line.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

from polyak.cli.asking import add_record
from polyak.cli.command import Answer, span, whole
from polyak.cli.evaluating import add_evaluation
from polyak.time import TimeUnit

NAME = "watch"

JSON = {
    "record": "the folder of the record",
    "updates": "how many updates it had",
    "clock": "the clock of the run, by counter",
    "metric": "the metric that decides",
    "direction": "minimize or maximize",
    "best": "the name of the best half-life",
    "readings": "a list of objects: kind, share, name, metrics, error",
    "seconds": "how long the evaluations took",
}

_UNITS = {
    TimeUnit.BATCH: "500ba",
    TimeUnit.EPOCH: "1ep",
    TimeUnit.SAMPLE: "1e6sp",
    TimeUnit.TOKEN: "1e9tok",
    TimeUnit.SECOND: "600sec",
    TimeUnit.DURATION: "0.05dur",
}

_EPILOG = """\
files in DIR:
  watch.jsonl  one line per moment; a stopped command continues it
  watch.html   curves over training, for a browser; needs plotly

examples:
  polyak watch my-record --evaluate evaluate.py:validate
  polyak watch my-record --evaluate evaluate.py:validate --every 1000ba --json
"""


def configure(parser: ArgumentParser) -> None:
    """Add the arguments.

    Args:
        parser: The parser of this command.
    """
    parser.epilog = _EPILOG
    add_record(parser)
    add_evaluation(parser, required=True)
    parser.add_argument(
        "--every",
        type=span(_UNITS),
        metavar="TIME",
        help="the time of training between two moments (default: 0.05dur, a twentieth of the run)",
    )
    parser.add_argument(
        "--patience",
        type=whole(1),
        default=3600,
        metavar="SECONDS",
        help="end if the record does not grow for so long (default: 3600)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("polyak-watch"), metavar="DIR", help="the output folder (default: %(default)s)"
    )
    parser.add_argument("--force", action="store_true", help="replace the moments of another record")


def run(arguments: Namespace) -> Iterator[Answer]:
    """Evaluate at each interval until the run ends; return an iterator over what is printed.

    Args:
        arguments: The parsed arguments.

    Raises:
        UsageError: If the function cannot be imported, or the output folder has the moments of another record.
        PolyakError: If the record cannot be read, or an evaluation fails.
    """
    from polyak.cli.watch_run import run_watch

    return run_watch(arguments)

"""Recommend an average of a record: a half-life of a sixteenth of the run, unless an evaluation shows a better one.

Without --evaluate nothing is evaluated. With it, averages are evaluated as by polyak sweep, and the best is recommended
only if it is better by more than the noise of the evaluation, which is known if the function returns the losses of
single examples, or the metric on eight or more parts of the validation data.

Several processes evaluate between them, each on its own GPU: torchrun --nproc-per-node 8 -m polyak recommend ...
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from polyak.cli.asking import add_record
from polyak.cli.command import Answer
from polyak.cli.evaluating import add_evaluation, add_ranks

NAME = "recommend"

JSON = {
    "record": "the folder of the record",
    "profile": "the recommended profile, as options of polyak reconstruct",
    "half_life": "its half-life; null for another profile",
    "reason": "why, in words",
    "error_estimate": "the estimated error, relative to |last weights - average|",
    "comparison": "the best average against the default, with gain and interval; null without an evaluation",
    "output": "the file that was written; null without -o",
}

_EPILOG = """\
examples:
  polyak recommend my-record
  polyak recommend my-record -o averaged.safetensors
  polyak recommend my-record --evaluate evaluate.py:losses
"""


def configure(parser: ArgumentParser) -> None:
    """Add the arguments.

    Args:
        parser: The parser of this command.
    """
    parser.epilog = _EPILOG
    add_record(parser)
    add_evaluation(parser, required=False)
    parser.add_argument(
        "--update-bn",
        metavar="FUNCTION",
        help="a function, given as for --evaluate, that returns a model and batches of training data; the statistics "
        "of BatchNorm layers are recomputed for each average, and for OUT",
    )
    parser.add_argument("-o", "--output", type=Path, metavar="OUT", help="a safetensors file for the average")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    add_ranks(parser)


def run(arguments: Namespace) -> Answer | None:
    """Recommend an average, and write it if asked; return the recommendation, or None on other ranks than rank 0.

    Args:
        arguments: The parsed arguments.

    Raises:
        UsageError: If a function cannot be imported, or the output cannot be written.
        PolyakError: If the record does not give an average, or an evaluation fails.
    """
    from polyak.cli.recommend_run import run_recommend

    return run_recommend(arguments)

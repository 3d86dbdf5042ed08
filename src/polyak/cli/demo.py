"""Train on handwritten digits with EMA, and show what averaging does.

A small network learns scikit-learn's digits while 30 % of its training labels
are wrong. Its weights keep fluctuating; their exponential moving average does
not. Both are evaluated on clean test digits during training. It takes a few
seconds on a CPU. Stop it at any time: the same command resumes it, with the
same result. Under torchrun several processes train together, and each of them
takes a part of the batch.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from polyak.cli.command import Answer, require, span, whole
from polyak.time import TimeUnit

NAME = "demo"

JSON = {
    "raw": "accuracy and loss of the raw weights on test digits",
    "averaged": "the same of the averaged weights",
    "chosen": "half_life, accuracy and loss of the half-life that is best on validation digits; null if there is none",
    "steps": "how many steps were trained",
    "files": "the files that were written",
}

_UNITS = {TimeUnit.BATCH: "100ba", TimeUnit.EPOCH: "1.5ep", TimeUnit.SAMPLE: "1600sp", TimeUnit.DURATION: "0.1dur"}

_EPILOG = """\
files in DIR:
  averaged.safetensors  the averaged weights, as a plain state dict, for load_state_dict
  raw.safetensors       the last weights, in the same form
  checkpoints/          the newest two, one every 100 steps, to resume from
  metrics.jsonl         the training loss; accuracy and loss of raw (eval_raw/...) and averaged (eval/...) weights
  demo.png, demo.svg    both curves, and the share of each step in the average
  record/               the run, for polyak inspect, reconstruct and sweep
  sweep/                report.html: every half-life on validation digits, computed from the record; best.safetensors
  demo.json             the arguments of DIR; only --steps may grow

examples; --steps resumes and trains longer, which a constant learning rate allows:
  polyak demo
  polyak demo --steps 3000
  polyak demo --half-life 10ba --out short
  polyak demo --half-life 1000ba --out long
  polyak demo --seed 1 --out another

on two processes:
  torchrun --nproc-per-node 2 -m polyak demo --out two
"""


def configure(parser: ArgumentParser) -> None:
    """Add the arguments.

    Args:
        parser: The parser of this command.
    """
    parser.epilog = _EPILOG
    parser.add_argument(
        "--seed", type=whole(0, 2**32 - 1), default=0, help="the seed of all random numbers (default: 0)"
    )
    parser.add_argument(
        "--half-life",
        type=span(_UNITS),
        default="100ba",
        metavar="TIME",
        help="the time after which half of the average is new: steps as 100ba, epochs as 1.5ep, samples as 1600sp, a "
        "fraction of the run as 0.1dur (default: 100ba)",
    )
    parser.add_argument("--steps", type=whole(1), default=1000, help="the number of training steps (default: 1000)")
    parser.add_argument(
        "--out", type=Path, default=Path("polyak-demo"), metavar="DIR", help="the output folder (default: polyak-demo)"
    )


def run(arguments: Namespace) -> Answer | None:
    """Train or resume unless the run is complete; return its results.

    Args:
        arguments: The parsed arguments.

    Raises:
        UsageError: If an extra is missing, or the folder belongs to another run.
    """
    require("cli", {"sklearn": "scikit-learn", "rich": "rich", "matplotlib": "matplotlib", "plotly": "plotly"})
    from polyak.cli.demo_run import run_demo

    return run_demo(arguments)

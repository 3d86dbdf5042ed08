"""Train on handwritten digits with EMA, and show what averaging does.

A small network learns scikit-learn's digits while 30 % of its training labels
are wrong. Its weights keep fluctuating; their exponential moving average does
not. Both are evaluated on clean test digits during training. It takes a few
seconds on a CPU. Stop it at any time: the same command resumes it, with the
same result. Under torchrun several processes train together, and each of them
takes a part of the batch.
"""

import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from polyak.cli.command import REFUSED, require, span, whole
from polyak.cli.experiment import Chosen, choose, final_curves, train
from polyak.cli.folder import RunFolder
from polyak.cli.recipe import NUM_VALIDATION, RECORD_INTERVAL, Digits
from polyak.errors import PlanWarning, QuarantineWarning, ShardingError
from polyak.report.series import Curve
from polyak.time import TimeUnit
from polyak.trainer.parallel import join

if TYPE_CHECKING:
    from rich.console import Console

NAME = "demo"

_UNITS = {TimeUnit.BATCH: "100ba", TimeUnit.EPOCH: "1.5ep", TimeUnit.SAMPLE: "1600sp", TimeUnit.DURATION: "0.1dur"}

_EPILOG = """\
files in DIR:
  averaged.safetensors  the averaged weights, as a plain state dict:
                        model.load_state_dict(safetensors.torch.load_file(path))
  raw.safetensors       the last weights, in the same form
  checkpoints/          the newest two, one every 100 steps, to resume from
  metrics.jsonl         the training loss; accuracy and cross-entropy (loss) of
                        raw (eval_raw/...) and averaged weights (eval/...)
  demo.png, demo.svg    both curves, and the share of each step in the average
  record/               the run, for polyak inspect, reconstruct and sweep
  sweep/                report.html: every half-life on validation digits,
                        computed from the record; best.safetensors
  demo.json             the arguments of DIR; only --steps may grow

examples:
  polyak demo
  polyak demo --steps 3000                   resume and train longer, which a
                                             constant learning rate allows
  polyak demo --half-life 10ba --out short   forget half within ten steps
  polyak demo --half-life 1000ba --out long  still remember the first weights
  polyak demo --seed 1 --out another         other digits, labels and weights
  torchrun --nproc-per-node 2 -m polyak demo --out two     on two processes
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


def run(arguments: Namespace) -> int:
    """Train or resume unless the run is complete, then print its results.

    Args:
        arguments: The parsed arguments.

    Raises:
        UsageError: If an extra is missing, or the folder belongs to another run.
    """
    require("cli", {"sklearn": "scikit-learn", "rich": "rich", "matplotlib": "matplotlib", "plotly": "plotly"})
    from rich.console import Console  # noqa: PLC0415  an extra

    parallelism: Literal["ddp"] | None = "ddp" if torch.distributed.is_torchelastic_launched() else None
    group = join(parallelism, "cpu")
    console = Console(highlight=False, quiet=group.rank > 0)
    if group.rank > 0:  # rank 0 prints all warnings
        for category in (PlanWarning, QuarantineWarning):
            warnings.simplefilter("ignore", category)
    digits = Digits(arguments.seed, arguments.steps, arguments.half_life)
    folder = RunFolder(arguments.out)
    with ExitStack() as held:
        try:
            group.ranks.on_rank_0(lambda: _begin(digits, folder, held), "begin")
        except ShardingError:
            return REFUSED
        console.print(
            f"Digits, {digits.flipped:.0%} of the training labels wrong. A small network, SGD at a constant learning "
            f"rate, EMA with half-life {digits.half_life}, seed {digits.seed}."
        )
        if group.ranks.from_rank_0(folder.complete):
            console.print(f"All {digits.steps} steps are done; nothing was trained.")
        else:
            train(digits, folder, console, group, parallelism)
        if group.rank == 0:
            _show(final_curves(digits, folder), choose(digits, folder, console), folder, console)
    return 0


def _begin(digits: Digits, folder: RunFolder, held: ExitStack) -> None:
    held.enter_context(folder.locked())
    folder.begin(
        {"--seed": digits.seed, "--half-life": str(digits.half_life), "--steps": digits.steps},
        f"flipped={digits.flipped} lr={digits.lr} batch_size={digits.batch_size} "
        f"validation={NUM_VALIDATION} record={RECORD_INTERVAL}",
        may_grow=None if digits.half_life.unit is TimeUnit.DURATION else "--steps",
    )


def _show(curves: Mapping[str, Curve], chosen: Chosen | None, folder: RunFolder, console: "Console") -> None:
    from rich.table import Table  # noqa: PLC0415  an extra

    raw = (curves["eval_raw/accuracy"].last, curves["eval_raw/loss"].last)
    averaged = (curves["eval/accuracy"].last, curves["eval/loss"].last)
    accuracy, loss = (after - before for before, after in zip(raw, averaged, strict=True))
    table = Table("weights", title_justify="left")
    table.add_column("test accuracy", justify="right")
    table.add_column("cross-entropy (lower is better)", justify="right")
    table.add_row("raw", f"{raw[0]:.1%}", f"{raw[1]:.3f}")
    table.add_row("averaged", f"{averaged[0]:.1%}", f"{averaged[1]:.3f}", style="bold")
    table.add_section()
    table.add_row("difference", f"{100 * accuracy:+.1f} points", f"{loss:+.3f}")
    if chosen is not None:
        table.add_section()
        table.add_row("chosen half-life", f"{chosen.accuracy:.1%}", f"{chosen.loss:.3f}")
    console.print(table)
    if chosen is not None:
        console.print(
            f"The chosen half-life: the run was recorded, and of all half-lives {chosen.half_life} is best on "
            "validation digits. The table is of test digits, which had no part in the choice."
        )
    console.print(
        "Averaging helps here because the learning rate is constant and labels are wrong. When it does not: "
        "see docs/when-it-helps.md."
        if accuracy > 0 > loss
        else "Averaging does not improve both metrics with this seed, half-life and length. When it helps: "
        "see docs/when-it-helps.md."
    )
    console.print(f"\nWritten to {folder.path}/", soft_wrap=True)
    for name, what in (
        (folder.averaged.name, "for model.load_state_dict(load_file(path))"),
        (f"{folder.sweep.name}/report.html", "charts of every half-life, for a browser"),
        (f"{folder.checkpoints.name}/", "to resume from, with more --steps"),
        (folder.metrics.name, "all metrics"),
        (f"{folder.png.name}, {folder.svg.name}", "the curves, and the share of each step in the average"),
    ):
        console.print(f"  {name:<22} {what}", soft_wrap=True)

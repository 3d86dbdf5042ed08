"""What ``polyak demo`` does. It imports torch, which the help of the command does not need."""

import warnings
from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from typing import Literal

import torch

from polyak.cli.command import REFUSED, Answer
from polyak.cli.experiment import Chosen, choose, final_curves, train
from polyak.cli.folder import RunFolder
from polyak.cli.output import fields, table, terminal_width, written
from polyak.cli.recipe import NUM_VALIDATION, RECORD_INTERVAL, Digits
from polyak.errors import PlanWarning, QuarantineWarning, ShardingError
from polyak.report.series import Curve
from polyak.time import TimeUnit
from polyak.trainer.parallel import join


def run_demo(arguments: Namespace) -> Answer | None:
    """Train or resume unless the run is complete; return its results, on rank 0.

    Args:
        arguments: The parsed arguments of ``polyak demo``.

    Raises:
        UsageError: If the folder belongs to another run.
    """
    parallelism: Literal["ddp"] | None = "ddp" if torch.distributed.is_torchelastic_launched() else None
    group = join(parallelism, "cpu")

    def say(sentence: str) -> None:
        if group.rank == 0:
            print(written(sentence), flush=True)

    # Its curve shows the average from its first updates on, by intent.
    warnings.filterwarnings("ignore", "the average that is .* is mostly its first weights|raw weights are", PlanWarning)
    if group.rank > 0:  # rank 0 prints all warnings
        for category in (PlanWarning, QuarantineWarning):
            warnings.simplefilter("ignore", category)
    digits = Digits(arguments.seed, arguments.steps, arguments.half_life)
    folder = RunFolder(arguments.out)
    with ExitStack() as held:
        try:
            group.ranks.on_rank_0(lambda: _begin(digits, folder, held), "begin")
        except ShardingError:
            raise SystemExit(REFUSED) from None  # rank 0 prints the error
        say(
            f"Digits, {digits.flipped:.0%} of the training labels wrong. A small network, SGD at a constant learning "
            f"rate, EMA with half-life {digits.half_life}, seed {digits.seed}."
        )
        if group.ranks.from_rank_0(folder.complete):
            say(f"All {digits.steps} steps are done; nothing was trained.")
        else:
            train(digits, folder, say, group, parallelism)
        return _answer(digits, folder, say) if group.rank == 0 else None


def _begin(digits: Digits, folder: RunFolder, held: ExitStack) -> None:
    held.enter_context(folder.locked())
    folder.begin(
        {"--seed": digits.seed, "--half-life": str(digits.half_life), "--steps": digits.steps},
        f"flipped={digits.flipped} lr={digits.lr} batch_size={digits.batch_size} "
        f"validation={NUM_VALIDATION} record={RECORD_INTERVAL}",
        may_grow=None if digits.half_life.unit is TimeUnit.DURATION else "--steps",
    )


def _answer(digits: Digits, folder: RunFolder, say: Callable[[str], None]) -> Answer:
    curves, chosen = final_curves(digits, folder), choose(digits, folder, say)
    files = {
        folder.averaged.name: "the averaged weights, for load_state_dict",
        f"{folder.sweep.name}/report.html": "charts of every half-life, for a browser",
        f"{folder.checkpoints.name}/": "to resume from, with more --steps",
        folder.metrics.name: "all metrics",
        f"{folder.png.name}, {folder.svg.name}": "the curves, and the share of each step in the average",
    }
    listed = fields(list(files.items()), terminal_width() - 2).splitlines()
    text = [_text(curves, chosen), "", written(f"Written to {folder.path}/"), *(f"  {line}" for line in listed)]
    plain = {
        "raw": {"accuracy": curves["eval_raw/accuracy"].last, "loss": curves["eval_raw/loss"].last},
        "averaged": {"accuracy": curves["eval/accuracy"].last, "loss": curves["eval/loss"].last},
        "chosen": None if chosen is None else asdict(chosen) | {"half_life": str(chosen.half_life)},
        "steps": digits.steps,
        "files": [str(folder.path / name) for names in files for name in names.split(", ")],
    }
    return Answer("\n".join(text), plain)


def _text(curves: Mapping[str, Curve], chosen: Chosen | None) -> str:
    raw = (curves["eval_raw/accuracy"].last, curves["eval_raw/loss"].last)
    averaged = (curves["eval/accuracy"].last, curves["eval/loss"].last)
    accuracy, loss = (after - before for before, after in zip(raw, averaged, strict=True))
    rows = [
        ["raw", f"{raw[0]:.1%}", f"{raw[1]:.3f}"],
        ["averaged", f"{averaged[0]:.1%}", f"{averaged[1]:.3f}"],
        ["difference", f"{100 * accuracy:+.1f} points", f"{loss:+.3f}"],
    ]
    sentences = list[str]()
    if chosen is not None:
        rows.append(["chosen half-life", f"{chosen.accuracy:.1%}", f"{chosen.loss:.3f}"])
        sentences.append(
            f"The chosen half-life: the run was recorded, and of all half-lives {chosen.half_life} is best on "
            "validation digits. The table is of test digits, which had no part in the choice."
        )
    sentences.append(
        "Averaging helps here because the learning rate is constant and labels are wrong. When it does not: "
        "see docs/when-it-helps.md."
        if accuracy > 0 > loss
        else "Averaging does not improve both metrics with this seed, half-life and length. When it helps: "
        "see docs/when-it-helps.md."
    )
    headings = ["weights", "test accuracy", "cross-entropy (lower is better)"]
    return f"{table(headings, rows, terminal_width())}\n{written(*sentences)}"

"""The demo's metrics over several seeds, and runs in which averaging helps less or not at all.

    python benchmarks/demo_seeds.py [--seeds 5] [--out benchmarks/results/demo_seeds.md]

All runs have the half-life of the demo, which was fixed beforehand. Nothing is chosen on the test set.
"""

import argparse
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from results_io import processor, row

import polyak
from polyak.cli.recipe import NUM_TRAIN, NUM_VALIDATION, Digits, build_trainer, cosine
from polyak.storage.atomic import replacing

RUNS = {
    "the demo": Digits(),
    "cosine decay of the learning rate": Digits(schedule=cosine),
    "learning rate 0.03": Digits(lr=0.03),
    "no label noise": Digits(flipped=0.0),
}


@dataclass(frozen=True)
class Result:
    seed: int
    raw_accuracy: float
    averaged_accuracy: float
    raw_loss: float
    averaged_loss: float
    wall_s: float

    @property
    def accuracy_gain(self):
        return self.averaged_accuracy - self.raw_accuracy

    @property
    def loss_gain(self):
        return self.averaged_loss - self.raw_loss


def measure(digits: Digits) -> Result:
    began = time.perf_counter()
    trainer, _ = build_trainer(digits, eval_interval=f"{digits.steps}ba")
    trainer.fit()
    found = trainer.state.eval_metrics
    return Result(
        digits.seed,
        100 * found["eval_raw/accuracy"],
        100 * found["eval/accuracy"],
        found["eval_raw/loss"],
        found["eval/loss"],
        time.perf_counter() - began,
    )


def spread(values: Sequence[float], form: str) -> str:
    """Return the mean and the sample standard deviation as text."""
    return f"{statistics.mean(values):{form}} ± {statistics.stdev(values):{form.lstrip('+')}}"


def columns(results: Sequence[Result]) -> list[str]:
    return [
        spread([r.raw_accuracy for r in results], ".1f"),
        spread([r.averaged_accuracy for r in results], ".1f"),
        spread([r.accuracy_gain for r in results], "+.1f"),
        spread([r.raw_loss for r in results], ".3f"),
        spread([r.averaged_loss for r in results], ".3f"),
        spread([r.loss_gain for r in results], "+.3f"),
    ]


def page(found: dict[str, list[Result]]) -> str:
    demo, results = RUNS["the demo"], found["the demo"]
    seeds = f"seeds {results[0].seed} to {results[-1].seed}"
    head = ("raw accuracy, %", "averaged, %", "gain, points", "raw cross-entropy", "averaged", "gain")
    rule = ("---", *["---:"] * len(head))
    each = [
        row(
            r.seed,
            f"{r.raw_accuracy:.1f}",
            f"{r.averaged_accuracy:.1f}",
            f"{r.accuracy_gain:+.1f}",
            f"{r.raw_loss:.3f}",
            f"{r.averaged_loss:.3f}",
            f"{r.loss_gain:+.3f}",
        )
        for r in results
    ]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "scikit-learn", "numpy"))
    lines = [
        "# The demo over seeds",
        "",
        f"`polyak demo`: scikit-learn's digits, {NUM_TRAIN} for training, {NUM_VALIDATION} for choosing and 500 for",
        f"testing, {demo.flipped:.0%} of the training labels are wrong; a network of 64-128-128-10; SGD at a constant",
        f"learning rate of {demo.lr}, batches of {demo.batch_size}, {demo.steps} steps.",
        f"EMA with half-life {demo.half_life}, fixed beforehand. All metrics are on the test digits, after the last "
        "step.",
        "Mean ± standard deviation; gains are of averaged over raw in the same run. In accuracy more is better, in",
        "cross-entropy less.",
        "",
        row("seed", *head),
        row(*rule),
        *each,
        row("all", *columns(results)),
        "",
        f"## Runs in which averaging helps less ({seeds})",
        "",
        row("run", *head),
        row(*rule),
        *(row(name, *columns(of)) for name, of in found.items()),
        "",
        "## How it was measured",
        "",
        f"- Command: `python {shlex.join(sys.argv)}`",
        f"- Versions: polyak {polyak.__version__}, {packages}, Python {platform.python_version()}",
        f"- Hardware: {processor()}, {os.cpu_count()} cores; one thread",
        f"- Time: {statistics.median(r.wall_s for of in found.values() for r in of):.1f} s a run (median)",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="the number of seeds, at least 2 (default: 5)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "demo_seeds.md")
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error(f"--seeds must be at least 2 for a standard deviation (got {arguments.seeds})")
    torch.set_num_threads(1)
    found = {
        name: [measure(replace(digits, seed=seed)) for seed in range(arguments.seeds)] for name, digits in RUNS.items()
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(arguments.out) as draft:
        draft.write_text(page(found), encoding="utf-8")
    print(page(found))


if __name__ == "__main__":
    main()

"""What the fingerprint in C, and counters of changes that averages share, would save of a training step.

    python benchmarks/fingerprint_share.py [--rounds 60] [--out benchmarks/results/fingerprint_share.md]

Each variant updates the same averages of the same model: in each round every variant gets one step, in changing order.
It measures time of the processor next to time on the clock, since the former does not depend on other processes.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from results_io import RESULTS, measured, paragraph, provenance, table, write
from torch import Tensor, nn

from polyak import EMA, attach, kernels
from polyak.averaging.weights import Shadow
from polyak.tensors import fingerprint

BATCH = 8
FIRST = "C, one counter"


class Small(nn.Module):
    """2,000 layers of a weight of 64 elements and a bias: 4,000 tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2000))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x.square().mean()


class Block(nn.Module):
    """A block of GPT-2."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        found = self.attention(self.before_attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(nn.functional.scaled_dot_product_attention(*found, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.before_mlp(x))


class GPT2(nn.Module):
    """GPT-2 small, its head tied to the embedding: 148 tensors, 124 million elements."""

    def __init__(self, width: int = 768) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(50257, width), nn.Embedding(1024, width)
        self.blocks = nn.ModuleList(Block(width, 12) for _ in range(12))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens[:, :-1]) + self.places.weight[: tokens.shape[1] - 1]
        for block in self.blocks:
            x = block(x)
        logits = self.norm(x) @ self.tokens.weight.t()
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


CASES = {
    "4,000 small tensors": (Small, lambda: torch.randn(BATCH, 8)),
    "GPT-2": (GPT2, lambda: torch.randint(50257, (2, 129))),
}


def stepper(model: nn.Module, inputs: Tensor, *, fused: bool) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    """Return a training step, and its optimizer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=fused)

    def step() -> None:
        optimizer.zero_grad()
        model(inputs).backward()
        optimizer.step()

    return step, optimizer


def variants(shadow: Shadow, model: nn.Module) -> dict[str, Callable[[], None]]:
    """Return what sets each variant up: which fingerprint is checked, and how many counters are counted up."""
    movement = shadow._movement
    averages = list(shadow.averages.values())
    in_c = fingerprint.Fingerprint(model, averages)
    with kernels.only("torch"):
        in_python = fingerprint.Fingerprint(model, averages)
    each = movement._update._counting
    assert len(each) > 100

    def use(check: fingerprint.Fingerprint, counting: list[Tensor]) -> Callable[[], None]:
        def run() -> None:
            movement.listing.fingerprint = check
            movement._update._counting = counting

        return run

    return {
        FIRST: use(in_c, each[:1]),
        "Python, one counter": use(in_python, each[:1]),
        "C, a counter each": use(in_c, each),
        "Python, a counter each": use(in_python, each),
    }


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Return the milliseconds of the processor, and on the clock, that a call takes."""
    began, began_cpu = time.perf_counter(), time.process_time()
    run()
    return 1000 * (time.process_time() - began_cpu), 1000 * (time.perf_counter() - began)


def measure(title: str, rounds: int, *, fused: bool) -> dict[str, object]:
    """Measure all variants of a case."""
    torch.manual_seed(0)
    make, make_inputs = CASES[title]
    model = make()
    step, optimizer = stepper(model, make_inputs(), fused=fused)
    ema = EMA("1000ba")
    with attach(ema, model, optimizer):
        for _ in range(3):
            step()
        shadow = ema.shadow
        ways = variants(shadow, model)
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name in random.sample(list(ways), len(ways)):
                ways[name]()
                found[name].append(timed(step))
        updates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name in random.sample(list(ways), len(ways)):
                ways[name]()
                updates[name].append(timed(lambda: shadow.update_(1e-4))[0])
    return {
        "case": f"{title}{', fused' if fused else ''}",
        "step_cpu_ms": {name: statistics.quantiles([cpu for cpu, _ in of], n=4) for name, of in found.items()},
        "step_clock_ms": {name: statistics.quantiles([clock for _, clock in of], n=4) for name, of in found.items()},
        "update_cpu_ms": {name: statistics.quantiles(of, n=4) for name, of in updates.items()},
        "paired": {
            name: statistics.quantiles([b / a - 1 for (a, _), (b, _) in zip(found[FIRST], of, strict=True)], n=4)
            for name, of in found.items()
        },
    }


def section(found: dict) -> list[str]:
    """Write the table of a case."""
    steps, updates, paired = found["step_cpu_ms"], found["update_cpu_ms"], found["paired"]
    rows = [
        (
            name,
            *(f"{middle:.2f} ({low:.2f} to {high:.2f})" for low, middle, high in (steps[name], updates[name])),
            f"{(updates[name][1] - updates[FIRST][1]) / steps[FIRST][1]:.2%}",
            "" if name == FIRST else f"{paired[name][1]:.2%} ({paired[name][0]:.2%} to {paired[name][2]:.2%})",
        )
        for name in steps
    ]
    head = ("", "step", "update", "longer by, of a step", "steps longer by, within a round")
    return [f"## {found['case']}", "", *table(head, rows), ""]


def page(results: list[dict], how: dict[str, str], wall_s: float) -> list[str]:
    """Write the results as Markdown."""
    lines = [
        "# What a fingerprint in C and shared counters save of a training step",
        "",
        *paragraph(
            "A step is forward, backward, AdamW and the update of an attached average, with its hooks and its clock. "
            "The variants take turns on the same model and averages, in changing order; milliseconds of the processor, "
            "as medians and (quartiles). The third column is the difference of the updates' medians over the median "
            "step: it is less noisy than the last one, which compares two steps of one round. `Python` checks the "
            "tensors in Python; `a counter each` counts up the change of each average, and not one counter for all. "
            "On one thread."
        ),
        "",
    ]
    for found in results:
        lines += section(found)
    return [*lines, *measured(how, wall_s)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=60, help="steps of each variant (default: 60)")
    parser.add_argument("--cases", default="small,fused,gpt2", help="which (default: small,fused,gpt2)")
    parser.add_argument("--out", type=Path, default=RESULTS / "fingerprint_share.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    small = "4,000 small tensors"
    cases = {"small": (small, False, 1), "fused": (small, True, 1), "gpt2": ("GPT-2", False, 4)}
    results = []
    for name in arguments.cases.split(","):
        title, fused, fewer = cases[name]
        results.append(measure(title, max(8, arguments.rounds // fewer), fused=fused))
        print(results[-1], flush=True)
    how = provenance("torch")
    wall_s = time.perf_counter() - began
    write(arguments.out, page(results, how, wall_s), {"results": results, "how": how, "wall_s": round(wall_s, 1)})


if __name__ == "__main__":
    main()

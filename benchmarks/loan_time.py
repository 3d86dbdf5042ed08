"""How long it takes to lend an average to the model and to give it back, and how much memory that takes.

    python benchmarks/loan_time.py [--repeats 9] [--out benchmarks/results/loan_time.md]

All contenders take turns in one run. Memory is the peak of the process above what it had before (Linux only).
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from results_io import RESULTS, measured, paragraph, progress, provenance, table, write
from torch import nn
from update_time import PAIRS, gpt2, resnet50

from polyak.shadow import Shadow

Step = Callable[[], object]


def memory_bytes(field: str) -> int:
    """Return what Linux says of this process: VmRSS, what it has, or VmHWM, the most that it had."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def extra_bytes(steps: tuple[Step, Step]) -> int:
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the most is counted from here
    before = memory_bytes("VmRSS")
    for step in steps:
        step()
    return max(0, memory_bytes("VmHWM") - before)


def contenders(model: nn.Module, average: torch.dtype) -> dict[str, tuple[Step, Step]]:
    """Return what lends and what gives back."""
    shadow = Shadow(model, dtype=average)
    own = [p.detach().to(average, copy=True) for p in model.parameters()]
    kept: list[torch.Tensor] = []

    @torch.no_grad()
    def store_and_copy() -> None:
        kept.extend(p.detach().clone() for p in model.parameters())
        for s, p in zip(own, model.parameters(), strict=True):
            p.copy_(s)

    @torch.no_grad()
    def restore() -> None:
        for c, p in zip(kept, model.parameters(), strict=True):
            p.copy_(c)
        kept.clear()

    @torch.no_grad()
    def swap() -> None:
        for s, p in zip(own, model.parameters(), strict=True):
            aside = p.detach().clone()
            p.copy_(s)
            s.copy_(aside)

    found = {
        "polyak": (lambda: shadow.lend("the benchmark"), shadow.give_back),
        "formula of diffusers and torch-ema: store, copy_to, restore": (store_and_copy, restore),
    }
    if model[0].dtype == average:
        found["tensor by tensor, as torch's swap_ema functions do"] = (swap, swap)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=9, help="of each (default: 9)")
    parser.add_argument("--out", type=Path, default=RESULTS / "loan_time.md")
    arguments = parser.parse_args()
    began = time.perf_counter()
    cases = {"ResNet-50": resnet50(), "GPT-2": gpt2(), "4,000 of 64": [(64,)] * 4000}
    results, rows = [], []
    with progress() as bar:
        task = bar.add_task("cases", total=len(cases) * len(PAIRS))
        for case, shapes in cases.items():
            for pair, (dtype, average) in PAIRS.items():
                model = nn.ParameterList(nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes)
                runs = contenders(model, average)
                times = {name: ([], []) for name in runs}
                for _ in range(arguments.repeats):
                    for name in random.sample(list(runs), len(runs)):
                        for step, found in zip(runs[name], times[name], strict=True):
                            start = time.perf_counter()
                            step()
                            found.append(1000 * (time.perf_counter() - start))
                size = sum(p.nbytes for p in model.parameters())
                for name, steps in runs.items():
                    lend, back = map(statistics.median, times[name])
                    extra = min(extra_bytes(steps) for _ in range(3))
                    results.append(
                        {"case": case, "pair": pair, "name": name, "lend_ms": lend, "back_ms": back}
                        | {"extra_bytes": extra, "model_bytes": size}
                    )
                    cells = f"{lend:.2f}", f"{back:.2f}", f"{extra / 2**20:.1f}", f"{size / 2**20:.1f}"
                    rows.append((f"{case}, {pair}", name, *cells))
                bar.advance(task)
    how = provenance("torch")
    wall_s = time.perf_counter() - began
    lines = [
        "# Lending an average to the model, and giving it back",
        "",
        *paragraph(
            "Medians; the contenders of a case took turns in one run. Memory is the least of three peaks of the process"
            " above what it had before; allocators keep small blocks, so what is small may show as none. Where model"
            " and average have one dtype polyak exchanges values through a scratch buffer of at most 131,072 elements."
            " Where they differ it keeps the model's own bits aside, as the others do. CPU only."
        ),
        "",
        *table(("case", "who", "lend, ms", "give back, ms", "extra memory, MiB", "model, MiB"), rows),
        "",
        *measured(how, wall_s),
    ]
    write(arguments.out, lines, {"results": results, "how": how, "wall_s": round(wall_s, 1)})


if __name__ == "__main__":
    main()

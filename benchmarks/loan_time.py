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
from peers import OURS, PACKAGES, averages_of, tensor_by_tensor
from results_io import RESULTS, measured, paragraph, progress, provenance, table, write
from torch import nn
from update_time import PAIRS, gpt2, resnet50

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
    names = (OURS, "torch-ema", "diffusers EMAModel, foreach")
    found = {name: (made.lend, made.give_back) for name, made in averages_of(model, average, names).items()}
    if all(p.dtype == average for p in model.parameters()):
        swap = tensor_by_tensor(model, average)
        found["tensor by tensor, through a clone of each"] = swap.lend, swap.give_back
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
    how = provenance(*PACKAGES)
    wall_s = time.perf_counter() - began
    lines = [
        "# Lending an average to the model, and giving it back",
        "",
        *paragraph(
            "Medians; the contenders of a case took turns in one run. Memory is the least of three peaks of the process"
            " above what it had before. A 0 for all, also for who copies the whole model, says nothing: allocators keep"
            " what was freed, and some libraries the copy of the last loan. Peaks of whole runs are in"
            " `training_memory.md`. Where model"
            " and average have one dtype polyak exchanges values in place. Where they differ it keeps the model's own"
            " bits aside, as the others do. The modules of other libraries, which are evaluated in the model's stead,"
            " take no loan and hold a second model. CPU only: nothing of this was measured on a GPU."
        ),
        "",
        *table(("case", "who", "lend, ms", "give back, ms", "extra memory, MiB", "model, MiB"), rows),
        "",
        *measured(how, wall_s),
    ]
    write(arguments.out, lines, {"results": results, "how": how, "wall_s": round(wall_s, 1)})


if __name__ == "__main__":
    main()

"""The time to swap an average into the model and to restore the weights, and the memory that a swap takes.

    python benchmarks/loan_time.py [--repeats 9] [--out benchmarks/results/loan_time.md]

Times: all libraries take turns in one run. Memory: each library has a separate process (Linux only).
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from peers import OURS, PACKAGES, averages_of, tensor_by_tensor
from process_memory import alone, peak_bytes, settled_bytes
from results_io import RESULTS, measured, paragraph, progress, provenance, table, write
from torch import nn
from update_time import PAIRS, gpt2, resnet50

Step = Callable[[], object]
Shapes = Iterable[tuple[int, ...]]
CASES: dict[str, Shapes] = {"ResNet-50": resnet50(), "GPT-2": gpt2(), "4,000 of 64": [(64,)] * 4000}
SWAP = "tensor by tensor, with a clone of each"
NAMES = (OURS, "torch-ema", "diffusers EMAModel, foreach", SWAP)


def model_of(shapes: Shapes, dtype: torch.dtype) -> nn.Module:
    return nn.ParameterList(nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes)


def contenders(model: nn.Module, average: torch.dtype, names: Iterable[str] = NAMES) -> dict[str, tuple[Step, Step]]:
    """Return a function that swaps in and one that restores."""
    made = averages_of(model, average, [name for name in names if name != SWAP])
    if SWAP in names and all(p.dtype == average for p in model.parameters()):
        made[SWAP] = tensor_by_tensor(model, average)
    return {name: (one.lend, one.give_back) for name, one in made.items() if one.lend and one.give_back}


def times_ms(runs: dict[str, tuple[Step, Step]], repeats: int) -> dict[str, tuple[float, float]]:
    """Return the times of swapping in and of restoring; the libraries take turns in changing order."""
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in runs}
    for _ in range(repeats):
        for name in random.sample(list(runs), len(runs)):
            for step, found in zip(runs[name], times[name], strict=True):
                start = time.perf_counter()
                step()
                found.append(1000 * (time.perf_counter() - start))
    return {name: (statistics.median(lend), statistics.median(back)) for name, (lend, back) in times.items()}


def memory(case: str, pair: str, name: str) -> dict[str, int]:
    """Return the peak memory of a first and of a second swap and the memory kept after them, above that before."""
    dtype, average = PAIRS[pair]
    # Code that is loaded at the first call does not belong to the memory of the swap.
    small = model_of([(300, 300), (300,)], dtype)
    for step in contenders(small, average, [name])[name]:
        step()
    model = model_of(CASES[case], dtype)
    steps = contenders(model, average, [name])[name]
    before = settled_bytes()
    first = peak_bytes(*steps)
    settled_bytes()
    found = {"first": first, "second": peak_bytes(*steps), "kept": settled_bytes()}
    return {f"{what}_bytes": max(0, there - before) for what, there in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=9, help="repeats of each measurement (default: 9)")
    parser.add_argument("--out", type=Path, default=RESULTS / "loan_time.md")
    parser.add_argument(
        "--memory",
        nargs=3,
        metavar=("CASE", "DTYPES", "NAME"),
        help="measure only the memory of one library, in this process",
    )
    arguments = parser.parse_args()
    if arguments.memory:
        print(json.dumps(memory(*arguments.memory)))
        return
    began = time.perf_counter()
    results, rows = [], []
    with progress() as bar:
        task = bar.add_task("cases", total=len(CASES) * len(PAIRS))
        for case, shapes in CASES.items():
            for pair, (dtype, average) in PAIRS.items():
                model = model_of(shapes, dtype)
                size = sum(p.nbytes for p in model.parameters())
                times = times_ms(contenders(model, average), arguments.repeats)
                for name, (lend, back) in times.items():
                    took = alone("--memory", case, pair, name)
                    results.append(
                        {"case": case, "pair": pair, "name": name, "lend_ms": lend, "back_ms": back}
                        | {"extra_bytes": max(took["first_bytes"], took["second_bytes"]), "model_bytes": size}
                        | took
                    )
                    of = (took["first_bytes"], took["second_bytes"], took["kept_bytes"], size)
                    cells = f"{lend:.2f}", f"{back:.2f}", *(f"{count / 2**20:.1f}" for count in of)
                    rows.append((f"{case}, {pair}", name, *cells))
                bar.advance(task)
    head = (
        *("case", "who", "swap in, ms", "restore, ms"),
        *("memory of the first swap, MiB", "of the second, MiB", "kept, MiB", "the model, MiB"),
    )
    how = provenance(*PACKAGES)
    wall_s = time.perf_counter() - began
    lines = [
        "# Swapping an average into the model, and restoring the weights",
        "",
        *paragraph(
            "Times are medians; the libraries of a case took turns in one run. Memory is that of a separate process "
            "for each library: the peak of the first and of the second swap, and what remains after them, above the "
            "memory before the first. Allocators return free memory to the system. If model and average have the same "
            "dtype, polyak exchanges the values in place. If the dtypes differ, it keeps a backup of the model's "
            "weights, as the others do. In models of thousands of small tensors, most of the memory is that of Python "
            "objects. torch-ema keeps its backup after a swap, and makes the next one before it releases it. "
            "Libraries whose average is a separate module need no swap, but hold a second model. Measured on a CPU "
            "only, not on a GPU."
        ),
        "",
        *table(head, rows),
        "",
        *measured(how, wall_s),
    ]
    write(arguments.out, lines, {"results": results, "how": how, "wall_s": round(wall_s, 1)})


if __name__ == "__main__":
    main()

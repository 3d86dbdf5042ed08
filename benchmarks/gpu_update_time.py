"""The time of one update of an average on a GPU, compared with torch's averages and with a copy.

    python benchmarks/gpu_update_time.py [--repeats 21] [--cases 4000,gpt2,resnet50,100m,1b] [--out FILE]

Needs a GPU. All contenders of a case take turns in one run, as does the copy that measures the bandwidth.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from peers import DECAY
from results_io import RESULTS, item, measured, paragraph, progress, provenance, table, write
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn
from update_time import PAIRS, gpt2, resnet50

from polyak import kernels
from polyak.averaging.weights import Shadow

DEVICE = "cuda"
COPY, COPY_BYTES = "a copy", 1 << 30
OURS = "polyak"
# Sleeping is counted in cycles of the GPU's clock; no current GPU has a faster one.
CYCLES_PER_S = 3e9
CASES = {
    "4000": ("4,000 of 64", [(64,)] * 4000),
    "gpt2": ("GPT-2", gpt2()),
    "resnet50": ("ResNet-50", resnet50()),
    "100m": ("one of 100 M", [(100_000_000,)]),
    "1b": ("100 of 10 M", [(10_000_000,)] * 100),
}

Run = Callable[[], object]


def averages_of(model: nn.Module, average: torch.dtype) -> tuple[list[kernels.Pair], Tensor]:
    """Return averages of the model's parameters in pairs with these, and a counter: what a kernel takes."""
    online = [p.detach() for p in model.parameters()]
    pairs = [kernels.Pair(x.to(average, copy=True), x, kernels.Place(number)) for number, x in enumerate(online)]
    return pairs, torch.zeros((), dtype=torch.int64, device=DEVICE)


def replayed(model: nn.Module, average: torch.dtype) -> Run:
    """Return our update as a CUDA graph, with another weight at each replay."""
    from polyak.kernels import triton

    lerp = triton.Lerp(*averages_of(model, average))
    lerp(1 - DECAY, 0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lerp.launch()

    def run() -> None:
        lerp.stage(1 - DECAY, 1)
        graph.replay()

    return run


def contenders(model: nn.Module, average: torch.dtype) -> Iterator[tuple[str, Callable[[], Run]]]:
    """Yield for each contender a function that makes an updater of a new average of ``model``."""

    def ours() -> Run:
        shadow = Shadow(model, dtype=average)
        return lambda: shadow.update_(1 - DECAY)

    def in_torch() -> Run:
        pairs, left_out = averages_of(model, average)
        with kernels.only("torch"):
            update = kernels.lerp(*zip(*pairs, strict=True), left_out)
        return lambda: update(1 - DECAY, 1)

    def averaged_model(**functions: Callable) -> Run:
        averaged = AveragedModel(model, **functions)
        averaged.module.to(average)
        averaged.update_parameters(model)
        return lambda: averaged.update_parameters(model)

    def bare() -> Run:
        averages, online, _ = zip(*averages_of(model, average)[0], strict=True)
        return lambda: torch._foreach_lerp_(averages, online, 1 - DECAY)

    def copy() -> Run:
        x, y = (torch.zeros(COPY_BYTES // 4, device=DEVICE) for _ in range(2))
        return lambda: y.copy_(x)

    yield COPY, copy
    yield OURS, ours
    yield f"{OURS}, from a CUDA graph", lambda: replayed(model, average)
    yield f"{OURS}, kernel in torch", in_torch
    yield "torch AveragedModel, multi_avg_fn", lambda: averaged_model(multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    yield "torch AveragedModel, avg_fn", lambda: averaged_model(avg_fn=get_ema_avg_fn(DECAY))
    yield "torch._foreach_lerp_", bare


def seconds_on_host(run: Run) -> float:
    """Return the time until the call returns."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def seconds_on_gpu(run: Run, ahead_s: float) -> float:
    """Return the time on the GPU. The GPU sleeps first, so that it does not wait for the host during the update."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(int(CYCLES_PER_S * ahead_s))
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


@torch.no_grad()
def race(model: nn.Module, average: torch.dtype, repeats: int) -> tuple[dict[str, float], dict[str, float], list[str]]:
    """Return the median seconds on the GPU and on the host, measured in turns in changing order, and the refusals."""
    runs, refusals = dict[str, Run](), list[str]()
    for name, make in contenders(model, average):
        try:
            run = make()
            run()
            torch.cuda.synchronize()
        except (ImportError, RuntimeError, TypeError) as error:  # also for lack of memory
            refusals.append(f"{name}: {str(error).splitlines()[0]}")
        else:
            runs[name] = run
    host = {name: [seconds_on_host(run) for _ in range(3)] for name, run in runs.items()}
    device = {name: list[float]() for name in runs}
    for _ in range(repeats):
        for name in random.sample(list(runs), len(runs)):
            host[name].append(seconds_on_host(runs[name]))
            device[name].append(seconds_on_gpu(runs[name], 2 * max(host[name])))
    on_gpu, on_host = ({name: statistics.median(found) for name, found in of.items()} for of in (device, host))
    return on_gpu, on_host, refusals


def check(model_dtype: torch.dtype, average: torch.dtype) -> None:
    """Raise an error if a kernel does not give the same numbers as torch's."""
    results = []
    for name in ("triton", "torch"):
        generator = torch.Generator(DEVICE).manual_seed(0)
        a, x = (torch.randn(1_000_003, generator=generator, device=DEVICE).to(d) for d in (average, model_dtype))
        with kernels.only(name):
            kernels.lerp_([a], [x], 1 - DECAY, [kernels.Place(1)], 5)
        results.append(a)
    if not torch.equal(*results):
        sys.exit(
            f"a {average} average of {model_dtype} must be the same by both kernels (it is not); nothing was timed"
        )


def gpu() -> str:
    found = torch.cuda.get_device_properties(0)
    return f"{found.name}, {found.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=21, help="repeats of each measurement (default: 21)")
    parser.add_argument("--cases", default=",".join(CASES), help=f"the cases (default: {','.join(CASES)})")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu_update_time.md")
    arguments = parser.parse_args()
    cases = arguments.cases.split(",")
    if unknown := sorted(set(cases) - set(CASES)):
        parser.error(f"--cases must be among {','.join(CASES)} (got {','.join(unknown)})")
    if not torch.cuda.is_available():
        sys.exit("gpu_update_time.py needs a GPU (torch finds none); run it where torch.cuda.is_available()")
    began, results, missing = time.perf_counter(), [], list[str]()
    with progress() as bar:
        task = bar.add_task("cases", total=len(cases) * len(PAIRS))
        for pair, (dtype, average) in PAIRS.items():
            check(dtype, average)
            for case in cases:
                title, shapes = CASES[case]
                count = sum(torch.Size(shape).numel() for shape in shapes)
                model = nn.ParameterList(nn.Parameter(torch.randn(s, device=DEVICE, dtype=dtype)) for s in shapes)
                on_gpu, on_host, refusals = race(model, average, arguments.repeats)
                missing += [f"{title}, {pair}: {refusal}" for refusal in refusals]
                del model
                torch.cuda.empty_cache()
                bar.advance(task)
                if COPY not in on_gpu:
                    continue
                bandwidth = 2 * COPY_BYTES / on_gpu.pop(COPY)
                size = dtype.itemsize + 2 * average.itemsize
                results.append(
                    {
                        "case": title,
                        "tensors": len(shapes),
                        "elements": count,
                        "pair": pair,
                        "bytes_per_element": size,
                        "copy_gb_per_s": bandwidth / 1e9,
                        "median_ms": {name: 1000 * s for name, s in on_gpu.items()},
                        "share_of_copy_bandwidth": {name: size * count / s / bandwidth for name, s in on_gpu.items()},
                        "host_median_ms": {name: 1000 * on_host[name] for name in on_gpu},
                    }
                )
    lines = [
        "# The time of one update on a GPU",
        "",
        *paragraph(
            f"Medians of {arguments.repeats}; all contenders of a column took turns in one run, in changing order. "
            "First the time on the GPU in milliseconds, by CUDA events, with a queue filled beforehand; in "
            "parentheses the bytes that an update of these dtypes reads and writes, divided by that time, relative "
            "to the bandwidth of "
            f"`y.copy_(x)` over {COPY_BYTES >> 30} GiB, read and written, in the same run (it can be higher for what "
            "fits in the cache). Then the milliseconds until the call returned on the host. polyak rounds a 16-bit "
            "average stochastically; the others round to nearest, which is faster and stalls at long half-lives."
        ),
        "",
    ]
    for pair in PAIRS:
        if of := [found for found in results if found["pair"] == pair]:
            lines += section(pair, of)
    how = provenance("torch", "triton")
    how["hardware"] = f"{gpu()}; {how['hardware']}"
    wall_s = time.perf_counter() - began
    one = torch.ones(1, device=DEVICE)
    kernel = type(kernels.lerp([one], [one], [kernels.Place(0)], torch.zeros((), device=DEVICE))).__module__
    lines += item(f"polyak's kernel: {kernel}.")
    lines += [line for reason in missing for line in item(f"Not measured: {reason}.")]
    lines += ["", *measured(how, wall_s)]
    write(
        arguments.out,
        lines,
        {"results": results, "kernel": kernel, "missing": missing, "how": how, "wall_s": round(wall_s, 1)},
    )


def section(pair: str, of: list[dict]) -> list[str]:
    """Return the tables of one pair of dtypes."""
    names = list(dict.fromkeys(name for found in of for name in found["median_ms"]))
    titles = [f"{found['case']} ({found['tensors']:,} tensors, {found['elements'] / 1e6:,.1f} M)" for found in of]

    def cell(found: dict, name: str) -> str:
        if name not in found["median_ms"]:
            return "-"
        return f"{found['median_ms'][name]:.3f} ({found['share_of_copy_bandwidth'][name]:.0%})"

    device = [(name, *(cell(found, name) for found in of)) for name in names]
    device.append(("the copy, GB/s", *(f"{found['copy_gb_per_s']:,.0f}" for found in of)))
    host = [(name, *(f"{found['host_median_ms'].get(name, float('nan')):.3f}" for found in of)) for name in names]
    heading = pair.capitalize()
    return [f"## {heading}", "", *table(("GPU", *titles), device), "", *table(("host", *titles), host), ""]


if __name__ == "__main__":
    main()

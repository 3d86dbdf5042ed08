"""What the average of a sharded model costs each rank in time, messages and memory, by the number of ranks.

    python benchmarks/sharded_update.py [--parameters 64] [--repeats 9] [--out benchmarks/results/sharded_update.md]

The ranks are gloo processes on one machine, which share its cores and memory bandwidth. All ranks run each measurement
at the same time, also the limit: an in-place `y += a * (x - y)` over as many bytes as a rank's update moves.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from process_memory import GIVES_BACK, peak_bytes, settled_bytes
from results_io import RESULTS, measured, paragraph, provenance, table, write
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode

from polyak import EMA
from polyak.averaging.weights import Shadow
from polyak.sharding import Ranks, local

_LAYERS = 16


def _time_ms(repeats: int, step: Callable[[], object]) -> float:
    """Return the median over repeats of the time of the slowest rank."""
    step()
    times = []
    for _ in range(repeats):
        dist.barrier()
        start = time.perf_counter()
        step()
        slowest = torch.tensor(1000 * (time.perf_counter() - start))
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        times.append(float(slowest))
    return statistics.median(times)


def _limit_ms(repeats: int, elements: int) -> float:
    flat, other = torch.randn(elements), torch.randn(elements)
    return _time_ms(repeats, lambda: other.lerp_(flat, 0.1))


def _extra_bytes(step: Callable[[], object]) -> int:
    before = settled_bytes()
    return max(0, peak_bytes(step) - before)


def _rank(rank: int, size: int, meeting: str, parameters: int, repeats: int, results: Any) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    width = round((parameters / _LAYERS) ** 0.5)
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(_LAYERS)))
    if size > 1:
        mesh = init_device_mesh("cpu", (size,))
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    shards = [local(parameter).detach() for parameter in model.parameters()]
    shadows: list[Shadow] = []
    made = _extra_bytes(lambda: shadows.append(Shadow(model)))
    (shadow,) = shadows
    limit = _limit_ms(repeats, sum(shard.numel() for shard in shards))
    update = _time_ms(repeats, lambda: shadow.update_(0.1))

    def loan() -> None:
        shadow.swap_in("the benchmark")
        shadow.restore()

    found = {
        "ranks": size,
        "shard_bytes": sum(shard.nbytes for shard in shards),
        "limit_ms": limit,
        "update_ms": update,
        "loan_ms": _time_ms(repeats, loan),
        "average_bytes": made,
        "loan_bytes": min(_extra_bytes(loan) for _ in range(3)),
        "update_bytes": min(_extra_bytes(lambda: shadow.update_(0.1)) for _ in range(3)),
    }
    with CommDebugMode() as messages:
        shadow.update_(0.1)
    found["messages"] = messages.get_total_counts()
    if ranks := Ranks.of(model):
        found["agree_ms"] = _time_ms(repeats, lambda: shadow.agree(ranks, {"algorithm": repr(EMA())}))
    if rank == 0:
        results.put(found)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--parameters", type=float, default=64, help="the parameters of the model, in millions (default: 64)"
    )
    parser.add_argument("--repeats", type=int, default=9, help="repeats of each measurement (default: 9)")
    parser.add_argument("--out", type=Path, default=RESULTS / "sharded_update.md")
    arguments = parser.parse_args()
    began = time.perf_counter()
    found = []
    os.environ.update(GIVES_BACK)
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    for size in (1, 2, 3, 4):
        with tempfile.TemporaryDirectory() as folder:
            given = (size, f"{folder}/meeting", int(arguments.parameters * 1e6), arguments.repeats, results)
            torch.multiprocessing.spawn(_rank, given, nprocs=size)
            found.append(results.get())
    rows = [
        (
            f["ranks"],
            f"{f['shard_bytes'] / 2**20:.0f}",
            f"{f['limit_ms']:.1f}",
            f"{f['update_ms']:.1f}",
            f"{f['update_ms'] / f['limit_ms']:.2f}",
            f["messages"],
            f"{f['loan_ms']:.1f}",
            f"{f['agree_ms']:.1f}" if "agree_ms" in f else "",
            f"{f['average_bytes'] / 2**20:.0f}",
            f"{f['update_bytes'] / 2**20:.1f}",
            f"{f['loan_bytes'] / 2**20:.1f}",
        )
        for f in found
    ]
    head = (
        *("ranks", "a rank's shard, MiB", "limit, ms", "update, ms", "over the limit", "messages in an update"),
        *("swap in and restore, ms", "agree, ms", "the average, MiB", "more in an update, MiB", "more in a swap, MiB"),
    )
    how, wall_s = provenance("torch"), time.perf_counter() - began
    lines = [
        "# What the average of a sharded model costs each rank",
        "",
        *paragraph(
            f"A model of {arguments.parameters:g} M float32 parameters under `fully_shard` (unsharded on one rank), "
            "and its float32 average. Times are medians of those of the slowest rank. All ranks work at the same "
            "time and share the machine's cores and memory bandwidth, so that the time does not fall in proportion "
            "to the shard. The limit is an in-place `y.lerp_(x, a)` over one flat pair of as many elements as the "
            "shard has, on all ranks at the same time. Memory is the peak of rank 0 above its memory before. "
            "Measured on a CPU with gloo only, not on a GPU or between machines."
        ),
        "",
        *table(head, rows),
        "",
        *measured(how, wall_s),
    ]
    write(arguments.out, lines, {"results": found, "how": how, "wall_s": round(wall_s, 1)})


if __name__ == "__main__":
    main()

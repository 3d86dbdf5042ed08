"""What an average costs each rank under DeepSpeed and torchtitan, in time and memory, next to what users write instead.

    build/engines/bin/python benchmarks/engines.py [--engine deepspeed] [--parameters 16] [--repeats 9]
        [--out benchmarks/results/engines.md]

``make test-engines`` makes that environment. The ranks are two gloo processes on one machine, which share its cores and
memory bandwidth. DeepSpeed has no EMA: next to polyak stands the loop that its users write, which gathers one parameter
after the other and keeps a full float32 average on each rank. torchtitan's EMA came after 0.3.0: next to polyak stands
the operation that it makes, `torch._foreach_lerp_` over sharded tensors.
"""

import argparse
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from process_memory import GIVES_BACK, peak_bytes, settled_bytes
from results_io import RESULTS, measured, paragraph, provenance, table, write
from torch import Tensor, nn

from polyak import EMA
from polyak.sharding import local

SUPPORT = Path(__file__).parents[1] / "tests" / "support"
RANKS, LAYERS, DECAY = 2, 16, 0.999
Cost = dict[str, Any]


def cost_of(name: str, update: Callable[[], object], averages: list[Tensor], repeats: int) -> Cost:
    """Return the time of the slowest rank, and the memory of this one."""
    update()
    times = []
    for _ in range(repeats):
        dist.barrier()
        start = time.perf_counter()
        update()
        slowest = torch.tensor(1000 * (time.perf_counter() - start))
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        times.append(float(slowest))
    before = settled_bytes()
    return {
        "name": name,
        "update_ms": statistics.median(times),
        "average_bytes": sum(tensor.nbytes for tensor in averages),
        "more_bytes": max(0, min(peak_bytes(update) for _ in range(3)) - before),
    }


def limit(elements: int, repeats: int) -> Cost:
    flat, average = torch.randn(elements), torch.randn(elements)
    return cost_of("limit: one `lerp_` over as many elements", lambda: average.lerp_(flat, 1 - DECAY), [], repeats)


def ours(ema: Any, update: Callable[[], object], repeats: int) -> tuple[Cost, int]:
    averages = [local(tensor) for tensor in ema.average._average.shadow.averages.values()]
    return cost_of("polyak", update, averages, repeats), sum(tensor.numel() for tensor in averages)


# DeepSpeed


def deepspeed_costs(stage: int, parameters: int, repeats: int) -> list[Cost]:
    os.environ.update(DS_ACCELERATOR="cpu")
    import deepspeed
    from deepspeed_runs import begin

    from polyak.hosts.deepspeed import attach

    begin()
    width = round((parameters / LAYERS) ** 0.5)
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(LAYERS)))
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), config=config)
    ema = attach(EMA(decay=DECAY), engine)
    for _ in range(2):
        engine.backward(engine(torch.ones(2, width, dtype=torch.bfloat16)).float().square().mean())
        engine.step()
    masters = ema.loop.state.model

    def update() -> None:
        masters.follow()
        ema.loop.finish_batch()

    found, elements = ours(ema, update, repeats)
    copies = list[Tensor]()
    for parameter in engine.module.parameters():
        with gathered(parameter):
            copies.append(parameter.detach().float())

    @torch.no_grad()
    def plain() -> None:
        for parameter, average in zip(engine.module.parameters(), copies, strict=True):
            with gathered(parameter):
                average.lerp_(parameter.float(), 1 - DECAY)

    name = "a loop over `GatheredParameters`" if stage == 3 else "a loop over the 16-bit parameters"
    return [limit(elements, repeats), found, cost_of(name, plain, copies, repeats)]


@contextmanager
def gathered(parameter: Tensor) -> Iterator[None]:
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
        yield


# torchtitan


def torchtitan_costs(folder: str, repeats: int) -> list[Cost]:
    from torchtitan_run import config_of

    from polyak.hosts.torchtitan import attach

    trainer = config_of(Path(folder), "fsdp", {"name": "cost"}).build()
    ema = attach(EMA(decay=DECAY), trainer)
    ema.loop.finish_batch()
    found, elements = ours(ema, ema.loop.finish_batch, repeats)
    parameters = [p.detach() for p in trainer.model_parts[0].parameters() if p.requires_grad]
    own = [parameter.clone() for parameter in parameters]
    lerp = cost_of(
        "`torch._foreach_lerp_` over DTensors",
        lambda: torch._foreach_lerp_(own, parameters, 1 - DECAY),
        [local(average) for average in own],
        repeats,
    )
    return [limit(elements, repeats), found, lerp]


def rank_of(rank: int, meeting: str, port: int, engine: str, parameters: int, repeats: int, results: Any) -> None:
    sys.path.insert(0, str(SUPPORT))
    torch.set_num_threads(1)
    where = {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)}
    os.environ.update(where)
    if engine != "torchtitan":
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=RANKS)
        found = deepspeed_costs(int(engine[-1]), parameters, repeats)
    else:
        # torchtitan makes the group.
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
        found = torchtitan_costs(str(Path(meeting).parent), repeats)
    if rank == 0:
        results.put(found)
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--engine", choices=("deepspeed", "torchtitan"), help="one of them alone; by default both")
    parser.add_argument("--parameters", type=float, default=16, help="of DeepSpeed's model, in millions (default: 16)")
    parser.add_argument("--repeats", type=int, default=9, help="repeats of each measurement (default: 9)")
    parser.add_argument("--out", type=Path, default=RESULTS / "engines.md")
    arguments = parser.parse_args()
    began = time.perf_counter()
    os.environ.update(GIVES_BACK)
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    cells = [f"DeepSpeed, ZeRO {stage}" for stage in (1, 2, 3)] + ["torchtitan"]
    found = dict[str, list[Cost]]()
    for cell in cells:
        if arguments.engine and not cell.lower().startswith(arguments.engine):
            continue
        with tempfile.TemporaryDirectory() as folder:
            given = (
                f"{folder}/meeting",
                free_port(),
                cell,
                int(arguments.parameters * 1e6),
                arguments.repeats,
                results,
            )
            torch.multiprocessing.spawn(rank_of, given, nprocs=RANKS)
            found[cell] = results.get()
    head = ("engine", "average by", "update, ms", "the average, MiB", "more in an update, MiB")
    rows = [
        (
            cell,
            one["name"],
            f"{one['update_ms']:.1f}",
            *(f"{one[k] / 2**20:.1f}" for k in ("average_bytes", "more_bytes")),
        )
        for cell, costs in found.items()
        for one in costs
    ]
    how, wall_s = provenance("torch", "deepspeed", "torchtitan"), time.perf_counter() - began
    lines = [
        "# What an average costs each rank under DeepSpeed and torchtitan",
        "",
        *paragraph(
            f"Two gloo processes with a thread each. Under DeepSpeed {arguments.parameters:g} M parameters in bf16 "
            "with float32 masters; under torchtitan its debug model in float32, by FSDP2. Times are medians of those "
            "of the slower rank. Memory is that of rank 0: of the averages, and the peak of the process in an update "
            "above its memory before. DeepSpeed has no EMA: the loop is the one that its users write, which averages "
            "the 16-bit parameters and keeps all of them, in float32, on each rank. `torch._foreach_lerp_` is what "
            "the EMA of torchtitan's main branch calls. Measured on a CPU only, not on a GPU or between machines."
        ),
        "",
        *table(head, rows),
        "",
        *measured(how, wall_s),
    ]
    write(arguments.out, lines, {"results": found, "how": how, "wall_s": round(wall_s, 1)})


if __name__ == "__main__":
    main()

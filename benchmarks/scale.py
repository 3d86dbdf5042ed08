"""A model of the cost of averaging at scale: bytes, times and files for 1 B to 1 T parameters on 8 to 16,384 devices.

    python benchmarks/scale.py [--measure] [--write]

Prints the tables of docs/scale.md. ``--measure`` first measures the costs that no other benchmark has; ``--write``
writes the tables and the figure. A record is simulated segment by segment; the rest is arithmetic.
"""

import argparse
import json
import math
import os
import pickle
import re
import tempfile
import time
import tracemalloc
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from results_io import RESULTS, item, provenance, table
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from polyak.record import Edge, Writer
from polyak.record.writer import due
from polyak.report.figures import AVERAGED, GREY, INK, RAW, RULE, STYLE, render
from polyak.sharding import agreement
from polyak.storage.atomic import replacing
from polyak.storage.safetensors import TensorInfo
from polyak.time import Timestamp

DOCS = Path(__file__).parents[1] / "docs"
PAGE, PICTURE, MEASURED = DOCS / "scale.md", DOCS / "images" / "scale.png", RESULTS / "scale.json"
DEVICES = (8, 64, 512, 4096, 16_384)
# What a Recorder writes by default: segments of T/1024 in float16.
STRETCHES, PER_LEVEL, RECORDED_BYTES = 1024, 4, 2
FLOAT, MIXED, HALF = "float32", "bfloat16 model, float32 average", "bfloat16"
LARGE = ("GPT-2", "ResNet-50", "one of 50 M")  # the time is that of the bytes


@dataclass(frozen=True)
class Decoder:
    """The shapes of a transformer like Llama."""

    name: str
    layers: int
    width: int
    key_width: int
    feed_forward: int
    tied: bool = False
    vocabulary: int = 128_256
    tensor_parallel: int = 1
    stages: int = 1

    @cached_property
    def shapes(self) -> list[tuple[int, ...]]:
        square, keys = (self.width, self.width), (self.key_width, self.width)
        up, down = (self.feed_forward, self.width), (self.width, self.feed_forward)
        layer = [square, keys, keys, square, up, up, down, (self.width,), (self.width,)]
        embedding = (self.vocabulary, self.width)
        return [embedding, *layer * self.layers, (self.width,), *([] if self.tied else [embedding])]

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    def fullest_shard(self, shards: int) -> int:
        """Return the elements of rank 0, which has the most: each tensor is split by rows, as FSDP2 does."""
        return sum(-(-shape[0] // shards) * math.prod(shape[1:]) for shape in self.shapes)


MODELS = (
    Decoder("1 B", layers=16, width=2048, key_width=512, feed_forward=8192, tied=True),  # Llama 3.2 1B
    Decoder("70 B", layers=80, width=8192, key_width=1024, feed_forward=28_672, tensor_parallel=8),  # Llama 3 70B
    Decoder(
        "1 T", layers=136, width=24_576, key_width=1024, feed_forward=81_920, tensor_parallel=8, stages=16
    ),  # invented
)


@dataclass(frozen=True)
class Assumed:
    """Values that were not measured here; ``inputs`` names their sources."""

    flops: float = 989e12
    utilisation: float = 0.40
    memory: float = 80e9
    copy: float = 3.35e12 * 4.3 / 4.8  # bytes/s, reads plus writes
    pcie: float = 64e9
    link: float = 50e9
    shared: float = 100e9
    operations: float = 24_000  # metadata operations of a file system per second
    hop_s: float = 20e-6
    launch_s: float = 10e-6
    scratch: int = 131_072  # elements that a swap exchanges at a time
    group: int = 512  # devices that share one copy of the model
    tokens: int = 2**24  # per step
    run_tokens: float = 15e12
    state: int = 16  # bytes per parameter: weights 4, gradients 4, Adam 8
    saved: int = 12  # of these, in a checkpoint


def moved(pair: str) -> tuple[int, int, int]:
    """Return the bytes per parameter that an update, a swap and a restore read and write."""
    # In place, both are read and written. Otherwise the model's weights are backed up (2 + 2), then overwritten (4 +
    # 2).
    return {FLOAT: (12, 16, 16), MIXED: (10, 10, 4), HALF: (6, 8, 8)}[pair]


@dataclass(frozen=True)
class Measured:
    """Values that were measured on a CPU, from the results of the benchmarks."""

    limit: float  # bytes/s of an update in place
    update: dict[str, float]  # its time relative to that of as many bytes at the limit, by dtypes
    lend: dict[str, float]
    back: dict[str, float]
    write_s: float  # per byte of a segment: cast, hash and write by one thread, without waiting for the disk
    merge_s: float  # per byte of the merged file
    plan_bytes: float  # of DCP, per shard of a tensor
    plan_memory: float  # of its objects on rank 0
    metadata_bytes: float
    plan_s: float  # time of rank 0 until the metadata is written

    @classmethod
    def load(cls) -> "Measured":
        updates, loans, own = (
            json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
            for name in ("update_time", "loan_time", "scale")
        )
        gpt2 = {one["pair"]: one for one in updates["results"] if one["case"] == "GPT-2"}
        elements = gpt2[FLOAT]["elements"]
        limit = 12 * elements / (gpt2[FLOAT]["median_ms"]["the limit"] / 1000)
        ours = {one["pair"]: one for one in loans["results"] if (one["case"], one["name"]) == ("GPT-2", "polyak")}

        def over(pair: str, key: str, which: int) -> float:
            return ours[pair][key] / 1000 * limit / (moved(pair)[which] * elements)

        return cls(
            limit,
            {
                pair: max(
                    one["over_limit"] for one in updates["results"] if one["case"] in LARGE and one["pair"] == pair
                )
                for pair in gpt2
            },
            {pair: over(pair, "lend_ms", 1) for pair in gpt2},
            {pair: over(pair, "back_ms", 2) for pair in gpt2},
            **own["costs"],
        )


@dataclass(frozen=True)
class Deployment:
    """A model on devices: each group of at most ``Assumed.group`` shares one copy, by TP, PP and FSDP together."""

    model: Decoder
    devices: int
    assumed: Assumed
    measured: Measured

    @property
    def shards(self) -> int:
        return min(self.devices, self.assumed.group)

    @cached_property
    def shard(self) -> int:
        return self.model.fullest_shard(self.shards)

    @property
    def data_parallel(self) -> int:
        """Return how many ranks see other data than the rest: all, divided by those of TP and PP."""
        return max(1, self.devices // (self.model.tensor_parallel * self.model.stages))

    @property
    def tokens_per_rank(self) -> float:
        return self.assumed.tokens / self.data_parallel

    @property
    def average_bytes(self) -> int:
        return 4 * self.shard

    @property
    def state_bytes(self) -> int:
        return self.assumed.state * self.shard

    @property
    def fits(self) -> bool:
        return self.state_bytes + self.average_bytes <= self.assumed.memory

    @property
    def step_s(self) -> float:
        speed = self.devices * self.assumed.flops * self.assumed.utilisation
        return 6 * self.model.parameters * self.assumed.tokens / speed

    def update_s(self, pair: str = FLOAT) -> float:
        return self.measured.update[pair] * moved(pair)[0] * self.shard / self.assumed.copy

    @property
    def offloaded_s(self) -> float:
        """Return the time of the slower of the two: the transfer of the weights, or the update on two cores."""
        update = self.measured.update[FLOAT] * 12 * self.shard / self.measured.limit
        return max(4 * self.shard / self.assumed.pcie, update)

    def loan_s(self, pair: str = FLOAT) -> float:
        _, lend, back = moved(pair)
        ratios = self.measured.lend[pair] * lend + self.measured.back[pair] * back
        return ratios * self.shard / self.assumed.copy

    @property
    def loan_launches(self) -> int:
        """Return the number of copies that a swap in place and its restore start: three per block each."""
        return 2 * 3 * math.ceil(self.shard / self.assumed.scratch)

    @property
    def agreement_s(self) -> float:
        return 2 * math.ceil(math.log2(self.devices)) * self.assumed.hop_s

    # Checkpoints

    def plan_items(self, states: int) -> int:
        return self.devices * math.ceil(len(self.model.shapes) / self.model.stages) * states

    # Records: one replica writes, and each of its ranks writes its shard of each segment.

    @property
    def averaged_bytes(self) -> int:
        """Return the bytes of the average on all ranks together, each element once."""
        return 4 * self.model.parameters

    @property
    def stretch_bytes(self) -> int:
        return RECORDED_BYTES * self.model.parameters

    @property
    def stretch_s(self) -> float:
        return self.assumed.run_tokens / self.assumed.tokens / STRETCHES * self.step_s

    def append_s(self, merges: int, shared: float | None = None) -> float:
        """Return the time for one segment and its merges: that of the threads or of the file system, whichever is
        slower."""
        threads = RECORDED_BYTES * self.shard * (self.measured.write_s + merges * self.measured.merge_s)
        transfer = self.stretch_bytes * (1 + 3 * merges) / (shared or self.assumed.shared)
        return max(threads, transfer) + file_operations(self.shards, merges) / self.assumed.operations

    def waiting(self, run_s: float, shared: float | None = None) -> float:
        """Return the fraction of a run's time in which training waits for the record."""
        interval_s = run_s / STRETCHES
        waited_s = waits(interval_s, [self.append_s(one.merges, shared) for one in ageing(STRETCHES, PER_LEVEL)])
        return waited_s / (run_s + waited_s)


@dataclass(frozen=True)
class Append:
    merges: int
    kept: int


def ageing(stretches: int, per_level: int | None) -> Iterator[Append]:
    """Append segments by the writer's rule; yield the merges of each and the files that remain."""
    levels: list[int] = []
    for _ in range(stretches):
        levels.append(0)
        level = 0
        while (oldest := due(levels, level, per_level)) is not None:
            levels[oldest : oldest + 2] = [level + 1]
            level += 1
        yield Append(level, len(levels))


def waits(interval_s: float, appends_s: Sequence[float]) -> float:
    """Return the total time that training waits for a recorder's thread.

    The recorder passes a segment to the thread only when the previous one is written, so that no queue forms: training
    waits for as long as an append exceeds the next segment. The wait for the last append, at the end of the run, is not
    counted.
    """
    return sum(max(0.0, append_s - interval_s) for append_s in appends_s[:-1])


def file_operations(writers: int, merges: int) -> int:
    """Return the number of files created, opened and deleted for a segment, with one file per writer and one of
    metadata."""
    return (writers + 1) * ((1 + merges) + 2 * merges + 2 * merges)


# Measurements that no other benchmark has


def measure_writer(elements: int = 16_000_000) -> dict[str, float]:
    """Measure the processor time of appends without a merge and with one; a merge costs the difference.

    The wait for the disk is not included: the speed of the file system is a separate assumption.
    """
    tensors = {"weight": TensorInfo(torch.float32, (elements,), averaged=True)}
    values = {"weight": torch.randn(elements, generator=torch.Generator().manual_seed(0))}
    edges = [Edge(n, Timestamp().to_next_batch(steps=n)) for n in range(16)]
    times: dict[int, list[float]] = {0: [], 1: []}
    with tempfile.TemporaryDirectory() as folder, Writer(Path(folder) / "record", tensors) as writer:
        for one, (start, end) in zip(ageing(15, PER_LEVEL), pairwise(edges), strict=True):
            began = time.process_time()
            writer.append(values, start, end)
            times[one.merges].append(time.process_time() - began)
    plain, merging = (min(times[merges]) / (4 * elements) for merges in (0, 1))
    return {"write_s": plain, "merge_s": merging - plain}


def plan_of(rank: int, ranks: int, tensors: int) -> SavePlan:
    """Return the plan that a rank sends to DCP's coordinator: one shard of each tensor."""
    rows, columns = 4, 4096
    items = []
    for layer in range(tensors):
        name = f"model.layers.{layer}.feed_forward.w1.weight"
        offsets = torch.Size([rank * rows, 0])
        chunk = ChunkStorageMetadata(offsets, torch.Size([rows, columns]))
        properties = TensorProperties(dtype=torch.float32)
        data = TensorWriteData(chunk, properties, torch.Size([ranks * rows, columns]))
        items.append(WriteItem(MetadataIndex(name, offsets), WriteItemType.SHARD, tensor_data=data))
    return SavePlan(items, planner_data={item.index.fqn: ("model", item.index.fqn[6:]) for item in items})


def coordinate(plans: Sequence[bytes], results: Sequence[bytes]) -> tuple[list[SavePlan], Metadata, bytes]:
    """Do the work of DCP's coordinator, from the plans of the ranks to the metadata file."""
    made, metadata = DefaultSavePlanner().create_global_plan([pickle.loads(plan) for plan in plans])
    sent = [pickle.dumps(plan) for plan in made]
    assert len(sent) == len(plans)
    metadata.storage_data = {one.index: one.storage_data for result in results for one in pickle.loads(result)}
    return made, metadata, pickle.dumps(metadata)


def sent_by(ranks: int, tensors: int) -> tuple[list[bytes], list[bytes]]:
    """Return the messages of the ranks: their plans, and their results."""
    plans = [pickle.dumps(plan_of(rank, ranks, tensors)) for rank in range(ranks)]
    made, _, _ = coordinate(plans, [])
    return plans, [
        pickle.dumps([WriteResult(item.index, 4, _StorageInfo(f"__{rank}_0.distcp", 0, 4)) for item in plan.items])
        for rank, plan in enumerate(made)
    ]


def measure_plan() -> dict[str, float]:
    """Measure one process that coordinates many ranks: its time, and the memory of its Python objects."""
    items, times = 256 * 256, []
    plans, results = sent_by(256, 256)
    for _ in range(3):
        began = time.process_time()
        *_, metadata = coordinate(plans, results)
        times.append(time.process_time() - began)
    few = sent_by(64, 64)
    tracemalloc.start()
    coordinate(*few)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {
        "plan_bytes": sum(map(len, plans)) / items,
        "plan_memory": peak / (64 * 64),
        "metadata_bytes": len(metadata) / items,
        "plan_s": min(times) / items,
    }


def measure() -> None:
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    costs = measure_writer() | measure_plan()
    data = {"costs": costs, "load": load, "how": provenance("torch", "safetensors")}
    with replacing(MEASURED) as temporary:
        temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


# Tables


def _scaled(value: float, units: Sequence[tuple[float, str]], digits: int) -> str:
    for size, unit in units:
        if value < 0.9995 * size:
            continue
        shown = float(f"{value / size:.{digits}g}")
        return f"{shown:,g} {unit}"
    size, unit = units[-1]
    return f"{float(f'{value / size:.{digits}g}'):g} {unit}"


def size(value: float) -> str:
    units = [(10.0 ** (3 * power), unit) for power, unit in enumerate(("B", "kB", "MB", "GB", "TB", "PB"))]
    return _scaled(value, units[::-1], 3)


def duration(value: float) -> str:
    return _scaled(value, ((86_400, "days"), (3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms"), (1e-6, "µs")), 2)


def rate(value: float) -> str:
    return f"{size(value)}/s"


def number(value: float) -> str:
    return f"{value:,.0f}" if value < 1e6 else _scaled(value, ((1e9, "billion"), (1e6, "million")), 3)


def percent(value: float) -> str:
    return f"{100 * value:.2g} %"


def prose(head: Sequence[object], rows: Iterable[Sequence[object]]) -> list[str]:
    """Return a table of text, with all columns aligned to the left."""
    lines = table(head, rows)
    return [lines[0], lines[1].replace("---:", "---"), *lines[2:]]


def inputs(a: Assumed, m: Measured) -> list[str]:
    llama = "[Llama 3](https://arxiv.org/abs/2407.21783)"
    h100 = "[H100 SXM](https://www.nvidia.com/en-us/data-center/h100/)"
    lustre = "[Lustre at AWS](https://docs.aws.amazon.com/fsx/latest/LustreGuide/managing-metadata-performance.html)"
    by = "[{0}](../benchmarks/results/{0}.json)".format
    ratios = ", ".join(f"{m.update[pair]:.2f}" for pair in (FLOAT, MIXED, HALF))
    loans = ", ".join(f"{m.lend[pair]:.1f} and {m.back[pair]:.1f}" for pair in (FLOAT, MIXED, HALF))
    rows = [
        ("in-place limit of two CPU cores", rate(m.limit), "measured", by("update_time")),
        (f"update over the limit: {FLOAT}; {MIXED}; {HALF}", ratios, "measured", f"{by('update_time')}, large models"),
        ("swap and restore over the limit: the same dtypes", loans, "measured", f"{by('loan_time')}, GPT-2"),
        ("writing a segment, one thread, without the disk", rate(1 / m.write_s), "measured", by("scale")),
        ("merging two, the same, per byte of the result", rate(1 / m.merge_s), "measured", by("scale")),
        ("DCP's plan per shard of a tensor, sent to one rank", f"{m.plan_bytes:.0f} B", "measured", by("scale")),
        ("the same, peak memory of its objects there", size(m.plan_memory), "measured", by("scale")),
        ("the same, time of that rank", duration(m.plan_s), "measured", by("scale")),
        ("the same, in the metadata file", size(m.metadata_bytes), "measured", by("scale")),
        ("device: bf16 compute, memory", f"{a.flops / 1e12:g} TFLOP/s, {size(a.memory)}", "assumed", h100),
        ("fraction of that compute in use", percent(a.utilisation), "assumed", f"{llama}: 38 to 43 %"),
        (
            "device: copying, bytes read and written",
            rate(a.copy),
            "assumed",
            "an H200 copies at 4.3 of its 4.8 TB/s; the same fraction of 3.35",
        ),
        ("to CPU memory, one way", rate(a.pcie), "assumed", "PCIe 5.0 x16"),
        ("network, per device", rate(a.link), "assumed", f"{llama}: 400 Gb/s"),
        ("shared file system", rate(a.shared), "assumed", f"a twentieth of {llama}'s 2 TB/s"),
        (
            "its file creations, openings and deletions",
            f"{a.operations:,.0f}/s",
            "assumed",
            f"{lustre} sells 1,500 to 192,000",
        ),
        ("a hop of an `all_reduce` of some bytes", duration(a.hop_s), "assumed", "a conservative guess"),
        ("starting a copy on a device", duration(a.launch_s), "assumed", "a guess, including Python"),
        ("one step, one run", f"{a.tokens:,} tokens, {a.run_tokens / 1e12:g} T tokens", "assumed", llama),
        (
            "training state in memory, and saved",
            f"{a.state}, {a.saved} bytes per parameter",
            "assumed",
            "float32, Adam",
        ),
        (
            "devices that share one copy of the model",
            f"at most {a.group}",
            "assumed",
            "by TP, PP and FSDP; replicated beyond",
        ),
    ]
    machines = [line for name in ("update_time", "loan_time", "scale") for line in item(machine(name))]
    return [*prose(("input", "value", "kind", "source"), rows), "", *machines]


def machine(name: str) -> str:
    found = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    busy = f"; processor time, because the load was {found['load']:.1f}; rough" if "load" in found else ""
    return f"`{found['how']['command']}`: {found['how']['hardware']}{busy}"


def byte_counts() -> list[str]:
    memory = {FLOAT: (4, 0), MIXED: (4, 2), HALF: (2, 0)}
    rows = [(pair, memory[pair][0], *moved(pair), memory[pair][1]) for pair in (FLOAT, MIXED, HALF)]
    head = ("bytes per parameter", "average", "update", "swap", "restore", "backup of a swap")
    return table(head, rows)


def deployments(a: Assumed, m: Measured) -> list[Deployment]:
    return [Deployment(model, devices, a, m) for model in MODELS for devices in DEVICES]


def training(of: Sequence[Deployment]) -> list[str]:
    rows = []
    for d in of:
        times = (
            (
                duration(d.step_s),
                duration(d.update_s()),
                percent(d.update_s() / d.step_s),
                duration(d.offloaded_s),
                duration(d.loan_s()),
                duration(d.agreement_s),
            )
            if d.fits
            else ("does not fit", *[""] * 5)
        )
        cut = f"{d.shards} x {d.devices // d.shards}"
        within = f"{d.model.tensor_parallel} x {d.model.stages}, {round(d.tokens_per_rank):,}"
        rows.append((d.model.name, f"{d.devices:,}", cut, within, size(d.state_bytes), size(d.average_bytes), *times))
    head = ("model", "devices", "shards x replicas", "TP x PP, tokens per data-parallel rank")
    head += ("training state per rank", "average per rank", "step", "update")
    return table((*head, "of a step", "offloaded", "swap and restore", "agreement"), rows)


def checkpoints(of: Sequence[Deployment]) -> list[str]:
    rows = []
    for d in of:
        if not d.fits:
            continue
        before, after = d.plan_items(3), d.plan_items(4)
        rows.append(
            (
                d.model.name,
                f"{d.devices:,}",
                size(d.assumed.saved * d.model.parameters),
                size(d.averaged_bytes),
                duration(d.averaged_bytes / d.assumed.shared),
                f"{d.devices + 1:,}",
                f"{number(before)}, {number(after)}",
                f"{size(before * d.measured.plan_bytes)}, {size(after * d.measured.plan_bytes)}",
                f"{duration(before * d.measured.plan_s)}, {duration(after * d.measured.plan_s)}",
            )
        )
    head = ("model", "devices", "without average", "average adds", "in", "files", "shards to plan: without, with")
    return table((*head, "sent to rank 0", "time of rank 0"), rows)


def records(of: Sequence[Deployment]) -> list[str]:
    appends = list(ageing(STRETCHES, PER_LEVEL))
    most, worst = max(one.kept for one in appends), max(one.merges for one in appends)
    written = len(appends) + sum(one.merges for one in appends)
    rows = []
    for d in of:
        if not d.fits:
            continue
        rows.append(
            (
                d.model.name,
                f"{d.devices:,}",
                size(RECORDED_BYTES * d.shard),
                size(most * d.stretch_bytes),
                f"{most * (d.shards + 1):,}",
                number(written * (d.shards + 1)),
                duration(d.stretch_s),
                rate(written / STRETCHES * d.stretch_bytes / d.stretch_s),
                duration(d.append_s(worst)),
                duration(STRETCHES * d.append_s(worst)),
            )
        )
    head = ("model", "devices", "local shard", "on disk, at most", "in files", "files written in the run")
    tail = ("length of a segment", "mean write rate", "longest append", "shortest run without waiting")
    return table((*head, *tail), rows)


def breaks(a: Assumed, m: Measured) -> list[str]:
    """Return the limits, the first to be reached first."""
    small, middle, large = MODELS
    small_all, middle_group, large_all = (
        Deployment(model, devices, a, m)
        for model, devices in ((small, DEVICES[-1]), (middle, a.group), (large, DEVICES[-1]))
    )
    appends, devices, stretch = list(ageing(STRETCHES, PER_LEVEL)), DEVICES[-1], large_all.stretch_bytes
    most, last = max(one.kept for one in appends), appends[-1].kept
    worst = max(one.merges for one in appends)
    within = max(one.kept + 2 * one.merges for one in appends)
    fewer = max(one.kept for one in ageing(STRETCHES, 2))
    plan, replica = large_all.plan_items(4), a.group * math.ceil(len(large.shapes) / large.stages) * 4
    threads_s = RECORDED_BYTES * large_all.shard * (m.write_s + worst * m.merge_s)
    reading_s = last * stretch / (m.limit / 9)  # of 18 bytes, 2 are read from disk and 16 are the sum in float64
    rows = [
        (
            "DCP plans a save on one rank",
            f"1 T on {devices:,}: {number(plan)} shards, {size(plan * m.plan_bytes)} sent to rank 0 (with NCCL to its "
            f"device), {size(plan * m.plan_memory)} of objects, {duration(plan * m.plan_s)}. 70 B on {a.group}: "
            f"{duration(middle_group.plan_items(4) * m.plan_s)}. A quarter of this is for the average",
            "a gloo group for DCP; `enable_plan_caching`, which plans the first save only; one replica that plans and "
            f"saves: {number(replica)} shards, {duration(replica * m.plan_s)}",
        ),
        (
            "every rank reads all of DCP's metadata to load",
            f"1 T in {a.group} shards: {size(replica * m.metadata_bytes)}, on {devices:,} ranks "
            f"{size(replica * m.metadata_bytes * devices)}, unpickled on each",
            "read once per node and broadcast (a custom storage reader); the layout of a record once, in its manifest",
        ),
        (
            "a record that plans each segment",
            f"1 T on {devices:,}: {number(large_all.plan_items(1))} shards, {STRETCHES} times",
            f"the layout never changes: plan once, then send a size and a hash per rank, {size(100 * a.group)} per "
            "segment",
        ),
        (
            "short segments of a record",
            f"1 T: training waits in runs below {duration(STRETCHES * large_all.append_s(worst))}; 70 B on {a.group}: "
            f"below {duration(STRETCHES * middle_group.append_s(worst))}",
            "a longer interval; a faster disk, up to "
            f"{rate(stretch * (1 + 3 * worst) / threads_s)} for 1 T; beyond that, more threads for merging",
        ),
        (
            "the files of a record to which every rank writes",
            f"{devices:,} ranks: {most * (devices + 1):,} files, "
            f"{duration(file_operations(devices, worst) / a.operations)} of metadata operations in the longest "
            f"append; 1 B: {size(small_all.stretch_bytes / devices)} each",
            f"one replica writes, as in the table above: {most * (a.group + 1):,}; then one rank per node",
        ),
        (
            "the size of a record",
            f"1 T: {size(most * stretch)}, {size(within * stretch)} during a merge",
            f"`per_level=2`: {fewer} segments instead of {most}",
        ),
        (
            "reading a record on one machine",
            f"1 T: {size(last * stretch)}, {duration(reading_s)} at the limit of two CPU cores",
            f"each of 64 ranks reads its shards, by `Record.average_into`: {duration(reading_s / 64)}; several "
            "profiles in one pass",
        ),
        (
            "DDP: the full average on every rank",
            f"1 B: {size(4 * small.parameters)}; 70 B: {size(4 * middle.parameters)}. "
            f"{number(a.memory / (a.state + 4))} parameters fit in {size(a.memory)}, without activations",
            f"sharded over the ranks: {number(a.memory / a.state)} fit; gathered for a swap, 1 B in "
            f"{duration(4 * small.parameters / a.link)}. Beyond that, the model must be sharded",
        ),
        (
            f"a swap that starts three copies per {a.scratch:,} elements",
            f"1 T on {a.group}: {large_all.loan_launches:,} copies for swap and restore, "
            f"{duration(large_all.loan_launches * a.launch_s)}, where the memory needs {duration(large_all.loan_s())}",
            f"a scratch buffer of {2**24:,} elements on a device: {6 * math.ceil(large_all.shard / 2**24):,} copies; "
            "or one kernel",
        ),
        (
            "the backup of swaps between dtypes",
            f"2 bytes per parameter: 1 T on {a.group} {size(2 * large_all.shard)} per rank, 1 B under DDP "
            f"{size(2 * small.parameters)}",
            "an average in the model's dtype; or float32 shards with bfloat16 compute (FSDP2's mixed precision)",
        ),
        (
            "more ranks than a tensor has rows",
            f"70 B split over all {devices:,}: the fullest rank has "
            f"{middle.fullest_shard(devices) * devices / middle.parameters:.1f} times its share",
            f"groups of {a.group} (HSDP): {middle_group.shard * a.group / middle.parameters:.2f} times",
        ),
        (
            "agreement of the ranks",
            f"no limit: one `all_reduce` on {devices:,} takes {duration(large_all.agreement_s)}",
            f"through a store in one process, at 50 µs per rank (assumed), it would take {duration(devices * 50e-6)}",
        ),
        (
            "a failed agreement of the ranks",
            f"{devices:,} ranks send at most {agreement.MOST_FACTS} facts each to rank 0: "
            f"{size(devices * fact_bytes())}",
            f"rank 0 alone shows ranges of ranks, at most {agreement.MOST_FACTS} lines; another `all_reduce` of "
            f"{size(2 * agreement.digests({}).nbytes)} finds which facts to send",
        ),
    ]
    return prose(("what", "limit", "remedy"), rows)


def fact_bytes() -> int:
    """Return how many bytes a rank sends of facts that differ, of the longest that are sent."""
    names = [f"layers.{i}.feed_forward.down_proj.weight" for i in range(agreement.MOST_FACTS)]
    facts = {("tensors", name): "x" * 1000 for name in names}
    return len(pickle.dumps(agreement.in_buckets(facts, range(agreement.digests(facts).numel()))))


def blocks(a: Assumed, m: Measured) -> dict[str, list[str]]:
    """Return the tables of the page by the names of their markers."""
    of = deployments(a, m)
    return {
        "inputs": inputs(a, m),
        "bytes": byte_counts(),
        "training": training(of),
        "checkpoints": checkpoints(of),
        "records": records(of),
        "breaks": breaks(a, m),
    }


def put(page: str, found: dict[str, list[str]]) -> str:
    """Return the page with the tables between their markers."""
    for name, lines in found.items():
        between = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        page, times = between.subn(lambda match, lines=lines: "\n".join([match[1].rstrip(), *lines, match[2]]), page)
        if times != 1:
            raise SystemExit(f"{PAGE} must have the marker <!-- {name} --> once (found {times})")
    return page


def picture(a: Assumed, m: Measured) -> Figure:
    hours = [10 ** (n / 40) for n in range(-28, 112)]
    speeds = ((10e9, RAW), (100e9, AVERAGED), (1e12, INK))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.9))
        sides = {"left": 0.06, "right": 0.98, "top": 0.76, "bottom": 0.14, "wspace": 0.08}
        panels = figure.subplots(1, 2, sharey=True, gridspec_kw=sides)
        figure.text(0.02, 0.945, "When training waits for the record", fontsize=15.5, fontweight="bold", va="center")
        subtitle = (
            f"Fraction of the time. {STRETCHES} segments in a run, written by {a.group} ranks to a shared file system"
        )
        figure.text(0.02, 0.875, subtitle, fontsize=9.5, color=GREY, va="center")
        for axes, model in zip(panels, MODELS[1:], strict=True):
            deployment = Deployment(model, a.group, a, m)
            for shared, colour in speeds:
                shares = [deployment.waiting(3600 * hour, shared) for hour in hours]
                axes.plot(hours, shares, color=colour, linewidth=2.2)
                middle = next(i for i, share in enumerate(shares) if share < 0.5)
                axes.annotate(
                    rate(shared),
                    (hours[middle], shares[middle]),
                    xytext=(6, 2),
                    textcoords="offset points",
                    color=colour,
                    fontsize=9,
                    fontweight="bold",
                )
            axes.set_title(f"{model.name} parameters", loc="left", fontsize=10.5, fontweight="bold", color=INK, pad=8)
            axes.set_xscale("log")
            axes.set_xlim(hours[0], hours[-1])
            axes.set_ylim(0, 1)
            axes.set_xlabel("hours of the run without waiting")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g}%"))
            axes.grid(axis="y", color=RULE, linewidth=0.7)
            axes.tick_params(length=0, which="both")
        return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--measure", action="store_true", help="first measure the writer's thread and DCP's plan on this machine"
    )
    parser.add_argument("--write", action="store_true", help=f"write the tables and the figure to docs/{PAGE.name}")
    arguments = parser.parse_args()
    if arguments.measure:
        measure()
    assumed, costs = Assumed(), Measured.load()
    found = blocks(assumed, costs)
    for name, lines in found.items():
        print(f"## {name}\n", *lines, "", sep="\n")
    if arguments.write:
        page = put(PAGE.read_text(encoding="utf-8"), found)
        with replacing(PAGE) as temporary:
            temporary.write_text(page, encoding="utf-8")
        with replacing(PICTURE) as temporary:
            temporary.write_bytes(render(picture(assumed, costs), "png"))


if __name__ == "__main__":
    main()

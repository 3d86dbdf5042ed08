"""What a record takes on disk, and how exact its averages are, by interval, ``per_level`` and dtype.

    python benchmarks/record_sizes.py [--steps 4000] [--out benchmarks/results/record_sizes.md]

A small network trains on MNIST-1D, and its weights after every step are kept: the truth. Then each record receives the
same weights. Sizes are in models of float32, at their peak; errors in % of |last weights - true average|.
"""

import argparse
import math
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from mnist1d_data import splits
from posthoc_accuracy import Run, adam, combine, each_step, network, sgd, train
from results_io import RESULTS, measured, paragraph, provenance, table, write

from polyak.profiles import HalfLife
from polyak.record import Edge, Record, Writer
from polyak.storage.safetensors import TensorInfo
from polyak.time import Time, Timestamp, TimeUnit

RUNS = (Run("Adam", adam), Run("SGD", sgd), Run("Adam, cosine decay", adam, cosine=True))
SHARES = (512, 256, 128, 64, 32, 16, 8, 4, 2)
# Segments in the run, per_level, and dtype: first what was the default, then the default.
STORES = (
    ("T/512, 4, float32", 512, 4, torch.float32),
    ("**T/1024, 4, float16**", 1024, 4, torch.float16),
    ("T/1024, 4, float32", 1024, 4, torch.float32),
    ("T/1024, 8, float16", 1024, 8, torch.float16),
    ("T/1024, 4, bfloat16", 1024, 4, torch.bfloat16),
)


def keep(
    folder: Path, weights: np.ndarray, segments: int, per_level: int, dtype: torch.dtype
) -> tuple[Record, float, float]:
    """Write a record; return it, its size at the peak, and the share of what it holds that is in float32."""
    shapes = {name: p.shape for name, p in network().named_parameters()}
    tensors = {name: TensorInfo(dtype, tuple(shape), averaged=True) for name, shape in shapes.items()}
    steps, peak, numbers = len(weights), 0, weights.shape[1]
    interval = steps / segments
    edges = [0, *(n for n in range(1, steps + 1) if int(n / interval) > int((n - 1) / interval))]
    edges += [] if edges[-1] == steps else [steps]
    with Writer(folder, tensors, per_level=per_level, max_duration=Time(steps, TimeUnit.BATCH)) as writer:
        for start, end in pairwise(Edge(n, Timestamp().to_next_batch(steps=n)) for n in edges):
            mean = torch.from_numpy(weights[start.updates : end.updates].mean(axis=0, dtype=np.float64)).float()
            parts = mean.split([math.prod(shape) for shape in shapes.values()])
            writer.append({n: p.view(shapes[n]) for n, p in zip(shapes, parts, strict=True)}, start, end)
            peak = max(peak, sum(segment.size_bytes for segment in writer.segments))
    record, wide = Record(folder), 0
    for segment in record.segments:
        with record.open(segment) as file:
            wide += sum(math.prod(i.shape) for n, i in record.tensors.items() if file.dtype(n) == torch.float32)
    return record, peak / (4 * numbers), wide / (numbers * len(record.segments))


def errors(record: Record, truth: dict[int, np.ndarray], last: np.ndarray) -> dict[int, float]:
    """Return the error of each average in %."""
    found = {}
    for share, true in truth.items():
        average = record.average(HalfLife(f"{len_of(record) / share}ba", unbiased=True), dtype=torch.float64)
        vector = np.concatenate([average[name].numpy().ravel() for name, _ in network().named_parameters()])
        found[share] = 100 * float(np.linalg.norm(vector - true) / np.linalg.norm(last - true))
    return found


def len_of(record: Record) -> int:
    return record.segments[-1].end.updates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--runs", type=int, default=len(RUNS), help="how many of the runs")
    parser.add_argument("--stores", type=int, default=len(STORES), help="how many of the stores")
    parser.add_argument("--out", type=Path, default=RESULTS / "record_sizes.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    (training,) = splits(4000)
    rows = []
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as temporary:
        for i, run in enumerate(RUNS[: arguments.runs]):
            weights = train(run, training, arguments.steps, Path(temporary) / f"{i}.npy", lambda _: None)
            steps, last = len(weights), weights[-1].astype(np.float64)
            counts = [each_step(HalfLife(f"{steps / k}ba", unbiased=True), steps, steps) for k in SHARES]
            truth = dict(zip(SHARES, combine(np.stack(counts), weights), strict=True))
            for j, (name, *how) in enumerate(STORES[: arguments.stores]):
                wanted = truth if how[0] > 512 else {k: t for k, t in truth.items() if k < 512}
                record, peak, wide = keep(Path(temporary) / f"{i}-{j}", weights, *how)
                found = errors(record, wanted, last)
                worst = max(error for share, error in found.items() if share <= 256)
                at_512 = f"{found[512]:.2f}" if 512 in found else "refused"
                rows.append([run.name, name, f"{peak:.1f}", f"{worst:.2f}", at_512, f"{100 * wide:.0f} %"])
    heads = ["run", "interval, per_level, dtype", "models", "worst, T/256 to T/2", "T/512", "kept in float32"]
    about = (
        f"{arguments.steps:,} steps; sizes at the peak in models of float32, without the raw weights at the end of the "
        "run, which take one more. Errors in % of |last weights - true average|."
    )
    lines = ["# Size and error of a record", "", *paragraph(about), "", *table(heads, rows), ""]
    write(arguments.out, [*lines, *measured(provenance())])


if __name__ == "__main__":
    main()

"""What writing a segment of a record costs, merges included, by the dtype of the record: processor time and bytes.

    python benchmarks/record_writing.py [--segments 32] [--out benchmarks/results/record_writing.md]

The weights are those of the GPT of recording_cost.py, and move as in a random walk. A recorder writes on a background
thread, which training waits for only if a segment ends before the one before is on disk.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from recording_cost import GPT
from results_io import RESULTS, measured, paragraph, provenance, table, write

from polyak import HalfLife, Record
from polyak.record import Edge, Writer
from polyak.storage.safetensors import TensorInfo
from polyak.time import Timestamp

DTYPES = {"float32": torch.float32, "float16": None, "int8": torch.int8}


def cost(dtype: torch.dtype | None, segments: int) -> tuple[float, float, int, int]:
    """Return the processor time of a segment and of an average in s, the bytes at the peak, and the parameters."""
    torch.manual_seed(0)
    model = GPT()
    means = dict(model.named_parameters())
    infos = {name: TensorInfo.of(tensor, averaged=True, dtype=dtype) for name, tensor in means.items()}
    peak, taken = 0, 0.0
    with tempfile.TemporaryDirectory() as folder, Writer(folder, infos) as writer:
        edges = [Edge(n, Timestamp().to_next_batch(steps=n)) for n in range(segments + 1)]
        for start, end in zip(edges, edges[1:], strict=False):
            with torch.no_grad():
                for tensor in means.values():
                    tensor.add_(1e-3 * torch.randn_like(tensor))
            began = time.process_time()
            writer.append(means, start, end)
            taken += time.process_time() - began
            peak = max(peak, sum(segment.size_bytes for segment in writer.segments))
        began = time.process_time()
        Record(folder).average(HalfLife(f"{segments // 4}ba", unbiased=True))
        read = time.process_time() - began
    return taken / segments, read, peak, sum(tensor.numel() for tensor in means.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--segments", type=int, default=32)
    parser.add_argument("--out", type=Path, default=RESULTS / "record_writing.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began, rows, parameters = time.perf_counter(), [], 0
    for name, dtype in DTYPES.items():
        seconds, read, peak, parameters = cost(dtype, arguments.segments)
        rows.append([name, f"{seconds:.2f}", f"{read:.2f}", f"{peak / 4 / parameters:.1f}"])
    about = (
        f"Processor time to write a segment of {parameters:,} parameters, merges included: the mean over "
        f"{arguments.segments} segments of weights that move as in a random walk; and to read an average, with its "
        "error. Sizes at the peak, in models of float32."
    )
    lines = ["# What writing a record costs", "", *paragraph(about), ""]
    lines += [*table(("dtype", "writing a segment, s", "an average, s", "models"), rows), ""]
    write(arguments.out, [*lines, *measured(provenance("torch"), time.perf_counter() - began)])


if __name__ == "__main__":
    main()

"""The time and memory of reading averages from a record: one, and many in a pass, and reading its files only.

    python benchmarks/record_reading.py [--millions 4] [--files 30] [--out benchmarks/results/record_reading.md]

The files are in the page cache. Time is that of the processor: other processes do not lengthen it, and a disk does not.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from process_memory import alone, peak_bytes, settled_bytes
from results_io import RESULTS, measured, paragraph, progress, provenance, table, write
from update_time import gpt2

from polyak import HalfLife, Record
from polyak.record import Edge, Writer
from polyak.storage.safetensors import TensorInfo
from polyak.time import Timestamp

FILES = "reading the files"
PROFILES = (1, 8, 32)
BOUND = 8  # averages at a time, in the row with a bound on memory


def write_record(folder: Path, millions: float, files: int) -> int:
    """Write a record whose older segments are longer; return the bytes of its files."""
    scale = (millions / 124.4) ** 0.5
    shapes = {f"layer{i}": tuple(max(1, round(n * scale)) for n in shape) for i, shape in enumerate(gpt2())}
    infos = {name: TensorInfo(torch.float16, shape, averaged=True) for name, shape in shapes.items()}
    now, start = Timestamp(), Edge(0, Timestamp())
    with Writer(folder, infos, per_level=None) as writer, progress() as bar:
        task = bar.add_task("writing", total=files)
        for i in range(files):
            length = 2 ** ((files - 1 - i) // 5)
            for _ in range(length):
                now = now.to_next_batch()
            end = Edge(start.updates + length, now)
            writer.append({name: torch.randn(shape) for name, shape in shapes.items()}, start, end)
            start = end
            bar.advance(task)
        return sum(stretch.size_bytes for stretch in writer.stretches)


def read_files(paths: list[Path]) -> None:
    buffer = bytearray(1 << 24)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def averages(record: Record, count: int, max_bytes: float) -> None:
    """Compute averages, and release each before the next pass."""
    steps = record.segments[-1].end.updates
    profiles = [HalfLife(f"{steps * 2 ** (-1 - 5 * i / 31)}ba", unbiased=True) for i in range(count)]
    for _ in record.averages(profiles, max_bytes=max_bytes):
        pass


def memory(folder: str, count: int, max_bytes: float) -> None:
    """Print the peak memory of reading averages in this process."""
    record = Record(folder)
    before = settled_bytes()
    print(json.dumps({"peak_bytes": peak_bytes(lambda: averages(record, count, max_bytes)) - before}))


def seconds(run: Callable[[], object]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--millions", type=float, default=4, help="the parameters of the model, in millions (default: 4)"
    )
    parser.add_argument("--files", type=int, default=30, help="the number of files in the record (default: 30)")
    parser.add_argument("--repeats", type=int, default=5, help="repeats of each measurement (default: 5)")
    parser.add_argument("--out", type=Path, default=RESULTS / "record_reading.md")
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)  # a folder, how many averages, and max_bytes
    arguments = parser.parse_args()
    if arguments.memory:
        return memory(arguments.memory[0], int(arguments.memory[1]), float(arguments.memory[2]))
    began = time.perf_counter()
    rows: list[tuple] = []
    results: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        size = write_record(Path(folder), arguments.millions, arguments.files)
        record = Record(folder)
        paths = [Path(folder) / segment.file for segment in record.segments]
        one_bytes = 2 * size / arguments.files  # an average is in float32
        bounded = BOUND * one_bytes * 1.01
        runs = {f"{count} average{'s' if count > 1 else ''}": (count, 1e12) for count in PROFILES}
        runs |= {f"{PROFILES[-1]} averages, {BOUND} at a time": (PROFILES[-1], bounded)}
        base_s = median_s(lambda: read_files(paths), arguments.repeats)
        rows.append((FILES, f"{base_s:.2f}", "1.0", ""))
        for name, (count, most) in runs.items():
            took_s = median_s(lambda: averages(Record(folder), count, most), arguments.repeats)  # noqa: B023
            peak = alone("--memory", folder, str(count), str(most))["peak_bytes"]
            rows.append(
                (name, f"{took_s:.2f}", f"{took_s / base_s:.1f}", f"{peak / 1e6:.0f} ({peak / one_bytes:.1f} averages)")
            )
            results.append({"name": name, "median_s": took_s, "peak_bytes": peak})
    how = provenance("torch")
    lines = [
        "# Reading averages from a record",
        "",
        *paragraph(
            f"`Record.averages` over {arguments.files} float16 files of {size / arguments.files / 1e6:.0f} MB, "
            f"{size / 1e9:.2f} GB in total; the averages are in float32, {one_bytes / 1e6:.0f} MB each. Compared with "
            f"reading the files into a buffer, by one thread. Medians of {arguments.repeats}, of a record that is "
            "opened again each time, error estimates included. Processor time; the files are in the page cache. "
            "Memory is the peak of a process of its own above what it needs before. On a CPU."
        ),
        "",
        *table(("what", "s", "over reading the files", "peak memory, MB"), rows),
        "",
        *measured(how, time.perf_counter() - began),
    ]
    write(arguments.out, lines, {"results": results, "bytes": size, "how": how})
    return None


def median_s(run: Callable[[], object], repeats: int) -> float:
    return statistics.median(seconds(run) for _ in range(repeats))


if __name__ == "__main__":
    main()

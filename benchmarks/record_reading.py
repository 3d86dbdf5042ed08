"""The speed of reading an average from a record, compared with reading its files only.

    python benchmarks/record_reading.py [--millions 20] [--files 30] [--out benchmarks/results/record_reading.md]

Cold files are dropped from the page cache, as far as the system complies (Linux only).
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from results_io import RESULTS, measured, paragraph, progress, provenance, table, write
from update_time import gpt2

from polyak import HalfLife, Record
from polyak.record import Edge, Writer
from polyak.storage.safetensors import TensorInfo
from polyak.time import Timestamp

FILES, MEAN = "reading the files", "polyak"


def write_record(folder: Path, millions: float, files: int) -> int:
    """Write a record whose older segments are longer; return the bytes of its files."""
    scale = (millions / 124.4) ** 0.5
    shapes = {f"layer{i}": tuple(max(1, round(n * scale)) for n in shape) for i, shape in enumerate(gpt2())}
    infos = {name: TensorInfo(torch.float32, shape, averaged=True) for name, shape in shapes.items()}
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


def forget(paths: list[Path]) -> None:
    """Drop the files from the page cache."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--millions", type=float, default=20, help="the parameters of the model, in millions (default: 20)"
    )
    parser.add_argument("--files", type=int, default=30, help="the number of files in the record (default: 30)")
    parser.add_argument("--repeats", type=int, default=5, help="repeats of each measurement (default: 5)")
    parser.add_argument("--out", type=Path, default=RESULTS / "record_reading.md")
    arguments = parser.parse_args()
    began = time.perf_counter()
    times: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        size = write_record(Path(folder), arguments.millions, arguments.files)
        record = Record(folder)
        paths = [Path(folder) / stretch.file for stretch in record.stretches]
        profile = HalfLife(f"{record.stretches[-1].end.updates // 4}ba", unbiased=True)
        first_s = seconds(lambda: record.average(profile))  # also estimates the error, which reads the record again
        runs = {FILES: lambda: read_files(paths), MEAN: lambda: record.average(profile)}
        for state in ("warm", "cold"):
            for _ in range(arguments.repeats):
                for name, run in runs.items():
                    if state == "cold":
                        forget(paths)
                    times.setdefault((state, name), []).append(seconds(run))
    medians = {key: statistics.median(found) for key, found in times.items()}
    rows = [
        (f"{name}, {state}", f"{s:.2f}", f"{size / s / 1e6:.0f}", f"{s / medians[state, FILES]:.2f}")
        for (state, name), s in medians.items()
    ]
    how = provenance("torch")
    wall_s = time.perf_counter() - began
    lines = [
        "# Reading an average from a record",
        "",
        *paragraph(
            f"`Record.average` over {arguments.files} files of {size / arguments.files / 1e6:.0f} MB, "
            f"{size / 1e9:.2f} GB in total, compared with reading them into a buffer, by one thread. "
            f"Medians of {arguments.repeats}. Warm: the files are in the page cache. The first average of a record, "
            f"which also estimates the error and therefore reads it twice, took {first_s:.2f} s. Measured on a CPU "
            "only, not on a GPU."
        ),
        "",
        *table(("what", "s", "MB/s", "over reading the files"), rows),
        "",
        *measured(how, wall_s),
    ]
    results = [{"cache": state, "name": name, "median_s": s} for (state, name), s in medians.items()]
    data = {"results": results, "bytes": size, "first_s": first_s, "how": how, "wall_s": round(wall_s, 1)}
    write(arguments.out, lines, data)


if __name__ == "__main__":
    main()

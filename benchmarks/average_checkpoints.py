"""Averages checkpoints on disk: throughput against ``cat`` of the same files, and memory, next to a plain script.

    python benchmarks/average_checkpoints.py --checkpoints 3 --gigabytes 1 --folder /tmp/bench

Each way runs in a process of its own, with the page cache dropped before it where the system allows that (--warm: not).
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

_PLAIN = """
import sys, torch
from safetensors.torch import load_file, save_file
*paths, out = sys.argv[1:]
states = [load_file(p) if p.endswith('safetensors') else torch.load(p, weights_only=True) for p in paths]
mean = {n: (sum(s[n].double() for s in states) / len(states)).to(t.dtype) for n, t in states[-1].items()}
save_file(mean, out) if out.endswith('safetensors') else torch.save(mean, out)
"""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LAYER = 4096


def _write(folder: Path, count: int, size_bytes: int, dtype: torch.dtype, suffix: str) -> list[Path]:
    """Write checkpoints with square matrices, and an embedding four times as large."""
    folder.mkdir(parents=True, exist_ok=True)
    generator, paths = torch.Generator().manual_seed(0), list[Path]()
    each = _LAYER * _LAYER * dtype.itemsize
    layers = max(1, size_bytes // each - 4)
    for i in range(count):
        state = {
            f"layers.{n}.weight": torch.randn(_LAYER, _LAYER, generator=generator, dtype=torch.float32).to(dtype)
            for n in range(layers)
        }
        state["embedding.weight"] = torch.randn(4 * _LAYER, _LAYER, generator=generator).to(dtype)
        paths.append(folder / f"step-{100 * (i + 1)}{suffix}")
        save_file(state, paths[-1]) if suffix == ".safetensors" else torch.save(state, paths[-1])
    os.sync()
    return paths


def _drop(paths: Sequence[Path]) -> bool:
    """Drop files from the page cache; return whether the system can."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    return True


def _run(command: Sequence[str], paths: Sequence[Path], *, cold: bool) -> tuple[float, float]:
    """Return seconds, and the peak of the memory that is no page of a file, in MB."""
    if cold and not _drop(paths):
        raise SystemExit("this system cannot drop the page cache: give --warm")
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, _anonymous(process.pid))
        time.sleep(0.005)
    if process.returncode:
        assert process.stderr is not None
        raise SystemExit(process.stderr.read().decode())
    return time.perf_counter() - begin, peak


def _anonymous(process: int) -> float:
    """Return the resident memory of a process in MB, with mapped files: those count for a process that maps them."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    except OSError:
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoints", type=int, default=3)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of each checkpoint")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32")
    parser.add_argument("--suffix", choices=(".safetensors", ".pt"), default=".safetensors")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warm", action="store_true", help="with the files in the page cache")
    parser.add_argument("--no-plain", action="store_true", help="without the script that loads everything")
    parser.add_argument("--folder", type=Path, required=True, help="for the files, which are deleted afterwards")
    arguments = parser.parse_args()
    dtype, suffix = _DTYPES[arguments.dtype], arguments.suffix
    made = not arguments.folder.exists()
    paths = _write(arguments.folder, arguments.checkpoints, int(arguments.gigabytes * 1e9), dtype, suffix)
    try:
        out = arguments.folder / f"out{suffix}"
        given = [str(path) for path in paths]
        ways = {
            "cat": ["cat", *given],
            "start of Python and torch": [sys.executable, "-c", "import torch, polyak.checkpoints"],
            "polyak average": [sys.executable, "-m", "polyak", "average", *given, "-o", str(out), "--force"],
            "plain script": [sys.executable, "-c", _PLAIN, *given, str(out)],
        }
        if arguments.no_plain:
            del ways["plain script"]
        size = sum(path.stat().st_size for path in paths)
        best = {name: [float("inf"), 0.0] for name in ways}
        for _ in range(arguments.repeats):
            for name, command in ways.items():
                seconds, peak = _run(command, paths, cold=not arguments.warm)
                best[name] = [min(best[name][0], seconds), max(best[name][1], peak)]
        largest = 4 * _LAYER * _LAYER * dtype.itemsize / 2**20
        print(
            f"{len(paths)} x {size / len(paths) / 1e9:.2f} GB of {arguments.dtype}, {suffix}, "
            f"{'warm' if arguments.warm else 'cold'}"
        )
        for name, (seconds, peak) in best.items():
            print(
                f"{name:34} {seconds:7.2f} s  {size / seconds / 1e9:6.2f} GB/s  "
                f"{seconds / best['cat'][0]:6.2f} x cat  {peak:8.0f} MiB"
            )
        print(f"largest tensor {largest:.0f} MiB; the limit is {3 * largest + 300:.0f} MiB")
        print(json.dumps({name: {"s": seconds, "mib": peak} for name, (seconds, peak) in best.items()}))
    finally:
        if made:
            shutil.rmtree(arguments.folder)
        else:
            for path in (*paths, out):
                path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()

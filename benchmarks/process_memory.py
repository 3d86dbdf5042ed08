"""The memory of a process, as Linux counts it, in a way that holds for any library.

Allocators keep what was freed, so that the second time nothing seems to be needed. What is measured here runs in a
process of its own, in which whatever is freed goes back at once.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

# glibc: each block of 128 KiB or more is a mapping of its own, and what is free at the end of the heap goes back.
# Python: no pools of its own.
GIVES_BACK = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(128 * 1024),
    "MALLOC_TRIM_THRESHOLD_": "0",
    "PYTHONMALLOC": "malloc",
}


def memory_bytes(field: str) -> int:
    """Return what Linux says of this process: VmRSS, what it has, or VmHWM, the most that it had."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def settled_bytes() -> int:
    """Return what this process has once all that is free is given back, also in the middle of the heap."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim:
        trim(0)
    return memory_bytes("VmRSS")


def peak_bytes(*steps: Callable[[], object]) -> int:
    """Return the most that this process has while the steps are done."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the most is counted from here
    for step in steps:
        step()
    return memory_bytes("VmHWM")


def alone(*arguments: str) -> dict[str, int]:
    """Run this program once more, with these arguments, and return what it prints last, as JSON.

    Raises:
        RuntimeError: If it fails; it says how.
    """
    command = [sys.executable, sys.argv[0], *arguments]
    done = subprocess.run(command, env=os.environ | GIVES_BACK, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{arguments} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])

"""The memory of a process, as Linux counts it, for any library.

Allocators keep freed memory, so that a second allocation seems to need none. Measurements here run in a separate
process, in which freed memory is returned to the system immediately.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

# glibc: each block of 128 KiB or more has its own mapping, and free memory at the end of the heap is returned.
# Python: no memory pools.
GIVES_BACK = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(128 * 1024),
    "MALLOC_TRIM_THRESHOLD_": "0",
    "PYTHONMALLOC": "malloc",
}


def memory_bytes(field: str) -> int:
    """Return the memory of this process: VmRSS, the current size, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def settled_bytes() -> int:
    """Return the memory of this process after all free memory is returned, also in the middle of the heap."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
    if trim:
        trim(0)
    return memory_bytes("VmRSS")


def peak_bytes(*steps: Callable[[], object]) -> int:
    """Return the peak memory of this process during the steps."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the peak
    for step in steps:
        step()
    return memory_bytes("VmHWM")


def alone(*arguments: str) -> dict[str, int]:
    """Run this program with these arguments; return its last line of output, parsed as JSON.

    Raises:
        RuntimeError: If the program fails.
    """
    command = [sys.executable, sys.argv[0], *arguments]
    done = subprocess.run(command, env=os.environ | GIVES_BACK, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{arguments} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])

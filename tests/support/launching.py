"""Runs a script or a module under torchrun."""

import os
import subprocess
import sys
from pathlib import Path

from waiting import END_S

import polyak


def torchrun(*arguments: object, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    """Run what the arguments say on two processes."""
    path = [str(Path(__file__).parent), str(Path(polyak.__file__).parents[1])]
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *("--monitor-interval=0.1", "--rdzv-conf=keep_alive_max_attempt=120"),
            *(f"--max-restarts={restarts}", *map(str, arguments)),
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=2 * END_S,
        check=False,
    )

"""Runs scripts under torchrun, and functions in processes that are restarted or killed."""

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from ranks import processes
from waiting import END_S

import polyak


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run what the arguments say on two processes."""
    path = [str(Path(__file__).parent), str(Path(polyak.__file__).parents[1])]
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *("--monitor-interval=0.1", "--rdzv-conf=keep_alive_max_attempt=120"),
            *("--max-restarts=0", *map(str, arguments)),
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=2 * END_S,
        check=False,
    )


def restarted(job: Callable[..., Any], *arguments: object, restarts: int = 0, port: int | None = None) -> list[Any]:
    """Run a function on two processes by torchrun's agent; return what it returns on each.

    Args:
        job: In a module of ``tests/support``. It is called again on both if one was killed.
        restarts: How often.
        port: The static master port; None for a c10d rendezvous, as with ``--standalone``.
    """
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    place: dict[str, Any] = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    place["rdzv_configs"] = {"keep_alive_max_attempt": 120}  # on a busy machine
    if port is not None:
        place = {"rdzv_backend": "static", "rdzv_endpoint": f"127.0.0.1:{port}", "rdzv_configs": {"rank": 0}}
    processes()  # tells the forkserver what to import
    config = LaunchConfig(1, 1, 2, run_id="tests", max_restarts=restarts, start_method="forkserver", **place)
    # In a thread: in the main one it would replace this process's handlers of signals.
    with patch.dict(os.environ), ThreadPoolExecutor(1) as thread:
        found = thread.submit(elastic_launch(config, job), *arguments).result()
    return [found[rank] for rank in range(2)]


def exit_code(job: Callable[..., None], *arguments: object) -> int | None:
    """Run a function in a process of its own, and return the exit code: -9 after ``kill -9``.

    The process has all that this one has imported. With CUDA it imports it again: autograd could not run in a fork.
    """
    context = processes("spawn" if torch.cuda.is_available() else "fork")
    process = context.Process(target=job, args=arguments)
    process.start()
    process.join(END_S)
    return process.exitcode

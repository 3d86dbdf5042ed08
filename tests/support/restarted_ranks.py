"""Ranks that start a group, of which one is killed while they communicate, the first time."""

import os
import signal
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from polyak.sharding import start_process_group


def communicates(folder: Path, environment: Mapping[str, str]) -> float:
    """Return a sum over the ranks; rank 1 is killed before that, the first time.

    Args:
        environment: What a launcher would set.
    """
    torch.set_num_threads(1)
    os.environ.update(environment)
    start_process_group("gloo")
    rank, number = dist.get_rank(), torch.ones(1)
    dist.all_reduce(number)
    if rank == 1 and not (folder / "killed").exists():
        (folder / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(number)
    (folder / f"end{rank}").write_text(str(number.item()))

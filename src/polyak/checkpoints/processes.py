"""The processes of ``torchrun`` that share the work of a command."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed

from polyak.sharding.communicator import Communicator, OneProcess, Ranks


@contextmanager
def all_processes() -> Iterator[Communicator]:
    """Give the communicator of the processes that ``torchrun`` started together; of this one alone if it did not."""
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1 or "RANK" not in os.environ:
        yield OneProcess()
        return
    begun = not distributed.is_initialized()
    if begun:
        distributed.init_process_group("gloo")
    try:
        group = distributed.group.WORLD
        assert group is not None
        yield Ranks(group, torch.device("cpu"), replicas=True)
    finally:
        if begun:
            distributed.destroy_process_group()

"""Starts a process group so that restarts by ``torchrun`` work with any rendezvous."""

import atexit
import os
import time
import uuid
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING

import torch

from polyak.errors import ShardingError

if TYPE_CHECKING:
    from torch.distributed import Store

# How long a rank waits for rank 0, as torch's own process groups do.
_PATIENCE_S = 1800


def start_process_group(backend: str = "gloo") -> None:
    """Initialize torch's process group as the launcher's environment says, and destroy it when the process ends.

    Restarts of ``torchrun`` find no addresses of processes that are gone, with a c10d rendezvous and with a static
    master port. Without a launcher the group has one rank. Nothing happens if there is a process group.

    Args:
        backend: As for ``torch.distributed.init_process_group``.

    Raises:
        ShardingError: If rank 0 does not start.

    Example:
        >>> start_process_group()
        >>> torch.distributed.get_world_size()
        1
        >>> torch.distributed.destroy_process_group()
    """
    if torch.distributed.is_initialized():
        return
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        from torch.distributed.rendezvous import rendezvous  # noqa: PLC0415

        store, rank, size = next(rendezvous("env://"))
        store = _of_this_start(store, rank, size)
    elif {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        store, rank, size = None, -1, -1  # from the environment
    else:
        store, rank, size = torch.distributed.HashStore(), 0, 1
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size)
    atexit.register(_end)


def _of_this_start(store: "Store", rank: int, size: int) -> "Store":
    """Return a section of torchrun's store without entries of processes that it has restarted.

    torchrun keeps one store over restarts. It has the addresses of processes that have ended, and a process that starts
    before the others would wait for such an address (https://github.com/pytorch/pytorch/issues/135712). So rank 0
    invents a name for this start, and another rank uses that name only after rank 0 has listed the rank under it.
    """
    own, last = uuid.uuid4().hex, time.monotonic() + _PATIENCE_S
    if rank == 0:
        store.set("polyak/start", own)
        came = [store.get(f"polyak/{own}/{other}").decode() for other in range(1, size)]
        store.set(f"polyak/{own}/came", " ".join(came))
        return torch.distributed.PrefixStore(own, store)
    while time.monotonic() < last:
        name = store.get("polyak/start").decode()
        store.set(f"polyak/{name}/{rank}", own)
        with suppress(RuntimeError):  # the name is that of an earlier start, which has ended
            store.wait([f"polyak/{name}/came"], timedelta(seconds=1))
            if own in store.get(f"polyak/{name}/came").decode().split():
                return torch.distributed.PrefixStore(name, store)
            time.sleep(0.05)
    raise ShardingError(f"all ranks must start within {_PATIENCE_S} s (rank 0 has not started); see its error")


def _end() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

"""The processes that train a model together: how they start and communicate."""

import atexit
import os
import time
import uuid
import warnings
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from polyak.errors import PlanWarning, ShardingError
from polyak.sharding import Communicator, OneProcess, Ranks, is_sharded
from polyak.tensors.slots import slots
from polyak.trainer.wrapping import kind_of, ranks_of_wrapped

if TYPE_CHECKING:
    from torch.distributed import Store

KINDS = ("ddp", "fsdp2")
# How long a rank waits for rank 0, as torch's own process groups do.
_PATIENCE_S = 1800


@dataclass(frozen=True)
class Group:
    """The processes that train together. All of them must call the same methods in the same order.

    Args:
        kind: ``"ddp"``, ``"fsdp2"``, or None for a single process.
        device: Where this process trains.
        ranks: How they communicate.
    """

    kind: str | None
    device: torch.device
    ranks: Communicator = field(default_factory=OneProcess)

    @property
    def rank(self) -> int:
        """The rank of this process."""
        return self.ranks.rank

    @property
    def size(self) -> int:
        """The world size: how many processes train together."""
        return self.ranks.world_size

    def share_buffers(self, model: nn.Module) -> None:
        """Give all ranks the buffers of rank 0: each rank has updated them from its own batches.

        Args:
            model: Wrapped or not.
        """
        self.share(slot.tensor for slot in slots(model) if not slot.is_parameter and not is_sharded(slot.tensor))

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with those of rank 0.

        Args:
            tensors: On the group's device, of the same shapes on all.
        """
        self.ranks.broadcast(tensors, self.device)


def start(parallelism: str | None, model: nn.Module, device: str | torch.device | None) -> Group:
    """Return the group that trains a model.

    Args:
        parallelism: As ``Trainer`` has it.
        model: As ``Trainer`` has it.
        device: As ``Trainer`` has it.

    Raises:
        ValueError: If ``parallelism`` is not one of ``KINDS``, or the model is wrapped or sharded in another way.
    """
    if parallelism not in (None, *KINDS):
        raise ValueError(f"parallelism must be None or one of {', '.join(KINDS)} (got {parallelism!r})")
    done = kind_of(model)
    if done is not None and parallelism not in (None, done):
        raise ValueError(
            f"parallelism must be {done!r} or None for a model that is under {done} already (got {parallelism!r}); "
            "leave it out"
        )
    kind = parallelism or done
    if kind is None and torch.distributed.is_torchelastic_launched() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        warnings.warn(
            f"each of the {os.environ['WORLD_SIZE']} processes of torchrun trains a model of its own, and they write "
            "to the same files; to train one model together, give Trainer parallelism='ddp' or 'fsdp2'",
            PlanWarning,
            stacklevel=3,
        )
    group = join(kind, device)
    if done is not None and ranks_of_wrapped(model) != group.size:
        raise ValueError(
            f"each of the {group.size} processes must train on its own data (got a model that is divided over "
            f"{ranks_of_wrapped(model)}); for meshes with more dimensions, as in tensor parallelism, write a loop "
            "and use polyak.attach"
        )
    return group


def join(kind: str | None, device: str | torch.device | None) -> Group:
    """Return the group of all processes; initialize torch's process group if it is not initialized.

    It has the processes that the launcher's environment names, as ``torchrun`` sets it, or this process only. A process
    group that is initialized here is destroyed when the process ends.

    Args:
        kind: How they will train; None for a single process, which needs no process group.
        device: Where to train; by default a GPU if there is one, with a ``kind`` the GPU of ``LOCAL_RANK``.
    """
    own = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if kind is None:
        return Group(None, own)
    if own.type == "cuda":
        if own.index is None:
            own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(own)
    _begin(own)
    world = torch.distributed.group.WORLD
    assert world is not None
    only_gpu = torch.distributed.get_backend() == torch.distributed.Backend.NCCL
    ranks = Ranks(world, own if only_gpu else torch.device("cpu"), replicas=kind == "ddp")
    return Group(kind, own, ranks if world.size() > 1 else OneProcess())


def _begin(device: torch.device) -> None:
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
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
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

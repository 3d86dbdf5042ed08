"""The processes that train a model together: how they start and communicate."""

import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from polyak.errors import PlanWarning, ShardingError
from polyak.sharding import Communicator, OneProcess, Ranks, has_experts, is_sharded, start_process_group
from polyak.tensors.slots import slots
from polyak.trainer.wrapping import kind_of, ranks_of_wrapped

KINDS = ("ddp", "fsdp2")


@dataclass(frozen=True)
class Group:
    """The processes that train together. All of them must call the same methods in the same order.

    Args:
        kind: ``"ddp"``, ``"fsdp2"``, or None for a single process.
        device: Where this process trains.
        ranks: How the processes communicate.
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
            tensors: Tensors on the group's device, of the same shapes on all ranks.
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
        ShardingError: If experts of the model were declared to differ by rank.
    """
    if parallelism not in (None, *KINDS):
        raise ValueError(f"parallelism must be None or one of {', '.join(KINDS)} (got {parallelism!r})")
    refuse_experts(model)
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


def refuse_experts(model: nn.Module) -> None:
    """Refuse a model of which ranks have other experts: the trainer begins with rank 0's weights, and saves them.

    Args:
        model: As ``Trainer`` has it.

    Raises:
        ShardingError: If experts of it were declared.
    """
    if has_experts(model):
        raise ShardingError(
            "a model that Trainer trains must be the same on all ranks, or sharded (got experts that were declared to "
            "differ by rank, of which it would save rank 0's); make them DTensors, or write a loop and use "
            "polyak.attach, which saves all of them"
        )


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
    start_process_group("cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo")
    world = torch.distributed.group.WORLD
    assert world is not None
    only_gpu = torch.distributed.get_backend() == torch.distributed.Backend.NCCL
    ranks = Ranks(world, own if only_gpu else torch.device("cpu"), replicas=kind == "ddp")
    return Group(kind, own, ranks if world.size() > 1 else OneProcess())

"""Communication between the processes that hold one model, and an object with the same methods for a single process.

``Communicator`` is either: callers need not ask which. All ranks must call the same methods in the same order.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from polyak.errors import ShardingError
from polyak.sharding import agreement
from polyak.sharding.experts import declared, has_experts, has_numbered_experts
from polyak.sharding.groups import ddps_of, device_of, group_of, meshes_of, new_group, pipeline_of
from polyak.sharding.tensors import broadcast, is_initialized, is_sharded

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


@dataclass(frozen=True)
class OneProcess:
    """The communicator of a process that holds its model alone: it sends nothing."""

    group: None = None
    rank: int = 0
    world_size: int = 1
    replicas: bool = True

    def on_rank_0(self, act: Callable[[], T], doing: str = "") -> T:
        """Return what ``act`` returns.

        Args:
            act: Called here.
            doing: Not used.
        """
        del doing
        return act()

    def on_every_rank(self, what: str, act: Callable[[], T], facts: Mapping[str, Any] | None = None) -> T:
        """Return what ``act`` returns.

        Args:
            what: Not used.
            act: Called here.
            facts: Not used.
        """
        del what, facts
        return act()

    def agree(self, what: str, facts: Mapping[str, Any], remedy: str = "") -> None:
        """Do nothing: one process agrees with itself."""

    def from_rank_0(self, value: T) -> T:
        """Return ``value``.

        Args:
            value: Anything.
        """
        return value

    def gather(self, value: T) -> list[T]:
        """Return ``value`` in a list.

        Args:
            value: Anything.
        """
        return [value]

    def gather_to_rank_0(self, value: T) -> list[T]:
        """Return ``value`` in a list.

        Args:
            value: Anything.
        """
        return [value]

    def union(self, items: Mapping[str, T]) -> dict[str, T]:
        """Return ``items``.

        Args:
            items: The items, by name.
        """
        return dict(items)

    def totals(self, *numbers: float) -> list[float]:
        """Return ``numbers``.

        Args:
            *numbers: Any.
        """
        return list(numbers)

    def mean(self, tensor: Tensor) -> Tensor:
        """Return ``tensor``.

        Args:
            tensor: Any tensor.
        """
        return tensor

    def senders(self, held: Sequence[bool]) -> list[int | None]:
        """Return None for each item, since this process has all items.

        Args:
            held: Which items this process has.
        """
        return [None] * len(held)

    def broadcast(self, tensors: Iterable[Tensor], device: torch.device | None = None, source: int = 0) -> None:
        """Do nothing."""

    def separate(self, patience: timedelta | None = None) -> "OneProcess":
        """Return this object, since there are no messages that could be mixed up.

        Args:
            patience: Not used.
        """
        del patience
        return self

    def close(self) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class Ranks:
    """The processes that hold one model together. Other processes of the job may train other models.

    Args:
        group: The group of these processes, and of no others.
        device: Where tensors must be for a message in the group.
        replicas: Whether each rank has the full model.
        differ: Whether ranks have tensors of other names: stages of a pipeline, or whole experts.
        unsynchronized: Parameters that ``DistributedDataParallel`` was told to ignore, and so may differ by rank.
    """

    group: "ProcessGroup"
    device: torch.device
    replicas: bool
    differ: bool = False
    unsynchronized: tuple[Tensor, ...] = field(default=(), compare=False, repr=False)

    @classmethod
    def of(cls, model: nn.Module) -> "Ranks | None":
        """Return the ranks that hold ``model``; None if that is one process, or the model does not show it.

        Args:
            model: As it is trained, in its ``DistributedDataParallel`` if it has one.

        Raises:
            ShardingError: If the ranks of some meshes of the model cannot communicate with those of the others.
        """
        if not is_initialized():
            return None
        if isinstance(known := getattr(model, "ranks_of_model", None), cls):  # a module over the masters of an engine
            return known
        ddps, meshes = ddps_of(model), meshes_of(model)
        groups = [ddp.process_group for ddp in ddps if ddp.process_group is not None]
        group = group_of(groups, meshes) if groups or meshes else None
        if group is None or group.size() == 1:
            return None
        sharded = any(is_sharded(tensor) and _shards(tensor) > 1 for tensor in model.parameters())
        unsynchronized = tuple(chain.from_iterable(map(_unsynchronized, ddps)))
        replicas = bool(ddps) and not sharded and not has_experts(model)
        return cls(group, device_of(group), replicas, has_numbered_experts(model), unsynchronized)

    @property
    def rank(self) -> int:
        """The number of this process in the group."""
        return self.group.rank()

    @property
    def world_size(self) -> int:
        """The number of processes in the group."""
        return self.group.size()

    def on_rank_0(self, act: Callable[[], T], doing: str = "") -> T:
        """Run on rank 0, and return the result on every rank; raise its error on every rank.

        Args:
            act: Called on rank 0 only. Its result must be one that can be pickled.
            doing: What ``act`` does, for the error of the other ranks: "write a file".

        Raises:
            ShardingError: On the other ranks, if ``act`` failed.
        """
        sent: list[Any] = [None, None]
        failure: BaseException | None = None
        if self.rank == 0:
            try:
                sent[0] = act()
            except BaseException as error:  # Ctrl-C too: the other ranks must not wait forever
                failure, sent[1] = error, f"{type(error).__name__}: {error}"
        torch.distributed.broadcast_object_list(sent, group=self.group, group_src=0, device=self.device)
        if failure is not None:
            raise failure
        if sent[1] is not None:
            failed = f"failed to {doing}" if doing else "failed"
            raise ShardingError(f"rank 0 must succeed for all ranks, and it {failed} ({sent[1]}): see its error")
        return sent[0]

    def on_every_rank(self, what: str, act: Callable[[], T], facts: Mapping[str, Any] | None = None) -> T:
        """Run on every rank, and return the result of this one; if any rank fails, raise on all.

        Args:
            what: What all ranks must do, for the error.
            act: Called on each. If it communicates, it must itself fail on all ranks where it does on one.
            facts: What the ranks must also agree on, as for ``agree``; ranks with nothing to run may call that instead.

        Raises:
            ShardingError: On the ranks where ``act`` succeeded, if it failed on another, or if they do not agree.
        """
        results, failure = list[T](), None
        try:
            results.append(act())
        except Exception as error:  # whatever it is, the other ranks must not wait forever
            failure = error
        errors = {} if failure is None else {"error": f"{type(failure).__name__}: {failure}"}
        try:
            self.agree(what, {**(facts or {}), **errors})
        except ShardingError:
            if failure is None:
                raise
        if failure is not None:
            raise failure
        return results[0]

    def agree(self, what: str, facts: Mapping[str, Any], remedy: str = "") -> None:
        """Check that all ranks have the same facts, in one message of 16 bytes; raise on every rank if not.

        Args:
            what: What they must agree on, for the error.
            facts: By name; a fact may itself be a mapping.
            remedy: What to do if they do not, for the error.

        Raises:
            ShardingError: If they do not; it shows which rank has which value, for at most 8 facts. Of more than 16
                ranks, only rank 0 shows that, and the others refer to it.
        """
        own = agreement.flat(facts)
        if self.differing(torch.tensor([agreement.digest(own)])):
            agreement.refuse(self, what, own, remedy)

    def differing(self, numbers: Tensor) -> list[int]:
        """Return the indices at which not all ranks have the same number.

        Args:
            numbers: The numbers of this rank; as many on each.
        """
        extremes = torch.stack([numbers, -numbers]).to(self.device)
        torch.distributed.all_reduce(extremes, torch.distributed.ReduceOp.MAX, self.group)
        return (extremes[0] != -extremes[1]).nonzero().flatten().tolist()

    def from_rank_0(self, value: T) -> T:
        """Return the value of rank 0.

        Args:
            value: Anything that can be pickled; that of other ranks is not used.
        """
        sent = [value]
        torch.distributed.broadcast_object_list(sent, group=self.group, group_src=0, device=self.device)
        return sent[0]

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, by rank.

        Args:
            value: The value of this rank: anything that can be pickled.
        """
        found: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(found, value, self.group)
        return found

    def gather_to_rank_0(self, value: T) -> list[T]:
        """Return the values of all ranks, by rank, on rank 0, and an empty list on the others.

        Args:
            value: The value of this rank: anything that can be pickled.
        """
        found: list[Any] = [None] * self.world_size if self.rank == 0 else []
        torch.distributed.gather_object(value, found or None, group=self.group, group_dst=0)
        return found

    def union(self, items: Mapping[str, T]) -> dict[str, T]:
        """Return the items of all ranks, in the order of the ranks. If ranks have the same items, only one sends them.

        Args:
            items: Those of this rank, by name: what can be pickled, and shown as text.
        """
        digests = self.sums(agreement.digest(agreement.flat(items)))
        own = items if digests.index(digests[self.rank]) == self.rank else {}
        return self.from_rank_0({name: item for one in self.gather_to_rank_0(dict(own)) for name, item in one.items()})

    def totals(self, *numbers: float) -> list[float]:
        """Return the sum over all ranks of each number; whole numbers are exact below 2 ** 53.

        Args:
            *numbers: As many on each rank.
        """
        return self.total(torch.tensor(numbers, dtype=torch.float64)).tolist()

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean of a tensor over all ranks, without waiting for a device.

        Args:
            tensor: A tensor of one shape on all ranks.
        """
        mean = tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
        torch.distributed.all_reduce(mean, group=self.group)
        return mean / self.world_size

    def share(self, tensor: Tensor, name: str = "") -> float:
        """Return the factor of a local shard in a sum over all ranks, so that each element counts once.

        Args:
            tensor: Sharded over these ranks, or the same on each.
            name: The name of the tensor; engines need it.
        """
        del name
        return (_shards(tensor) if is_sharded(tensor) else 1) / self.world_size

    def total(self, tensor: Tensor) -> Tensor:
        """Return the sum of the tensors of all ranks.

        Args:
            tensor: The tensor of this rank, of one shape on all.
        """
        total = tensor.to(self.device, copy=True)
        torch.distributed.all_reduce(total, group=self.group)
        return total

    def sums(self, number: int) -> list[int]:
        """Return the numbers of all ranks, by rank, in a message without pickles.

        Args:
            number: The number of this rank.
        """
        found = torch.zeros(self.world_size, dtype=torch.int64, device=self.device)
        found[self.rank] = number
        return self.total(found).tolist()

    def senders(self, held: Sequence[bool]) -> list[int | None]:
        """Return for each item the lowest rank that has it, or None if every rank has it, in one message for all.

        Args:
            held: Which items this rank has, in one order on all ranks. Each is on some rank.
        """
        ranks = [-self.rank if own else -self.world_size for own in held]
        largest = torch.tensor([ranks, [not own for own in held]], dtype=torch.int64, device=self.device)
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, self.group)
        return [-rank if missing else None for rank, missing in zip(*largest.tolist(), strict=True)]

    def broadcast(self, tensors: Iterable[Tensor], device: torch.device | None = None, source: int = 0) -> None:
        """Overwrite tensors with those of one rank.

        Args:
            tensors: Tensors of the same shapes on all ranks.
            device: Where the messages are; None for the device of the group's messages.
            source: The rank whose tensors are sent.
        """
        broadcast(tensors, source, self.group, device or self.device)

    def separate(self, patience: timedelta | None = None) -> "Ranks":
        """Return the same ranks in a new group, for a thread that communicates while training does.

        Args:
            patience: How long a rank waits for the others in it; None for torch's default.
        """
        members = torch.distributed.get_process_group_ranks(self.group)
        return Ranks(new_group(members, [self.group], patience), torch.device("cpu"), self.replicas, self.differ)

    def close(self) -> None:
        """Destroy a group that ``separate`` made."""
        with suppress(ValueError):  # it ended when all groups did
            torch.distributed.destroy_process_group(self.group)


Communicator = OneProcess | Ranks


def communicator_of(model: nn.Module) -> Communicator:
    """Return the communicator of the ranks that hold ``model``. All of them must call this.

    Args:
        model: As it is trained, in its ``DistributedDataParallel`` if it has one.

    Raises:
        ShardingError: If the ranks of some meshes of the model cannot communicate with those of the others.
    """
    return Ranks.of(model) or OneProcess()


def pipeline_communicator_of(model: nn.Module, own: Communicator) -> Ranks | None:
    """Return the communicator of all ranks of the model's pipeline; None if the model is not a stage of one.

    They are the ranks of all stages, with their replicas and shards. All of them must call this.

    Args:
        model: A stage, or the ``ModelParts`` of this rank.
        own: The ranks of the same stage, as of ``communicator_of``.

    Raises:
        ShardingError: If the groups of the pipeline do not connect its ranks.
    """
    pipeline = pipeline_of(model) if is_initialized() else []
    if not pipeline:
        return None
    group = group_of([own.group, *pipeline] if own.group is not None else pipeline, [])
    return None if group is None or group.size() == 1 else Ranks(group, device_of(group), replicas=False, differ=True)


def _shards(tensor: Any) -> int:
    """Return the number of shards of a ``DTensor``."""
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return math.prod(size for size, placement in sizes if not placement.is_replicate())


def _unsynchronized(ddp: nn.parallel.DistributedDataParallel) -> tuple[Tensor, ...]:
    """Return the parameters that ``ddp`` ignores, except those that it reduces later."""
    later = set(map(id, getattr(ddp, "_delay_all_reduce_params", ())))
    ignored, known = ddp.parameters_to_ignore, set(map(id, declared(ddp.module)))
    named = ddp.module.named_parameters(remove_duplicate=False)
    return tuple(p for name, p in named if name in ignored and id(p) not in later | known and not is_sharded(p))

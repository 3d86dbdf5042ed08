"""``Ranks``: the processes that hold one model, and so must agree on its average."""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from polyak.errors import ShardingError
from polyak.sharding import agreement
from polyak.sharding.groups import ddp_of, device_of, group_of, meshes_of, new_group
from polyak.sharding.tensors import broadcast, is_initialized, is_spread

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes that hold one model together. Others of the same job may train other models, and take no part.

    Args:
        group: They.
        device: Where tensors are for a message among them.
        replicas: Whether each has the full model.
        unsynchronized: Parameters that ``DistributedDataParallel`` was told to ignore, and so may differ by rank.
    """

    group: "ProcessGroup"
    device: torch.device
    replicas: bool
    unsynchronized: tuple[Tensor, ...] = field(default=(), compare=False, repr=False)

    @classmethod
    def of(cls, model: nn.Module) -> "Ranks | None":
        """Return those that hold ``model``; None if it is one process, or that cannot be seen from the model.

        All of them must call this.

        Args:
            model: As it is trained, in its ``DistributedDataParallel`` if it has one.

        Raises:
            ShardingError: If the ranks of some meshes of the model cannot communicate with those of the others.
        """
        if not is_initialized():
            return None
        ddp, meshes = ddp_of(model), meshes_of(model)
        group = group_of(ddp, meshes) if ddp or meshes else None
        if group is None or group.size() == 1:
            return None
        sharded = any(is_spread(tensor) and _parts(tensor) > 1 for tensor in model.parameters())
        return cls(group, device_of(group), ddp is not None and not sharded, _unsynchronized(ddp) if ddp else ())

    @property
    def rank(self) -> int:
        """This process's number among them."""
        return self.group.rank()

    def share(self, tensor: Tensor) -> float:
        """Return the share of a local shard in a sum over all ranks in which each element is to count once.

        Args:
            tensor: Sharded over these ranks, or the same on each.
        """
        return (_parts(tensor) if is_spread(tensor) else 1) / self.group.size()

    def total(self, tensor: Tensor) -> Tensor:
        """Return the sum of what all ranks give. All must give something.

        Args:
            tensor: That of this one.
        """
        sum_of_all = tensor.to(self.device, copy=True)
        torch.distributed.all_reduce(sum_of_all, group=self.group)
        return sum_of_all

    def sums(self, number: int) -> list[int]:
        """Return the number of each rank. All must ask.

        Args:
            number: That of this one.
        """
        said = torch.zeros(self.group.size(), dtype=torch.int64, device=self.device)
        own = torch.tensor([number], dtype=torch.int64, device=self.device)
        torch.distributed.all_gather(list(said.split(1)), own, self.group)
        return said.tolist()

    def agree(self, what: str, facts: Mapping[str, Any], remedy: str = "") -> None:
        """Check that all ranks have the same facts, in one message of 16 bytes. All must call this; all raise.

        Args:
            what: What they must agree on, for the error.
            facts: By name; a fact may itself be a mapping.
            remedy: What to do if they do not, for the error.

        Raises:
            ShardingError: If they do not; it shows which rank has which value, for at most 8 facts.
        """
        own = agreement.flat(facts)
        if self._differing(torch.tensor([agreement.digest(own)])).numel() == 0:
            return
        buckets = self._differing(agreement.digests(own)).tolist()
        said: list[Any] = [None] * self.group.size()
        sent = agreement.in_buckets(own, buckets[: agreement.MOST_FACTS])
        torch.distributed.all_gather_object(said, sent, self.group)
        lines = agreement.differences(said, torch.distributed.get_process_group_ranks(self.group))
        if hidden := len(buckets[agreement.MOST_FACTS :]):
            lines.append(f"  and at least {hidden} more")
        raise ShardingError("\n".join([f"all ranks must agree on {what}:", *lines, *([remedy] if remedy else [])]))

    def _differing(self, numbers: Tensor) -> Tensor:
        """Return at which places not all ranks have the same number."""
        extremes = torch.stack([numbers, -numbers]).to(self.device)
        torch.distributed.all_reduce(extremes, torch.distributed.ReduceOp.MAX, self.group)
        return (extremes[0] != -extremes[1]).nonzero().flatten()

    def each(self, what: str, act: Callable[[], T], facts: Mapping[str, Any] | None = None) -> T:
        """Return what ``act`` returns on this rank; where it fails on any, raise on all. All must call this.

        Args:
            what: What all must succeed in, for the error.
            act: Done by each. If it communicates, it must itself fail on all ranks where it does on one.
            facts: What they must agree on besides, as for ``agree``; ranks with nothing to do may call that instead.

        Raises:
            ShardingError: On the ranks where it succeeded, if it failed on another, or if they do not agree.
        """
        results, failure = list[T](), None
        try:
            results.append(act())
        except Exception as error:  # whatever it is, the others must not wait forever
            failure = error
        said = {} if failure is None else {"error": f"{type(failure).__name__}: {failure}"}
        try:
            self.agree(what, {**(facts or {}), **said})
        except ShardingError:
            if failure is None:
                raise
        if failure is not None:
            raise failure
        return results[0]

    def first(self, act: Callable[[], T]) -> T:
        """Return what ``act`` returns on the first rank; where it fails there, all raise. All must call this.

        Args:
            act: Done by the first alone; its result must be one that can be pickled.

        Raises:
            ShardingError: On the other ranks, if it failed.
        """
        said: list[Any] = [None, None]
        failure: Exception | None = None
        if self.rank == 0:
            try:
                said[0] = act()
            except Exception as error:  # whatever it is, the others must not wait forever
                failure, said[1] = error, str(error)
        torch.distributed.broadcast_object_list(said, group=self.group, group_src=0, device=self.device)
        if failure is not None:
            raise failure
        if said[1] is not None:
            raise ShardingError(f"the first rank must succeed for all, and it failed: {said[1]}")
        return said[0]

    def apart(self) -> "Ranks":
        """Return the same ranks in a separate group, for a thread next to training's. All of them must call this."""
        members = torch.distributed.get_process_group_ranks(self.group)
        return Ranks(new_group(members, [self.group]), torch.device("cpu"), self.replicas)

    def disband(self) -> None:
        """Destroy a group that ``apart`` made."""
        with suppress(ValueError):  # it went when all groups did
            torch.distributed.destroy_process_group(self.group)

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with those of the first rank. All must take part.

        Args:
            tensors: Of the same shapes on all ranks.
        """
        broadcast(tensors, 0, self.group, self.device)


def _parts(tensor: Any) -> int:
    """Return into how many shards a ``DTensor`` is divided."""
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return math.prod(size for size, placement in sizes if not placement.is_replicate())


def _unsynchronized(ddp: nn.parallel.DistributedDataParallel) -> tuple[Tensor, ...]:
    """Return the parameters that ``ddp`` ignores, but for those that it reduces later."""
    later = set(map(id, getattr(ddp, "_delay_all_reduce_params", ())))
    ignored = ddp.parameters_to_ignore
    named = ddp.module.named_parameters(remove_duplicate=False)
    return tuple(p for name, p in named if name in ignored and id(p) not in later and not is_spread(p))

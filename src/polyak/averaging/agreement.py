"""Checks that ranks that train together have the same averages, and that stages of a pipeline have different names."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from polyak.errors import ShardingError
from polyak.sharding import Communicator, Ranks, is_spread, local
from polyak.tensors.slots import Policy, PolicyRule, all_slots, decided, places_of, slots

# Rows that are summed together, which bounds the additional memory.
_CHUNK = 1 << 20
_AS_INT = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_REMEDY = (
    "a parameter of which each rank holds a shard, such as experts, must be a DTensor (DTensor.from_local with Shard), "
    "or be left out by policy, or be declared by declare_experts; if all ranks should have the same, one of them is "
    "wrong: resume from a checkpoint"
)


@torch.no_grad()
def agree_on_plain(ranks: Ranks, tensors: Mapping[str, Tensor]) -> None:
    """Check that tensors that are not sharded are equal on all ranks, bit for bit, since only rank 0's are saved.

    Args:
        ranks: The ranks. All of them must call this.
        tensors: By name, sharded or not; the same names on all ranks.

    Raises:
        ShardingError: If they are not. The message names the tensors.
    """
    plain = {name: local(tensor).detach() for name, tensor in tensors.items() if not is_spread(tensor)}
    ranks.agree("the average", {"sum of the bits of": sums_of_bits(plain)}, _REMEDY)


def sums_of_bits(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the sum of the bits of each tensor as integers: the same on all devices, whatever the memory layout.

    Rows are weighted by their index, so that the same rows in another order have another sum. The checksums of kernels
    differ from this: they add up memory in its order, so they depend on the strides of a tensor.

    Args:
        tensors: The tensors, by name.
    """
    sums = list(map(_sum_of_bits, tensors.values()))
    first = sums[0].device if sums else None
    return dict(zip(tensors, torch.stack([one.to(first) for one in sums]).tolist() if sums else [], strict=True))


def _sum_of_bits(tensor: Tensor) -> Tensor:
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    bits = real.view(_AS_INT[real.element_size()])
    rows = (bits.sum(-1, dtype=torch.int64) if bits.dim() > 1 else bits).reshape(-1)
    total = torch.zeros((), dtype=torch.int64, device=rows.device)
    for at, chunk in enumerate(rows.split(_CHUNK)):
        first = at * _CHUNK + 1
        total += (chunk * torch.arange(first, first + len(chunk), device=rows.device)).sum()
    return total


def refuse_unsynchronized(ranks: Ranks | None, model: nn.Module, policy: PolicyRule) -> None:
    """Refuse to save averages of parameters that ``DistributedDataParallel`` does not keep equal on all ranks.

    Nothing is communicated, so that rank 0 can save the state alone if each rank has the full model.

    Args:
        ranks: The ranks that train the model together, if there are several.
        model: Wrapped or not.
        policy: Decides which tensors are averaged.

    Raises:
        ShardingError: If there are such parameters; it names them.
    """
    ignored = set(map(id, ranks.unsynchronized)) if ranks else set[int]()
    names = [
        slot.name for slot in slots(model) if id(slot.tensor) in ignored and decided(policy, slot) is not Policy.LEAVE
    ]
    if names:
        raise ShardingError(
            "a parameter must be the same on all ranks for one of them to save its average (got "
            f"{names[:8]}{' and more' if len(names) > 8 else ''}, which DistributedDataParallel ignores): make each a "
            "DTensor (DTensor.from_local with Shard), leave it out by policy, or declare it by declare_experts"
        )


def agree_on_names(pipeline: Ranks, stage: Communicator, model: nn.Module) -> None:
    """Check that no two stages of a pipeline have different tensors of the same name, of which one would be lost.

    Tied tensors that are the same on both stages, bit for bit, may have the same name.

    Args:
        pipeline: The ranks of all stages. All of them must call this.
        stage: The ranks that hold the same stage.
        model: The stage, or the ``ModelParts`` of this rank.

    Raises:
        ShardingError: If they have. The message names the tensors.
    """
    names = {slot.name: slot.tensor.detach() for slot in all_slots(model) if slot.persistent}
    found = pipeline.gather_to_rank_0(list(places_of(model).as_full(names)) if stage.rank == 0 else [])
    twice = pipeline.on_rank_0(lambda: _repeated(found))
    if not twice:
        return
    held = {name: names[name] for name in twice if name in names}
    plain = {name: tensor for name, tensor in held.items() if not is_spread(tensor)}
    facts = {name: str(total) for name, total in sums_of_bits(plain).items()}
    facts |= dict.fromkeys(held.keys() - plain.keys(), f"a shard of rank {pipeline.rank}")
    every = pipeline.gather_to_rank_0(facts)
    pipeline.on_rank_0(lambda: _refuse_different(every))


def _repeated(found: Sequence[Sequence[str]]) -> list[str]:
    counts = Counter(chain.from_iterable(found))
    return [name for name, count in counts.items() if count > 1]


def _refuse_different(every: Sequence[Mapping[str, str]]) -> None:
    values: dict[str, set[str]] = {}
    for one in every:
        for name, fact in one.items():
            values.setdefault(name, set()).add(fact)
    if names := sorted(name for name, facts in values.items() if len(facts) > 1):
        raise ShardingError(
            f"each stage of a pipeline must have other names (got {names[:5]}{' and more' if names[5:] else ''} on "
            "several, with different values): keep the names of the whole model, or give each stage a prefix, as "
            "nn.ModuleDict({'stage1': module})"
        )

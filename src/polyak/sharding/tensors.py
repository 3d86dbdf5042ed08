"""Tensors that are sharded over processes: the local shard, and copies between layouts.

The core works on local shards and communicates nothing. What communicates here is for the moments between updates: a
swap, a checkpoint. torch's own classes are looked up only where somebody has imported them, which costs half of what
importing torch does.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from polyak.errors import ShardingError
from polyak.sharding.wrapped import inner

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs

# Bytes that one broadcast sends together, which is the memory that it needs in addition to the tensors.
_BUCKET_BYTES = 32 * 2**20
_PLAIN = (Tensor, nn.Parameter)


def is_initialized() -> bool:
    """Return whether ``torch.distributed`` has a process group: this process may be one of several."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_sharded(tensor: Tensor) -> "TypeIs[DTensor]":
    """Return whether a tensor is a ``DTensor``, of which each rank holds a local shard.

    Args:
        tensor: Any tensor.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def has_sharded(state: Any) -> bool:
    """Return whether a state has a sharded tensor in it.

    Args:
        state: Tensors and other things, in mappings and sequences.
    """
    if isinstance(state, Mapping):
        return any(map(has_sharded, state.values()))
    if isinstance(state, Sequence) and not isinstance(state, str | bytes):
        return any(map(has_sharded, state))
    return isinstance(state, Tensor) and is_sharded(state)


def full(state: Any) -> Any:
    """Return a state with full tensors on the CPU in place of sharded ones. All ranks that hold shards must call this.

    Args:
        state: Tensors and other things, in mappings and sequences. Rank 0 of a tensor's mesh, which need not have all
            ranks, gets the full one; the others get an empty one.
    """
    if isinstance(state, Mapping):
        return {key: full(value) for key, value in state.items()}
    if isinstance(state, Sequence) and not isinstance(state, str | bytes):
        return [full(value) for value in state]
    if not isinstance(state, Tensor) or not is_sharded(state):
        return state
    # Messages go between the mesh's devices; the shard may be kept on another.
    there = sharded_like(state, local(state).to(state.device_mesh.device_type))
    assert is_sharded(there)
    gathered = there.full_tensor()
    coordinate = state.device_mesh.get_coordinate()
    return torch.empty(0) if coordinate is None or any(coordinate) else gathered.cpu()


def local(tensor: Tensor) -> Tensor:
    """Return the local shard of a tensor, or the tensor itself if it is not sharded; copy nothing.

    Of a weight of torchao's that wraps its values in high precision, it is the tensor with these.

    Args:
        tensor: Any tensor.
    """
    shard = tensor._local_tensor if is_sharded(tensor) else tensor  # noqa: SLF001  to_local() makes a node of autograd
    return shard if type(shard) in _PLAIN else inner(shard)


def unwrapped(tensor: Tensor) -> Tensor:
    """Return a tensor, or instead of torchao's weight the plain tensor with its values, sharded in the same way.

    Args:
        tensor: Any tensor.
    """
    shard = tensor._local_tensor if is_sharded(tensor) else tensor  # noqa: SLF001  see `local`
    return tensor if (values := inner(shard)) is shard else sharded_like(tensor, values)


def sharded_like(tensor: Tensor, shard: Tensor) -> Tensor:
    """Return ``shard`` as the local shard of a tensor that is sharded as ``tensor`` is.

    Args:
        tensor: Sharded or not.
        shard: Of the shape of its local shard, in any dtype and on any device.
    """
    return as_sharded(shard, tensor.device_mesh, tensor.placements, tensor) if is_sharded(tensor) else shard


def as_sharded(shard: Tensor, mesh: "DeviceMesh", placements: Any, full: Tensor) -> Tensor:
    """Return a ``DTensor`` over the memory of its local shard.

    Args:
        shard: The local shard, in any dtype and on any device.
        mesh: The ranks.
        placements: The placement on each dimension of the mesh.
        full: Of the shape and strides of the full tensor.
    """
    from torch.distributed.tensor import DTensor  # noqa: PLC0415  see above
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta  # noqa: PLC0415

    # Not `from_local`, which would move a shard that is kept on the CPU to the mesh's device.
    meta = TensorMeta(full.shape, full.stride(), shard.dtype)
    return DTensor(shard, DTensorSpec(mesh, tuple(placements), tensor_meta=meta), requires_grad=False)


def sharded_over(shard: Tensor, mesh: "DeviceMesh", dim: int) -> Tensor:
    """Return a tensor over the memory of this one, of which each rank of a mesh has a shard of the same size.

    Args:
        shard: That of this rank.
        mesh: The ranks; of one dimension.
        dim: Along which the shards follow one another.
    """
    from torch.distributed.tensor import Shard  # noqa: PLC0415

    shape = list(shard.shape)
    shape[dim] *= mesh.size()
    return as_sharded(shard.detach(), mesh, [Shard(dim)], torch.empty(shape, dtype=shard.dtype, device="meta"))


def offset(tensor: Tensor) -> tuple[int, ...] | None:
    """Return where the local shard of a tensor begins in the full tensor; None if it is the full tensor, or empty.

    Args:
        tensor: Sharded or not.

    Raises:
        ShardingError: If the shard is not a box: some ways of dividing a dimension twice leave gaps.
    """
    if not is_sharded(tensor) or not local(tensor).numel():
        return None
    chunks = tensor.__create_chunk_list__()
    if len(chunks) != 1 or tuple(chunks[0].sizes) != tuple(local(tensor).shape):
        raise ShardingError(
            f"a local shard must be a box without gaps (got {tensor.placements} of {tensor.shape}): shard each "
            "dimension over one dimension of the mesh"
        )
    return tuple(chunks[0].offsets)


@torch.no_grad()
def copy_(target: Tensor, source: Tensor) -> None:
    """Copy between tensors of one shape, of which either may be sharded.

    Args:
        target: Overwritten.
        source: If its placements differ from those of ``target``, all ranks must call this.
    """
    if not is_sharded(target):
        target.copy_(source.full_tensor() if is_sharded(source) else source)
    elif not is_sharded(source):
        shard, at = local(target), offset(target)
        box = () if at is None else tuple(slice(a, a + n) for a, n in zip(at, shard.shape, strict=True))
        if shard.numel():
            shard.copy_(source[box])
    elif source.placements == target.placements and source.device_mesh == target.device_mesh:
        local(target).copy_(local(source))
    else:
        local(target).copy_(local(source.redistribute(target.device_mesh, target.placements)))


# A model that every rank has in full, and an average that is sharded over the ranks by its first dimension.


def rows(tensor: Tensor, average: Tensor) -> Tensor:
    """Return the elements of the model's tensor whose averages are in the local shard of its average; copy nothing.

    Args:
        tensor: The model's.
        average: Its average; it may be sharded where ``tensor`` is not.
    """
    if is_sharded(tensor) or not is_sharded(average):
        return local(tensor)
    return _chunks(local(tensor), average.device_mesh.size())[average.device_mesh.get_local_rank()]


def divided(tensor: Tensor, dtype: torch.dtype, mesh: "DeviceMesh", device: torch.device | None) -> Tensor:
    """Return a copy of a tensor, sharded over the ranks by its first dimension.

    Args:
        tensor: Full on every rank, of one dimension or more.
        dtype: The dtype of the copy.
        mesh: The ranks; of one dimension.
        device: The device of the copy; None for the tensor's.
    """
    from torch.distributed.tensor import Shard  # noqa: PLC0415

    own = _chunks(local(tensor), mesh.size())[mesh.get_local_rank()]
    copy = torch.empty_like(own, dtype=dtype, device=device, requires_grad=False).copy_(own)
    return as_sharded(copy, mesh, [Shard(0)], tensor)


def empty(shape: Sequence[int], dtype: torch.dtype, mesh: "DeviceMesh") -> Tensor:
    """Return an uninitialized tensor on the CPU, sharded over the ranks by its first dimension if it has one.

    Args:
        shape: The shape of the full tensor.
        dtype: The dtype of its values.
        mesh: The ranks; of one dimension.
    """
    from torch.distributed.tensor import Replicate, Shard  # noqa: PLC0415

    full = torch.empty(tuple(shape), dtype=dtype, device="meta")
    own = _chunks(full, mesh.size())[mesh.get_local_rank()] if shape else full
    return as_sharded(torch.empty_like(own, device="cpu"), mesh, [Shard(0) if shape else Replicate()], full)


def _chunks(tensor: Tensor, number: int) -> list[Tensor]:
    chunks = list(tensor.detach().chunk(number))
    return chunks + [tensor.detach()[:0]] * (number - len(chunks))


@torch.no_grad()
def gather(tensors: Sequence[Tensor], mesh: "DeviceMesh") -> None:
    """All-gather the rows of tensors in place: before, each rank has its own rows, and afterwards all rows.

    Args:
        tensors: Full on every rank, of one dimension or more.
        mesh: Over which the rows are sharded; of one dimension.
    """
    chunks = [_chunks(tensor, mesh.size()) for tensor in tensors]
    for rank in range(mesh.size()):
        broadcast([of_ranks[rank] for of_ranks in chunks], rank, mesh.get_group(), None)


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor], source: int, group: "ProcessGroup", device: torch.device | None) -> None:
    """Overwrite tensors with those of one rank, many in one message.

    Args:
        tensors: Tensors of the same shapes on all ranks.
        source: The rank whose tensors are sent; its number in the group.
        group: The ranks.
        device: Where the messages are; None for the device of the tensors.
    """
    own = torch.distributed.get_rank(group) == source
    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket]).to(device)
        torch.distributed.broadcast(flat, group=group, group_src=source)
        if not own:
            for tensor, sent in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(sent.view(tensor.shape))


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    kinds = dict[tuple[torch.dtype, torch.device], list[Tensor]]()
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for same_kind in kinds.values():
        bucket, size = list[Tensor](), 0
        for tensor in same_kind:
            if bucket and size + tensor.nbytes > _BUCKET_BYTES:
                yield bucket
                bucket, size = list[Tensor](), 0
            bucket.append(tensor)
            size += tensor.nbytes
        yield bucket


# FSDP2


def _units(model: nn.Module) -> list[Any]:
    module = sys.modules.get("torch.distributed.fsdp")
    return [m for m in model.modules() if isinstance(m, module.FSDPModule)] if module else []


def is_fsdp(model: nn.Module) -> bool:
    """Return whether ``fully_shard`` was called on a module of the model.

    Args:
        model: Any model.
    """
    return bool(_units(model))


def reshard(model: nn.Module) -> None:
    """Make the modules of the model hold their shards. After a forward pass the outermost modules hold full tensors.

    The next forward pass would not see what is copied into shards while full tensors are held.

    Args:
        model: A model with or without ``fully_shard``.
    """
    for unit in _units(model):
        unit.reshard()


def reshard_after_an_error(model: nn.Module) -> None:
    """Do what ``reshard`` does for a model whose forward pass has raised.

    Args:
        model: A model with ``fully_shard``.

    Raises:
        ShardingError: If this version of torch cannot.
    """
    units = _units(model)
    inner = {id(part) for unit in units for part in unit.modules() if part is not unit}
    for root in (unit for unit in units if id(unit) not in inner):
        if not hasattr(root, "reset_iter_state"):
            raise ShardingError(
                "a model under fully_shard must be resharded after an exception in its forward pass (torch "
                f"{torch.__version__} cannot do that, 2.13 can): stop, and resume from a checkpoint"
            )
        root.reset_iter_state()

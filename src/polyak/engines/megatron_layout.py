"""Where the tensors of Megatron's model chunks are in the full model, and their names there.

A rank of Megatron has other layers, shards and experts than the others, under names that count its own layers from 0.
``sharded_state_dict()`` of a chunk says what each tensor is in the full model. Names and layouts are those of
megatron-core 0.16.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polyak.errors import OptimizerError
from polyak.sharding.fragments import Box, Fragment, boxes_of
from polyak.tensors.slots import unwrap

# Layers and experts get names of their own, instead of a place in one tensor over all layers.
_SEPARATE = {"non_homogeneous_layers": True, "singleton_local_shards": True}
_WRAPPERS = {"DistributedDataParallel", "Float16Module"}


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive elements of a flattened tensor of this rank that are a block of a tensor of the full model.

    Args:
        start: The first of them.
        shape: The shape of the block.
        offsets: Where it begins in the full tensor.
    """

    start: int
    shape: tuple[int, ...]
    offsets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """What a tensor of this rank is in the full model.

    Args:
        name: The name of the full tensor.
        shape: The shape of the full tensor.
        pieces: The pieces of this rank's tensor, in its order.
        replica: Megatron's coordinates among the ranks that have the same elements; the last one is data-parallel.
        tensor: The tensor of this rank.
    """

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    replica: tuple[int, ...]
    tensor: Tensor

    def fragment(self, tensor: Tensor, start: int, *, written: bool) -> Fragment:
        """Return elements of this rank's tensor as those of the full tensor.

        Args:
            tensor: The elements, of any shape.
            start: Where they begin in the flattened tensor of this rank.
            written: Whether this rank saves them.
        """
        return Fragment.of_boxes(
            tensor.detach().view(-1), self._boxes(start, start + tensor.numel()), self.shape, written=written
        )

    def _boxes(self, start: int, stop: int) -> list[Box]:
        found = list[Box]()
        for piece in self.pieces:
            first, last = max(start - piece.start, 0), min(stop - piece.start, torch.Size(piece.shape).numel())
            found += (box.moved(piece.offsets) for box in boxes_of(first, last, piece.shape))
        return found


def inside(chunk: nn.Module) -> nn.Module:
    """Return the model in Megatron's wrappers of a chunk.

    Args:
        chunk: As Megatron trains it.
    """
    while type(chunk).__name__ in _WRAPPERS and isinstance(inner := getattr(chunk, "module", None), nn.Module):
        chunk = inner
    return unwrap(chunk)


def places_of_chunk(chunk: Any) -> list[Place]:
    """Return what the tensors of a chunk are in the full model, in the chunk's order.

    Args:
        chunk: In Megatron's ``DistributedDataParallel``.

    Raises:
        OptimizerError: If a tensor is not a block of rows of one of the full model, or has no place there.
    """
    from megatron.core.transformer.utils import sharded_state_dict_default  # noqa: PLC0415  in use where a chunk is

    model = inside(chunk)
    metadata = {**_SEPARATE, "dp_cp_group": chunk.dp_cp_group}
    found = sharded_state_dict_default(model, metadata=metadata, tp_group=chunk.tp_group)
    places = [_place(entry) for entry in _leaves(found) if isinstance(getattr(entry, "data", None), Tensor)]
    known = {id(place.tensor) for place in places}
    if lost := [name for name, parameter in model.named_parameters() if id(parameter) not in known]:
        raise OptimizerError(
            f"sharded_state_dict() of a model must have all its parameters (it has not {', '.join(lost[:5])}): these "
            "could not be saved by Megatron either; call state_dict(keep_vars=True) in it"
        )
    return places


def _leaves(found: Any) -> Iterator[Any]:
    if isinstance(found, (dict, list)):
        for one in found.values() if isinstance(found, dict) else found:
            yield from _leaves(one)
    else:
        yield found


def _place(entry: Any) -> Place:
    """Return the place of a ``ShardedTensor``, or of a factory that divides a tensor into several."""
    tensor = entry.data
    if not hasattr(entry, "build_fn"):
        return _of_pieces(entry, [entry], [0])
    # Built from a tensor without memory, of which each part is to be a view.
    whole = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    parts = list(_leaves(entry.build_fn(entry.key, whole, entry.replica_id, None)))
    same = {part.data.untyped_storage()._cdata for part in parts} == {whole.untyped_storage()._cdata}  # noqa: SLF001
    starts = [part.data.storage_offset() for part in parts]
    ends = [start + part.data.numel() for start, part in zip(starts, parts, strict=True)]
    one_after_another = [0, *ends] == [*starts, whole.numel()]
    if not (same and one_after_another and all(part.data.is_contiguous() for part in parts)):
        raise OptimizerError(
            f"sharded_state_dict() must divide a parameter into blocks of rows for it to be averaged (it does not so "
            f"{entry.key!r}, such as the experts of the legacy GroupedMLP); use another implementation of this module"
        )
    return _of_pieces(entry, parts, starts)


def _of_pieces(entry: Any, parts: Sequence[Any], starts: Sequence[int]) -> Place:
    above = parts[0].prepend_axis_num  # dimensions for layers or experts, in which this is one of many
    numbers = "".join(f".{number}" for number in parts[0].global_offset[:above])
    shape, shift, pieces = list(parts[0].global_shape[above:]), 0, list[Piece]()
    for number, (part, start) in enumerate(zip(parts, starts, strict=True)):
        offsets = list(part.global_offset[above:])
        if number and part.key != parts[number - 1].key:  # tensors of their own, which are one below the other here
            shift = shape[0]
            shape[0] += part.global_shape[above]
        if offsets:
            offsets[0] += shift
        pieces.append(Piece(start, tuple(part.local_shape), tuple(offsets)))
    replica = entry.replica_id
    return Place(
        entry.key + numbers,
        tuple(shape),
        tuple(pieces),
        replica if isinstance(replica, tuple) else (replica,),
        entry.data,
    )


def under_full_names(chunks: Sequence[nn.Module], places: Mapping[str, Place]) -> nn.Module:
    """Return modules that hold the tensors of chunks under their names in the full model. They have no ``forward``.

    Args:
        chunks: As given to ``places_of_chunk``.
        places: The places of their tensors, by name.
    """
    root, owners = nn.Module(), dict[int, tuple[nn.Module, str]]()
    for module in (module for chunk in chunks for module in inside(chunk).modules()):
        for attribute, buffer in module._buffers.items():  # noqa: SLF001
            if buffer is not None:
                owners[id(buffer)] = module, attribute
    for name, place in places.items():
        *path, leaf = name.split(".")
        node = root
        for part in path:
            child = node._modules.get(part)  # noqa: SLF001  a part may have the name of an attribute, as "items"
            if child is None:
                child = node._modules[part] = nn.Module()  # noqa: SLF001
            node = child
        if id(place.tensor) not in owners:
            node._parameters[leaf] = place.tensor  # type: ignore[assignment]  # noqa: SLF001
            continue
        owner, attribute = owners[id(place.tensor)]
        if leaf == attribute and node._buffers.keys() <= owner._buffers.keys():  # noqa: SLF001
            # The same dict, which has the buffer that the module has now.
            node._buffers = owner._buffers  # noqa: SLF001
            node._non_persistent_buffers_set = owner._non_persistent_buffers_set  # noqa: SLF001
        else:
            node._buffers[leaf] = place.tensor  # noqa: SLF001
    return root

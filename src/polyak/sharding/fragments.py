"""``Fragment``: elements of a larger tensor that lie in blocks of it, which ``torch.distributed.checkpoint`` saves."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from polyak.sharding.communicator import Ranks

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem


@dataclass(frozen=True, slots=True)
class Box:
    """A block of a tensor.

    Args:
        offsets: Where it begins, along each dimension.
        sizes: Its size along each dimension.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def moved(self, offsets: Sequence[int]) -> "Box":
        """Return the same block of a larger tensor.

        Args:
            offsets: Where the smaller tensor begins in the larger one.
        """
        return Box(tuple(map(sum, zip(self.offsets, offsets, strict=True))), self.sizes)


def boxes_of(start: int, stop: int, shape: Sequence[int]) -> Iterator[Box]:
    """Return the blocks that consecutive elements of a flattened tensor make up, in the order of the elements.

    Args:
        start: The first element.
        stop: The element after the last.
        shape: The shape of the tensor.

    Example:
        >>> for box in boxes_of(2, 11, (4, 3)):
        ...     print(box.offsets, box.sizes)
        (0, 2) (1, 1)
        (1, 0) (2, 3)
        (3, 0) (1, 2)
    """
    if start >= stop:
        return
    if len(shape) < 2:
        yield Box((start,), (stop - start,)) if shape else Box((), ())
        return
    row = math.prod(shape[1:])
    (first, head), (last, tail) = divmod(start, row), divmod(stop, row)
    if head:
        end = tail if first == last else row
        yield from _in_row(first, boxes_of(head, end, shape[1:]))
        first += 1
    if first < last:
        yield Box((first, *[0] * (len(shape) - 1)), (last - first, *shape[1:]))
    if tail and first <= last:
        yield from _in_row(last, boxes_of(0, tail, shape[1:]))


def _in_row(row: int, boxes: Iterator[Box]) -> Iterator[Box]:
    return (Box((row, *box.offsets), (1, *box.sizes)) for box in boxes)


class Fragment(Tensor):
    """The elements of a larger tensor that one rank has, at any places in it.

    A ``DTensor`` divides a tensor evenly. Engines that flatten many parameters into one buffer, and divide that, cut
    parameters anywhere. Ranks may have the same fragment, which is then saved once.
    """

    _boxes: tuple[Box, ...]
    _shape: torch.Size
    _written: bool
    _source: Tensor  # kept alive, since its owner knows by it that its memory is in use

    @staticmethod
    def of(tensor: Tensor, offset: int, length: int) -> "Fragment":
        """Return a fragment of a flattened tensor, over the memory of a tensor.

        Args:
            tensor: A tensor of one dimension.
            offset: Where it begins in the flattened tensor.
            length: The length of the flattened tensor.

        Example:
            >>> fragment = Fragment.of(torch.arange(3.0), offset=2, length=10)
            >>> fragment.__create_chunk_list__()
            [ChunkStorageMetadata(offsets=torch.Size([2]), sizes=torch.Size([3]))]
        """
        return Fragment.of_boxes(tensor, [Box((offset,), (tensor.numel(),))], (length,))

    @staticmethod
    def of_boxes(tensor: Tensor, boxes: Sequence[Box], shape: Sequence[int], *, written: bool = True) -> "Fragment":
        """Return a fragment over the memory of a tensor, whose elements lie in blocks of a larger one.

        Args:
            tensor: A tensor of one dimension: the elements of each block, one block after the other.
            boxes: The blocks.
            shape: The shape of the larger tensor.
            written: Whether this rank saves it; otherwise it loads only, and another rank saves the same elements.
        """
        fragment = tensor.detach().as_subclass(Fragment)
        fragment._boxes, fragment._shape = tuple(boxes), torch.Size(shape)  # noqa: SLF001
        fragment._written, fragment._source = written, tensor  # noqa: SLF001
        return fragment

    @property
    def written(self) -> bool:
        """Whether this rank saves it."""
        return self._written

    def blocks(self) -> list[tuple[Box, Tensor]]:
        """Return each block, and its elements in its shape, over the memory of the fragment."""
        plain, start, found = self.as_subclass(Tensor), 0, list[tuple[Box, Tensor]]()
        for box in self._boxes:
            length = math.prod(box.sizes)
            found.append((box, plain[start : start + length].view(box.sizes)))
            start += length
        return found

    # The protocol of `torch.distributed.checkpoint`, which compares sizes too.

    def size(self, dim: int | None = None) -> Any:
        """Return the size of the larger tensor.

        Args:
            dim: A dimension of it.
        """
        return self._shape if dim is None else self._shape[dim]

    def __create_write_items__(self, fqn: str, obj: Any) -> "list[WriteItem]":
        """Return what this rank writes."""
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties  # noqa: PLC0415
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType  # noqa: PLC0415

        del obj
        if not self._written:
            return []
        properties = TensorProperties.create_from_tensor(self.as_subclass(Tensor))
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self._shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> "list[ChunkStorageMetadata]":
        """Return where the elements are in the larger tensor."""
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata  # noqa: PLC0415

        return [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)) for box in self._boxes]

    def __get_tensor_shard__(self, index: "MetadataIndex") -> Tensor:
        """Return the memory that is written, or read into."""
        blocks = self.blocks()
        return next(tensor for box, tensor in blocks if len(blocks) == 1 or torch.Size(box.offsets) == index.offset)


@dataclass(frozen=True)
class FragmentRanks(Ranks):
    """Ranks that each have different parts of the parameters, cut anywhere. They have no tensors in common."""

    def agree(self, what: str, facts: Mapping[str, Any], remedy: str = "") -> None:
        """Check that all ranks have the same facts, without those about tensors.

        Args:
            what: What they must agree on, for the error.
            facts: By name; a fact may itself be a mapping.
            remedy: What to do if they do not, for the error.

        Raises:
            ShardingError: If they do not.
        """
        common = {name: fact for name, fact in facts.items() if name not in _OF_TENSORS}
        super().agree(what, common, remedy)

    def share(self, tensor: Tensor, name: str = "") -> float:
        """Return the factor of a fragment in a sum over all ranks: each element is on one rank.

        Args:
            tensor: A fragment.
            name: Not used.
        """
        del tensor, name
        return 1.0


_OF_TENSORS = {"tensors", "sum of the bits of"}

"""``Fragment``: a part of a flattened tensor, which ``torch.distributed.checkpoint`` saves and loads as that."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from polyak.sharding.communicator import Ranks

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem


class Fragment(Tensor):
    """The elements of a flattened tensor that one rank has, wherever they begin.

    A ``DTensor`` divides a tensor evenly. Engines that flatten many parameters into one buffer, and divide that, cut
    parameters anywhere. Ranks may have the same fragment, which is then saved once.
    """

    _offset: int
    _length: int
    _source: Tensor  # kept alive, since its owner knows by it that its memory is in use

    @staticmethod
    def of(tensor: Tensor, offset: int, length: int) -> "Fragment":
        """Return a fragment over the memory of a tensor.

        Args:
            tensor: Of one dimension.
            offset: Where it begins in the flattened tensor.
            length: Of the flattened tensor.

        Example:
            >>> fragment = Fragment.of(torch.arange(3.0), offset=2, length=10)
            >>> fragment.__create_chunk_list__()
            [ChunkStorageMetadata(offsets=torch.Size([2]), sizes=torch.Size([3]))]
        """
        fragment = tensor.detach().as_subclass(Fragment)
        fragment._offset, fragment._length, fragment._source = offset, length, tensor  # noqa: SLF001
        return fragment

    # The protocol of `torch.distributed.checkpoint`, which compares sizes too.

    def size(self, dim: int | None = None) -> Any:
        """Return the size of the flattened tensor.

        Args:
            dim: 0 for its length.
        """
        size = torch.Size([self._length])
        return size if dim is None else size[dim]

    def __create_write_items__(self, fqn: str, obj: Any) -> "list[WriteItem]":
        """Return what this rank writes."""
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties  # noqa: PLC0415
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType  # noqa: PLC0415

        del obj
        (chunk,) = self.__create_chunk_list__()
        data = TensorWriteData(
            chunk=chunk,
            properties=TensorProperties.create_from_tensor(self.as_subclass(Tensor)),
            size=torch.Size([self._length]),
        )
        return [WriteItem(index=MetadataIndex(fqn, chunk.offsets), type=WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> "list[ChunkStorageMetadata]":
        """Return where the elements are in the flattened tensor."""
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata  # noqa: PLC0415

        return [ChunkStorageMetadata(torch.Size([self._offset]), torch.Size([self.numel()]))]

    def __get_tensor_shard__(self, index: "MetadataIndex") -> Tensor:
        """Return the memory that is written, or read into."""
        del index
        return self.as_subclass(Tensor)


@dataclass(frozen=True)
class FragmentRanks(Ranks):
    """Ranks of which each has other parts of the parameters, cut anywhere: they have no tensors in common."""

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

    def share(self, tensor: Tensor) -> float:
        """Return the factor of a fragment in a sum over all ranks: each element is on one rank.

        Args:
            tensor: A fragment.
        """
        del tensor
        return 1.0


_OF_TENSORS = {"tensors", "sum of the bits of"}

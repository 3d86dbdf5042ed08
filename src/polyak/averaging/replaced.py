"""Finds tensors in the memory of others that are replaced, and makes the same views of the replacements."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from polyak.tensors.memory import Place, span


def storage_of(tensor: Tensor) -> int | None:
    """Return the address of a tensor's storage; None if it has none.

    Args:
        tensor: Any tensor.
    """
    if tensor.layout != torch.strided:
        return None
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (RuntimeError, NotImplementedError):
        return None


class Replaced:
    """Tensors that are replaced by others.

    Args:
        replaced: Each of the tensors, and what replaces it.
    """

    def __init__(self, replaced: Iterable[tuple[Tensor, Tensor]]) -> None:
        self._by_storage = dict[int, list[tuple[Tensor, Tensor]]]()
        for own, by in replaced:
            if (storage := storage_of(own)) is not None:
                self._by_storage.setdefault(storage, []).append((own, by))

    def holds(self, tensor: Tensor) -> bool:
        """Return whether a tensor has the same storage as one of them.

        Args:
            tensor: Any tensor.
        """
        return storage_of(tensor) in self._by_storage

    def overlaps(self, tensor: Tensor) -> bool:
        """Return whether a tensor may have an element in common with one of them.

        Args:
            tensor: One in the storage of one of them.
        """
        if not tensor.numel():
            return False
        begin, stop = span(tensor)
        spans = (span(own) for own, _ in self._by_storage[storage_of(tensor) or 0] if own.numel())
        return any(start < stop and begin < end for start, end in spans)

    def view(self, tensor: Tensor) -> Tensor | None:
        """Return the view of a replacement that corresponds to ``tensor``; None if there is no such view.

        Args:
            tensor: One in the storage of one of them.
        """
        if not tensor.numel() or tensor.is_conj() or tensor.is_neg():
            return None
        begin, stop = span(tensor)
        for own, by in self._by_storage[storage_of(tensor) or 0]:
            start, end = span(own)
            place = Place.of(own, tensor) if start <= begin and stop <= end else None
            if place is not None and own.stride() == by.stride() and type(by) in {Tensor, nn.Parameter}:
                return place.view(by.detach())
        return None

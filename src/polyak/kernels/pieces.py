"""Cuts tensors in pieces of bounded size, with scratch memory for one piece at a time, for the kernel in torch."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

# Small enough to stay in a core's cache, large enough that the calls do not count.
SCRATCH_ELEMENTS = 131_072


class Scratch:
    """Memory of at most ``SCRATCH_ELEMENTS`` for each purpose, dtype and device, kept from update to update."""

    def __init__(self) -> None:
        self._held = dict[tuple[str, torch.dtype, torch.device], Tensor]()

    def all(self, dtype: torch.dtype, device: torch.device, purpose: str) -> Tensor:
        """Return all ``SCRATCH_ELEMENTS`` of one scratch, with undefined values.

        Args:
            dtype: The dtype of the result.
            device: The device of the result.
            purpose: Two results that are used at the same time need two purposes.
        """
        return self._kept(purpose, dtype, device, torch.empty, SCRATCH_ELEMENTS)

    def like(self, piece: Tensor, dtype: torch.dtype, purpose: str) -> Tensor:
        """Return a tensor of the shape of ``piece``, with undefined values.

        Args:
            piece: A piece of at most ``SCRATCH_ELEMENTS``.
            dtype: The dtype of the result.
            purpose: Two results that are used at the same time need two purposes.
        """
        return self.all(dtype, piece.device, purpose)[: piece.numel()].view(piece.shape)

    def flag(self, dtype: torch.dtype, device: torch.device, purpose: str) -> Tensor:
        """Return a 0-dim tensor, with an undefined value.

        Args:
            dtype: The dtype of the result.
            device: The device of the result.
            purpose: Two results that are used at the same time need two purposes.
        """
        return self._kept(purpose, dtype, device, torch.empty, ())

    def numbers(self, count: int, device: torch.device) -> Tensor:
        """Return the numbers from 0 to below ``count`` in int32, which the caller must not change.

        Args:
            count: How many, at most ``SCRATCH_ELEMENTS``.
            device: The device of the result.
        """
        return self._kept("numbers", torch.int32, device, torch.arange, SCRATCH_ELEMENTS)[:count]

    def _kept(
        self, purpose: str, dtype: torch.dtype, device: torch.device, make: Callable[..., Tensor], size: object
    ) -> Tensor:
        key = purpose, dtype, device
        if key not in self._held:
            self._held[key] = make(size, dtype=dtype, device=device)
        return self._held[key]


def order_of(tensors: Sequence[Tensor], *, in_order: bool) -> list[int] | None:
    """Return the order of dimensions in which all these tensors of one shape are contiguous.

    None if they are not dense, or have different layouts; with ``in_order`` also if they are not contiguous.

    Args:
        tensors: Tensors of any layouts.
        in_order: Whether the order must be that of the indices.
    """
    order = list(range(tensors[0].dim()))
    if not in_order:
        order.sort(key=tensors[0].stride, reverse=True)
    return order if all(tensor.permute(order).is_contiguous() for tensor in tensors) else None


def views_of(tensors: Sequence[Tensor], *, in_order: bool = False) -> list[Tensor]:
    """Return flat views of tensors for which ``order_of`` finds an order, and the tensors themselves otherwise.

    Args:
        tensors: Tensors of any layouts, and one shape.
        in_order: Whether the order must be that of the indices.
    """
    order = order_of(tensors, in_order=in_order)
    return list(tensors) if order is None else [tensor.permute(order).view(-1) for tensor in tensors]


def pieces_of(tensors: Sequence[Tensor], *, in_order: bool = False) -> Iterator[tuple[Tensor, ...]]:
    """Cut tensors of one shape in views of at most ``SCRATCH_ELEMENTS``, all at the same indices.

    Args:
        tensors: Tensors of any layouts.
        in_order: Whether the pieces must come in the order of the indices, and not in that of memory.
    """
    views = views_of(tensors, in_order=in_order)
    for number in range(num_pieces(views[0].shape)):
        yield tuple(piece_of(view, number) for view in views)


def num_pieces(shape: torch.Size) -> int:
    """Return the number of pieces in which a tensor of this shape is cut.

    Args:
        shape: The shape of any tensor.
    """
    if shape.numel() <= SCRATCH_ELEMENTS:
        return 1
    dim, _, pieces = _cut(shape)
    return math.prod(shape[:dim]) * pieces


def _cut(shape: torch.Size) -> tuple[int, int, int]:
    """Return the dimension along which a shape is cut, the indices of it in a piece, and the number of pieces.

    A piece has all indices of the dimensions after it, and one index of each dimension before it.
    """
    dim = next(d for d in range(len(shape)) if math.prod(shape[d + 1 :]) <= SCRATCH_ELEMENTS)
    count = SCRATCH_ELEMENTS // math.prod(shape[dim + 1 :])
    return dim, count, -(-shape[dim] // count)


def piece_of(tensor: Tensor, number: int) -> Tensor:
    """Return one piece of a tensor: a view.

    Args:
        tensor: A tensor of any layout.
        number: The number of the piece, below ``num_pieces``, in the order of the indices.
    """
    if tensor.numel() <= SCRATCH_ELEMENTS:
        return tensor
    if tensor.dim() == 1:  # most tensors have one by now, and this is quicker
        return tensor[number * SCRATCH_ELEMENTS : (number + 1) * SCRATCH_ELEMENTS]
    dim, count, pieces = _cut(tensor.shape)
    before, last = divmod(number, pieces)
    index = [slice(last * count, (last + 1) * count)]
    for size in reversed(tensor.shape[:dim]):
        before, at = divmod(before, size)
        index.insert(0, slice(at, at + 1))
    return tensor[tuple(index)]

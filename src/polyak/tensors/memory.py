"""Finds tensors that share memory, so that it is averaged and swapped once.

``b.data = a.data``, ``nn.Parameter(a)``, a transposed alias or a buffer that views rows of a parameter are different
tensors over the same bytes. In each such group one tensor owns the memory; the others are views of it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from polyak.errors import MemoryLayoutError


def is_wrapper(tensor: Tensor) -> bool:
    """Return whether a tensor is a subclass without its own memory, which keeps its values in inner tensors.

    Args:
        tensor: Any; a ``DTensor`` is one.
    """
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def has_memory(tensor: Tensor) -> bool:
    """Return whether a tensor has elements at an address.

    It has none if it is on the meta device, lazily built, empty, sparse, nested, or a wrapper of inner
    tensors.

    Args:
        tensor: Any tensor.
    """
    if is_wrapper(tensor) or is_lazy(tensor) or tensor.layout != torch.strided or tensor.is_nested:
        return False
    return tensor.device.type != "meta" and tensor.numel() > 0 and tensor.untyped_storage().nbytes() > 0


def compact(tensor: Tensor) -> Tensor:
    """Return a view with each element once: only the first index of dimensions that repeat memory (stride 0).

    Args:
        tensor: Strided.
    """
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def is_expanded(tensor: Tensor) -> bool:
    """Return whether some of a tensor's elements share memory because a dimension has stride 0.

    Args:
        tensor: Strided.
    """
    return any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def overlaps_itself(tensor: Tensor) -> bool:
    """Return whether elements may share memory other than by stride 0, such as after ``unfold``.

    Args:
        tensor: Strided.
    """
    reach = 0
    steps = [(stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride and size > 1]
    for stride, size in sorted(steps):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def span(tensor: Tensor) -> tuple[int, int]:
    """Return the address of the first byte and the address after the last byte.

    Args:
        tensor: Strided, with memory.
    """
    last = sum(stride * (size - 1) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr()
    return begin, begin + (last + 1) * tensor.element_size()


def _is_dense(tensor: Tensor) -> bool:
    begin, end = span(tensor)
    return end - begin == tensor.numel() * tensor.element_size() and not overlaps_itself(tensor)


def owners(tensors: Sequence[Tensor], names: Sequence[str], rank: Sequence[int]) -> list[int]:
    """Return for each tensor the index of the tensor that owns its memory: its own index, unless another contains it.

    Args:
        tensors: Any. A tensor without memory owns itself.
        names: The names of the tensors, for the error.
        rank: Of two tensors over the same bytes, the one with the lower rank owns them; of equal ranks, the first.

    Raises:
        MemoryLayoutError: If two tensors overlap and neither contains the other.

    Example:
        >>> base = torch.zeros(4, 4)
        >>> owners([base[1:3], base, torch.zeros(4, 4), base.t()], ["rows", "base", "other", "transposed"], [0] * 4)
        [1, 1, 2, 1]
    """
    found = list(range(len(tensors)))
    for cluster in _clusters(tensors):
        held = {i: compact(tensors[i]) for i in cluster}
        kept = list[int]()
        for i in sorted(cluster, key=lambda i: (-held[i].numel() * held[i].element_size(), rank[i], i)):
            for owner in kept:
                if _same_place(held[owner], held[i]) or (shared := _shared(held[owner], held[i])) == "all":
                    found[i] = owner
                    break
                if shared == "some":
                    raise MemoryLayoutError(
                        f"of two tensors that share memory one must contain the other, and {names[owner]!r} and "
                        f"{names[i]!r} overlap only in part: give one of them its own memory (.clone()), or leave it "
                        "out by a policy"
                    )
            else:
                kept.append(i)
    return found


def _clusters(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Yield groups of two or more tensors whose spans of addresses overlap, by their indices."""
    spans = [(str(t.device), *span(t), i) for i, t in enumerate(tensors) if has_memory(t)]
    cluster, where, reach = list[int](), "", 0
    for device, begin, end, i in sorted(spans):
        if device == where and begin < reach:
            cluster.append(i)
            reach = max(reach, end)
            continue
        if len(cluster) > 1:
            yield cluster
        cluster, where, reach = [i], device, end
    if len(cluster) > 1:
        yield cluster


def _same_place(one: Tensor, other: Tensor) -> bool:
    return (
        one.data_ptr() == other.data_ptr()
        and one.dtype == other.dtype
        and one.shape == other.shape
        and one.stride() == other.stride()
    )


def _shared(owner: Tensor, tensor: Tensor) -> str:
    """Return whether ``owner`` contains "all" bytes of ``tensor``, "some" or "none"."""
    (begin, end), (first, last) = span(owner), span(tensor)
    if last <= begin or end <= first:
        return "none"
    if begin <= first and last <= end and _is_dense(owner):
        return "all"
    # Mark the owner's bytes, in the largest common unit, and read the marks through the other's strides.
    unit = gcd(owner.element_size(), tensor.element_size(), abs(first - begin))
    low = min(begin, first)
    marks = torch.zeros((max(end, last) - low) // unit, dtype=torch.bool, device="cpu")
    _units(owner, marks, low, unit).fill_(True)
    seen = _units(tensor, marks, low, unit)
    return "all" if bool(seen.all()) else "some" if bool(seen.any()) else "none"


def _units(tensor: Tensor, marks: Tensor, low: int, unit: int) -> Tensor:
    each = tensor.element_size() // unit
    strides = [stride * each for stride in tensor.stride()]
    return marks.as_strided((*tensor.shape, each), (*strides, 1), (tensor.data_ptr() - low) // unit)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a view lies in the tensor that owns its memory, to make the same view of another tensor.

    Args:
        owner_shape: The shape of the owner.
        owner_stride: The strides of the owner.
        shape: The shape of the view.
        stride: The stride of the view.
        offset: From the owner's first element to the view's, in elements.
        conj: Whether the view conjugates the owner's values.
        neg: Whether it negates them.
    """

    owner_shape: tuple[int, ...]
    owner_stride: tuple[int, ...]
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    conj: bool
    neg: bool

    @classmethod
    def of(cls, owner: Tensor, tensor: Tensor) -> "Place | None":
        """Return the place of ``tensor`` in ``owner``; None if their dtypes differ.

        Args:
            owner: The tensor that owns the memory.
            tensor: A view of it.
        """
        if tensor.dtype != owner.dtype:
            return None
        offset = (tensor.data_ptr() - owner.data_ptr()) // owner.element_size()
        conj, neg = tensor.is_conj() != owner.is_conj(), tensor.is_neg() != owner.is_neg()
        return cls(tuple(owner.shape), owner.stride(), tuple(tensor.shape), tensor.stride(), offset, conj, neg)

    def view(self, twin: Tensor) -> Tensor:
        """Return the view of ``twin`` at this place; a copy where its layout allows no view.

        Args:
            twin: Of the owner's shape, and of any dtype.
        """
        if twin.stride() == self.owner_stride:
            view = twin.as_strided(self.shape, self.stride, twin.storage_offset() + self.offset)
        else:
            # The index in the owner of each element of the view, read from indices in the owner's layout.
            numbers = torch.empty_strided(self.owner_shape, self.owner_stride, dtype=torch.int64, device="cpu")
            numbers.copy_(torch.arange(twin.numel(), device="cpu").view(self.owner_shape))
            view = twin.reshape(-1)[numbers.as_strided(self.shape, self.stride, self.offset).to(twin.device)]
        view = view.conj() if self.conj else view
        return torch._neg_view(view) if self.neg else view  # noqa: SLF001


def write_(target: Tensor, source: Tensor) -> None:
    """Copy into a tensor of any kind, including expanded and inference tensors, which refuse a plain copy.

    Args:
        target: The tensor to overwrite.
        source: A tensor of the same shape.
    """
    target, source = target.detach(), source.detach()
    for dim, (size, stride) in enumerate(zip(target.shape, target.stride(), strict=True)):
        if stride == 0 and size > 1:
            target, source = target.narrow(dim, 0, 1), source.narrow(dim, 0, 1)
    if target.is_inference():
        with torch.inference_mode():
            target.copy_(source)
    else:
        target.copy_(source)

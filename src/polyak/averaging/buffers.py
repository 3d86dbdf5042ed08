"""The buffers of a model during a swap: the value and the tensor of each are restored after it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from polyak.sharding import local
from polyak.tensors import memory
from polyak.tensors.slots import Slot

# Values of buffers without an average, such as caches of keys and values, are kept during a swap, up to this size in
# total, the smallest first. Larger buffers must not change.
_KEPT_BYTES = 1 << 26


@dataclass(slots=True)
class Buffer:
    """A buffer of the model, and its value before the swap, if that is kept.

    Args:
        slot: Its place in the model.
        tensor: The tensor that was there.
        alias: The same memory, local and detached.
        before: A copy of its value; None if that is not kept.
    """

    slot: Slot
    tensor: Tensor
    alias: Tensor
    before: Tensor | None

    def restore(self, *, moved: bool) -> None:
        """Restore the value, even if an evaluation has replaced the tensor.

        Args:
            moved: Whether the model, and the buffer with it, was moved to another device or dtype.
        """
        if self.before is not None and not _equal(self.alias, self.before):
            memory.write_(self.alias, self.before)
        held, name = self.slot.owner._buffers, self.slot.attribute  # noqa: SLF001
        now = held[name] if name in held else None  # noqa: SIM401  a scripted module has no `get`
        if now is self.tensor:
            return
        same_kind = now is not None and (now.device, now.dtype) == (self.tensor.device, self.tensor.dtype)
        if now is None or not moved or same_kind or now.is_inference() or now.shape != self.tensor.shape:
            held[name] = self.tensor
        elif self.before is not None:
            memory.write_(now, self.before)


def _equal(one: Tensor, other: Tensor) -> bool:
    try:
        return torch.equal(one, other)
    except (NotImplementedError, RuntimeError):  # torch cannot compare all dtypes
        return False


def kept_names(left: Sequence[Slot]) -> set[str]:
    """Return the names of the buffers without an average whose values are kept during a swap: the small ones.

    Args:
        left: The tensors of the model without an average.
    """
    sizes = list[tuple[int, str]]()
    for slot in left:
        tensor = local(slot.tensor)
        if memory.has_memory(tensor) and not tensor.is_quantized:
            sizes.append((tensor.numel() * tensor.element_size(), slot.name))
    sizes.sort()
    return {
        name for (_, name), total in zip(sizes, accumulate(n for n, _ in sizes), strict=True) if total <= _KEPT_BYTES
    }

"""Sets the version counters of tensors during a swap, with which autograd detects changes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# More than the number of writes between two passes ever is.
_FAR = 1 << 30


class Versions:
    """The version counters of tensors that hold other values during a swap, and the same bits as before after it.

    A graph from before the swap can be differentiated after it, such as a student's forward pass before that of its
    teacher, which runs with the average. A graph from during the swap needs the other values, so torch refuses its
    backward pass after the swap.

    Args:
        tensors: Strided.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tuple(tensor for tensor in tensors if not tensor.is_inference())
        self._before = tuple(tensor._version for tensor in self._tensors)  # noqa: SLF001

    def leave(self) -> None:
        """Set the counters to values that no earlier graph has."""
        self._set(tuple(version + _FAR for version in self._before))

    def restore(self) -> None:
        """Set the counters to what they were."""
        self._set(self._before)

    def _set(self, versions: tuple[int, ...]) -> None:
        if self._tensors:
            set_counter: Any = torch._C._autograd._unsafe_set_version_counter  # noqa: SLF001
            try:
                set_counter(self._tensors, versions)
            except TypeError:  # torch before it took several
                for tensor, version in zip(self._tensors, versions, strict=True):
                    set_counter(tensor, version)

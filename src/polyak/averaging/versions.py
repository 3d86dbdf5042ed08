"""The counters by which autograd sees that a tensor has changed, during a swap."""

from collections.abc import Sequence

import torch
from torch import Tensor

# No number of writes between two passes comes near it.
_FAR = 1 << 30


class Versions:
    """The counters of tensors that hold other values for a while, and then the same as before, bit for bit.

    What was computed before may be differentiated after: a student's forward pass before its teacher's, which runs with
    the average. What was computed in between needs the other values, and its backward pass is refused by torch.

    Args:
        tensors: Strided.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tuple(tensor for tensor in tensors if not tensor.is_inference())
        self._before = tuple(tensor._version for tensor in self._tensors)  # noqa: SLF001

    def leave(self) -> None:
        """Set the counters to values that no pass before has seen."""
        self._set(tuple(version + _FAR for version in self._before))

    def restore(self) -> None:
        """Set the counters to what they were."""
        self._set(self._before)

    def _set(self, versions: tuple[int, ...]) -> None:
        if self._tensors:
            set_counter = torch._C._autograd._unsafe_set_version_counter  # type: ignore[attr-defined]  # noqa: SLF001
            try:
                set_counter(self._tensors, versions)
            except TypeError:  # torch before it took several
                for tensor, version in zip(self._tensors, versions, strict=True):
                    set_counter(tensor, version)

"""Keeps the gradients of a model during a swap: gradients of an evaluation must not get into the training."""

from collections.abc import Mapping

from torch import Tensor

from polyak.sharding import local


class Gradients:
    """The gradients of parameters before a swap.

    They are references, not copies. If an evaluation adds to gradients in place, because they were not cleared, that
    cannot be undone.

    Args:
        parameters: The parameters, by name.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._held = [(name, tensor, tensor.grad, _version(tensor.grad)) for name, tensor in parameters.items()]

    def restore(self) -> list[str]:
        """Restore each parameter's gradient; return the names of those whose gradient has changed in place."""
        changed = list[str]()
        for name, tensor, grad, version in self._held:
            if tensor.grad is not grad and _fits(tensor, grad):
                tensor.grad = grad
            if _version(grad) != version:
                changed.append(name)
        return changed


def _version(grad: Tensor | None) -> int:
    return -1 if grad is None or grad.is_inference() else local(grad)._version  # noqa: SLF001


def _fits(tensor: Tensor, grad: Tensor | None) -> bool:
    """Return whether a gradient has the device, dtype and shape of its parameter, which may have been moved since."""
    return grad is None or (grad.device, grad.dtype, grad.shape) == (tensor.device, tensor.dtype, tensor.shape)

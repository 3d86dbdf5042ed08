"""Gradients that a model has when an average is swapped in: those of an evaluation are no part of the training."""

from collections.abc import Mapping

from torch import Tensor

from polyak.sharding import local


class Gradients:
    """The gradients of parameters as they were, to be put back.

    They are references and no copies: an evaluation that adds to them in place, since nobody has cleared them before,
    cannot be undone.

    Args:
        parameters: By name.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._held = [(name, tensor, tensor.grad, _version(tensor.grad)) for name, tensor in parameters.items()]

    def put_back(self) -> list[str]:
        """Give each parameter the gradient that it had, and return the names of those whose gradient has changed."""
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
    """Whether the parameter is where its gradient was: it may have been moved since."""
    return grad is None or (grad.device, grad.dtype, grad.shape) == (tensor.device, tensor.dtype, tensor.shape)

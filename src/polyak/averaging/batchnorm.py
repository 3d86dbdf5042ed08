"""Recomputes statistics of BatchNorm for averaged weights: averaged statistics do not belong to them."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from polyak.averaging.habits import explained, kind_of
from polyak.errors import ArgumentError


@explained("update_bn(model, loader)", {})
@torch.no_grad()
def update_bn(model: nn.Module, loader: Iterable[Any], device: torch.device | str | None = None) -> None:
    """Replace the running statistics of every BatchNorm layer by their mean over all batches of ``loader``.

    It is ``torch.optim.swa_utils.update_bn``, except that all other layers run in evaluation mode, so that dropout
    neither draws random numbers nor shifts the statistics. Afterwards the mode and momentum of each layer are restored.
    If anything fails, the statistics are restored too.

    Args:
        model: Called with one batch at a time. Without BatchNorm layers the loader is not read.
        loader: Yields inputs, or tuples and lists that begin with them. At least one batch.
        device: The device of the inputs; None leaves them where they are.

    Raises:
        ArgumentError: If ``model`` is not a module, as in torch's order of the arguments.
        ValueError: If ``loader`` yields nothing.

    Example:
        >>> layer = nn.BatchNorm1d(1)
        >>> update_bn(layer, [torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [6.0]])])
        >>> layer.running_mean
        tensor([3.])
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"the order must be update_bn(model, loader) (got {kind_of(model)}, {kind_of(loader)}); torch's "
            "function takes them the other way round: give the model first"
        )
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]
    if not layers:
        return
    modes = [(module, module.training) for module in model.modules()]
    momenta = [(layer, layer.momentum) for layer in layers]
    held = [(layer._buffers, name, buffer) for layer in layers for name, buffer in layer.named_buffers(recurse=False)]  # noqa: SLF001
    before = [(where, name, buffer, buffer.clone()) for where, name, buffer in held]
    try:
        model.eval()
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # which makes torch compute a plain mean over the batches
            layer.training = True
        _run(model, loader, device)
    except BaseException:
        for where, name, buffer, value in before:
            where[name] = buffer.copy_(value)
        raise
    finally:
        for layer, momentum in momenta:
            layer.momentum = momentum
        for module, training in modes:
            module.training = training


def _run(model: nn.Module, loader: Iterable[Any], device: torch.device | str | None) -> None:
    batches = 0
    for batch in loader:
        inputs = batch[0] if isinstance(batch, (list, tuple)) else batch
        model(inputs if device is None else inputs.to(device))
        batches += 1
    if not batches:
        raise ValueError("statistics must come from at least one batch (the loader yielded none): was it read before?")

"""The warning of tensors that an optimizer steps and that a model holds where it has no parameters."""

import warnings
from collections.abc import Iterator

from torch import Tensor, nn
from torch.optim import Optimizer

from polyak.errors import PlanWarning
from polyak.tensors.slots import unwrap
from polyak.training.optimizer import tensors_of

# Where a module has its own parameters and modules.
_REGISTERED = frozenset({"_parameters", "_buffers", "_modules"})


def warn_of_unregistered(optimizer: Optimizer, model: nn.Module) -> None:
    """Warn of tensors that the optimizer steps and that a module holds in a plain list, dict or attribute.

    They are no parameters of the model: neither its state dict nor an average has them.

    Args:
        optimizer: Whose steps are counted.
        model: In training, wrapped or not.
    """
    own = {id(parameter) for parameter in model.parameters()}
    foreign = {id(tensor) for tensor in tensors_of(optimizer)} - own
    found = [name for name, tensor in _unregistered(unwrap(model)) if id(tensor) in foreign] if foreign else []
    if found:
        warnings.warn(
            f"what is trained must be a parameter of the model to be averaged, and {len(found)} tensors that "
            f"{type(optimizer).__name__} steps are none, such as {found[0]!r}, which is in a plain list, dict or "
            "attribute; register it, as in nn.ModuleList, nn.ModuleDict, nn.ParameterList or nn.Parameter",
            PlanWarning,
            stacklevel=6,
        )


def _unregistered(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that the model's modules hold without registering them, by a name for people."""
    for prefix, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute not in _REGISTERED:
                yield from _tensors_in(f"{prefix}.{attribute}" if prefix else attribute, value)


def _tensors_in(name: str, value: object, depth: int = 3) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, nn.Module):
        yield from ((f"{name}.{inner}", parameter) for inner, parameter in value.named_parameters())
    elif isinstance(value, dict) and depth:
        for key, one in value.items():
            yield from _tensors_in(f"{name}[{key!r}]", one, depth - 1)
    elif isinstance(value, (list, tuple)) and depth:
        for i, one in enumerate(value):
            yield from _tensors_in(f"{name}[{i}]", one, depth - 1)

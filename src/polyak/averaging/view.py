"""Copies the structure of a model over other tensors, so that the copy computes with the average, or raises one error.

``copy.deepcopy`` shares functions, and everything that they refer to: a patched ``forward`` would still compute with
the model in training. Here functions, bound methods and weak references that lead to the model are copied too. In the
end, a check confirms that nothing that is reached from the copy is the model's own.
"""

from collections.abc import Mapping
from itertools import chain
from typing import Any

from torch import Tensor, nn

from polyak.averaging.evalmode import evaluate
from polyak.averaging.references import References
from polyak.averaging.structure import INSTEAD, Copies
from polyak.errors import CopyError


def module_over(model: nn.Module, replacements: Mapping[int, Tensor]) -> nn.Module:
    """Return a copy of a model's structure that computes with other tensors, in eval mode and without gradients.

    It uses the given tensors themselves. Parameters without a replacement are shared, and other tensors are copied.
    Objects of the training (optimizers, trainers, averages, loaders) and objects that cannot be copied (locks, files,
    process groups) are shared. Code that ``torch.compile`` has compiled runs uncompiled. The model does not change.

    Args:
        model: Unwrapped.
        replacements: By ``id`` of a parameter or buffer of the model, the tensor in its place, of the same shape.

    Raises:
        CopyError: If part of the copy would still compute with the model's own tensors, or cannot be copied.

    Example:
        >>> import torch
        >>> model = nn.Linear(1, 1, bias=False)
        >>> forward = model.forward
        >>> model.forward = lambda x: forward(x)
        >>> view = module_over(model, {id(model.weight): torch.tensor([[2.0]])})
        >>> view(torch.ones(1, 1)).item()
        2.0
    """
    copies = Copies(model, replacements)
    try:
        view = copies.of(model)
        copies.finish()
    except CopyError:
        raise
    except Exception as error:
        raise CopyError(
            f"ema_model must copy the model, and {copies.at} cannot be copied ({error}); {INSTEAD}"
        ) from error
    assert isinstance(view, nn.Module)
    _check_tensors(model, copies)
    evaluate(view, copies.tensors())
    _check_references(view, copies)
    return view


def _check_tensors(model: nn.Module, copies: Copies) -> None:
    """Check that each module's copy holds the replacement of each tensor, since some modules copy themselves."""
    for name, module in model.named_modules():
        twin = copies.memo.get(id(module))
        held: dict[str, Any] = {} if twin is None else {**twin._parameters, **twin._buffers}  # noqa: SLF001
        for attribute, tensor in chain(module._parameters.items(), module._buffers.items()):  # noqa: SLF001
            if tensor is not None and held.get(attribute) is not copies.memo.get(id(tensor), tensor):
                where = f"{name}.{attribute}" if name else attribute
                raise CopyError(
                    f"ema_model must hold the average, and the copy of {type(module).__qualname__} replaces {where}; "
                    f"{INSTEAD}"
                )


def _check_references(view: nn.Module, copies: Copies) -> None:
    """Check that the view refers to no module and no tensor of the model except those that it shares."""
    # Objects that the model refers to and that do not lead to it were checked before.
    harmless = (key for key in copies.found.objects if key not in copies.leading)
    reached = References(view, stops=chain(copies.shared, harmless))
    kept = {key for key in copies.own if copies.memo.get(key) is copies.own[key]}
    for key in chain(copies.modules, copies.own.keys() - kept):
        if key in reached.objects:
            raise CopyError(
                f"ema_model must not compute with the model in training, and {reached.where(key)} refers to it in a "
                f"way that cannot be copied; {INSTEAD}"
            )

"""Keeps the parameter tensors of a model's modules during a swap, since optimizers refer to these tensors."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from polyak.sharding import is_spread
from polyak.tensors.slots import Slot


@dataclass(slots=True)
class Held:
    """A parameter of the model, and the tensor that its module holds.

    Args:
        slot: Its place in the model.
    """

    slot: Slot
    tensor: Tensor = field(init=False)
    _kind: tuple[torch.device, torch.dtype] = field(init=False)

    def __post_init__(self) -> None:
        self.tensor = self.slot.tensor
        self._kind = self.tensor.device, self.tensor.dtype

    def _now(self) -> Tensor | None:
        held, name = self.slot.owner._parameters, self.slot.attribute  # noqa: SLF001
        return held[name] if name in held else None  # noqa: SIM401  a scripted module has no `get`

    @property
    def is_moved(self) -> bool:
        """Whether the parameter is on another device or of another dtype than it was."""
        now = self._now()
        return now is not None and (now.device, now.dtype) != self._kind

    @property
    def is_replaced(self) -> bool:
        """Whether the module holds another tensor of the same kind, which the optimizer does not step."""
        now = self._now()
        replaced = now is not None and now is not self.tensor and not is_spread(self.tensor)
        if replaced and self.tensor.is_meta:
            return (
                False  # its values are elsewhere, as of what Accelerate has offloaded, and come for each forward pass
            )
        return replaced and not self.is_moved and now.shape == self.tensor.shape

    def put_back(self) -> None:
        """Let the module hold the tensor again, if another one of the same kind replaced it."""
        if self.is_replaced:
            self.slot.owner._parameters[self.slot.attribute] = self.tensor  # type: ignore[assignment]  # noqa: SLF001

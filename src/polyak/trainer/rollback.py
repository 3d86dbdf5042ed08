"""What a batch changes before its optimizer step, kept so that an interrupt inside the batch leaves no trace."""

from typing import Any

import torch
from torch import Tensor, nn

from polyak.trainer import rng


class Rollback:
    """Keeps buffers and random numbers as they are where a batch begins, and puts them back if it is left early.

    A forward pass in train mode updates buffers, such as the statistics of BatchNorm, and draws random numbers; loading
    a batch draws too. A run that is resumed repeats the batch, so both must be what they were before it. Buffers whose
    version has not changed are not copied again.

    Args:
        model: In training.
        stream: What the data loader draws from.
    """

    def __init__(self, model: nn.Module, stream: rng.Stream) -> None:
        self._model = model
        self._stream = stream
        self._places = [(module, name) for module in model.modules() for name in module._buffers]  # noqa: SLF001
        self._kept: dict[int, tuple[Tensor, int, Tensor]] = {}
        self._random: tuple[dict[str, Any], dict[str, Any]] | None = None

    @torch.no_grad()
    def begin(self) -> None:
        """Keep what there is now: no batch has begun."""
        self._random = (rng.get_state(), self._stream.get_state())
        stale: list[tuple[Tensor, Tensor]] = []
        for index, (module, name) in enumerate(self._places):
            buffer = module._buffers.get(name)  # noqa: SLF001
            if buffer is None:
                self._kept.pop(index, None)
                continue
            owner, version, copy = self._kept.get(index, (None, -1, buffer))
            if owner is buffer and version == buffer._version:  # noqa: SLF001
                continue
            if owner is not buffer or copy.shape != buffer.shape:
                copy = torch.empty_like(buffer)
            self._kept[index] = (buffer, buffer._version, copy)  # noqa: SLF001
            stale.append((copy, buffer))
        if stale:
            torch._foreach_copy_([copy for copy, _ in stale], [buffer for _, buffer in stale])

    def done(self) -> None:
        """Note that the batch is counted: what it has changed stays."""
        self._random = None

    @torch.no_grad()
    def restore(self) -> None:
        """Put back what ``begin`` kept, unless the batch is counted."""
        if self._random is None:
            return
        (everywhere, of_data), self._random = self._random, None
        for index, (buffer, version, copy) in self._kept.items():
            module, name = self._places[index]
            if buffer._version != version:  # noqa: SLF001
                buffer.copy_(copy)
            module._buffers[name] = buffer  # noqa: SLF001
        rng.set_state(everywhere)
        self._stream.set_state(of_data)

"""Makes a batch either complete or not begun if an interrupt stops it."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from polyak.training import rng

# BatchNorm's kernels change running statistics without changing the tensor's version. So an unchanged version means
# unchanged values only for buffers above this size, which are too large to be such statistics.
_TRUSTED_ABOVE = 1 << 16


class Rollback:
    """Copies buffers and random states at the start of a batch, and restores them if the batch is stopped early.

    A forward pass in train mode updates buffers, such as the statistics of BatchNorm, and draws random numbers; loading
    a batch draws some too. A resumed run repeats the batch, so both must be what they were before it.

    Args:
        model: The model in training.
        stream: The random numbers that the data loader draws.
    """

    def __init__(self, model: nn.Module, stream: rng.Stream) -> None:
        self._model = model
        self._stream = stream
        self._places = [(module, name) for module in model.modules() for name in module._buffers]  # noqa: SLF001
        self._kept: dict[int, tuple[Tensor, int, Tensor] | None] = {}
        self._random: tuple[dict[str, Any], dict[str, Any] | None] | None = None

    @torch.no_grad()
    def begin(self) -> None:
        """Copy buffers and random states at the start of a batch."""
        self._random = None  # nothing can be restored while some copies are new and others old
        stale: list[tuple[Tensor, Tensor]] = []
        for index, (module, name) in enumerate(self._places):
            buffer = module._buffers.get(name)  # noqa: SLF001
            if buffer is None:
                self._kept[index] = None
                continue
            owner, version, copy = self._kept.get(index) or (None, -1, buffer)
            if owner is buffer and _is_unchanged(buffer, version):
                continue
            if owner is not buffer or copy.shape != buffer.shape:
                copy = torch.empty_like(buffer)
            self._kept[index] = (buffer, buffer._version, copy)  # noqa: SLF001
            stale.append((copy, buffer))
        if stale:
            torch._foreach_copy_([copy for copy, _ in stale], [buffer for _, buffer in stale])
        # A stream that is not separate is drawn from the global generators and the loader's.
        everywhere = rng.get_state(self._stream.generators, plain=False)
        self._random = (everywhere, self._stream.get_state() if self._stream.is_separate else None)

    def done(self) -> None:
        """Keep the changes of the batch, which was counted."""
        self._random = None

    @torch.no_grad()
    def restore(self) -> None:
        """Restore what ``begin`` copied, unless the batch was counted."""
        if self._random is None:
            return
        (everywhere, of_data), self._random = self._random, None
        for index, kept in self._kept.items():
            module, name = self._places[index]
            if kept is None:
                module._buffers[name] = None  # noqa: SLF001
                continue
            buffer, version, copy = kept
            if not _is_unchanged(buffer, version):
                buffer.copy_(copy)
            module._buffers[name] = buffer  # noqa: SLF001
        rng.set_state(everywhere, self._stream.generators)
        if of_data is not None:
            self._stream.set_state(of_data)


def _is_unchanged(buffer: Tensor, version: int) -> bool:
    return buffer.numel() > _TRUSTED_ABOVE and buffer._version == version  # noqa: SLF001


@contextmanager
def signals_held() -> Iterator[None]:
    """Delay the handlers of SIGINT and SIGTERM until the ``with`` block ends.

    Only the main thread runs handlers, so in other threads this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # Nested: while one handler is restored, the other signal is still held.
    with _held(signal.SIGINT), _held(signal.SIGTERM):
        yield


@contextmanager
def _held(number: int) -> Iterator[None]:
    handler = signal.getsignal(number)
    if not callable(handler):
        yield
        return
    came: list[FrameType | None] = []
    try:
        signal.signal(number, lambda _, frame: came.append(frame))
        yield
    finally:
        signal.signal(number, handler)
        if came:
            handler(number, came[0])

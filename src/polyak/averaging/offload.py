"""Averages in CPU memory that a thread updates in the background.

An update copies the weights to a staging buffer, and training waits for that copy only; the thread then moves the
average towards the copy. At most one update runs at a time, and every reader of the average waits for it.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from weakref import WeakSet

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from polyak.background import Worker
from polyak.errors import OffloadError
from polyak.tensors.memory import is_expanded


@dataclass(frozen=True, slots=True)
class Offload:
    """Keep an average in CPU memory, and update it there in the background, on a separate thread.

    It takes no GPU memory. In CPU memory it takes the size of the weights in addition to the average, since each update
    copies the weights into a pinned buffer, from which the thread reads them. If the next update is due before the
    thread is done, training waits. Evaluations, states and all other readers of the average wait too. So the numbers
    have the same bits as those of an average updated in place. If the thread fails, the next call raises an
    ``OffloadError``.

    For a model on the CPU it works the same way but gains nothing, since the copy takes about as long as an update.

    Args:
        overlap: Whether a GPU continues with the next batch while its weights are still being copied, on a separate
            stream. Steps of ``torch.optim`` optimizers, and swaps, wait for the copy. Other writes to parameters do
            not wait, such as clipping them after a step, or a step replayed as a CUDA graph. If there are any, leave
            this False: the GPU then copies before it continues.

    Example:
        >>> from polyak import EMA, attach
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with attach(EMA(half_life="10ba", offload=Offload()), model, optimizer) as ema:
        ...     for _ in range(20):
        ...         optimizer.zero_grad()
        ...         model(torch.randn(8, 2)).square().mean().backward()
        ...         optimizer.step()
        ...     with ema.applied():
        ...         loss = model(torch.randn(8, 2)).square().mean()
    """

    overlap: bool = False


class Offloader:
    """Updates averages in CPU memory in the background. It is called like the update of a kernel.

    Args:
        offload: The options.
        kernel: Returns the update of the averages, given the staging buffers for the weights in CPU memory.
        online: The model's tensors to move averages towards, on any device.
        steady: For each of these, whether only an optimizer's step changes it. Buffers change in a forward pass.
        copied: Further averages, each with the model's tensor that is copied into it.

    Attributes:
        staged: The staging buffers, for ``online`` and then for ``copied``.
    """

    def __init__(
        self,
        offload: Offload,
        kernel: Callable[[Sequence[Tensor]], Callable[[float, int], None]],
        online: Sequence[Tensor],
        steady: Sequence[bool],
        copied: Sequence[tuple[Tensor, Tensor]],
    ) -> None:
        tensors = [*online, *(tensor for _, tensor in copied)]
        self.staged = [_room_for(tensor) for tensor in tensors]
        self._kernel = kernel(self.staged[: len(online)])
        self._copied = list(zip((average for average, _ in copied), self.staged[len(online) :], strict=True))
        overlapping = [offload.overlap and tensor.is_cuda and own for tensor, own in zip(online, steady, strict=True)]
        rows = list(zip(self.staged, tensors, [*overlapping, *(False for _ in copied)], strict=True))
        devices = dict.fromkeys(tensor.device for tensor in tensors)
        self._transfers = [_Transfer(device, [row for row in rows if row[1].device == device]) for device in devices]
        if offload.overlap:
            _OVERLAPPING.update(self._transfers)
            _hold_steps()
        # The update that the thread is to make, and its error. An update is due as soon as the first is set.
        self._job: tuple[float, int] | None = None
        self._error: BaseException | None = None
        self._start_thread()

    def _start_thread(self) -> None:
        self._thread = Worker("polyak-offload")
        self._process = os.getpid()

    def __call__(self, weight: float, num_updates: int) -> None:
        """Copy the model's tensors, and leave the rest to the thread. Waits for the previous update.

        Args:
            weight: ``1 - decay``, from 0 to 1.
            num_updates: The number of this update.

        Raises:
            OffloadError: If the previous update failed.
        """
        self.wait()
        for transfer in self._transfers:
            transfer.start()
        self._job = weight, num_updates
        self._thread.submit(self._work)

    def wait(self) -> None:
        """Wait until the averages hold every update.

        Raises:
            OffloadError: If one failed. From then on every call raises it.
        """
        self.settle()
        if self._error is not None:
            raise OffloadError(
                f"updates of an offloaded average must succeed, and one failed ({self._error!r}): some of its tensors "
                "may have moved and others not; load a state from before, or begin a new average"
            ) from self._error

    def settle(self) -> None:
        """Wait until the thread has nothing to do, even if an update failed."""
        if self._process != os.getpid():
            # A forked process has no such thread, and an update that was running stays incomplete.
            if self._job is not None:
                self._error, self._job = RuntimeError("the process was forked during an update"), None
            self._start_thread()
        if self._job is not None:
            # Queued behind the update itself, or instead of it if an interrupt came before that was queued.
            self._thread.finish(self._work)

    @torch.no_grad()
    def _work(self) -> None:
        if self._job is None:
            return
        try:
            for transfer in self._transfers:
                transfer.wait()
            self._kernel(*self._job)
            for average, tensor in self._copied:
                average.copy_(tensor)
        except BaseException as error:
            self._error = error
        self._job = None


def _room_for(tensor: Tensor) -> Tensor:
    """Return a staging buffer in CPU memory with the layout of ``tensor``, pinned if that is on a GPU.

    Averages are not pinned: pinned memory is allocated in powers of two, and cannot be paged out.
    """
    if is_expanded(tensor) or tensor.is_conj() or tensor.is_neg():
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    if tensor.is_cuda and not tensor.permute(order).is_contiguous():
        # A copy between tensors with gaps goes through memory that is not pinned, and would not be asynchronous.
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    strides = tensor.stride()
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)


class _Transfer:
    """Copies tensors of one device to CPU memory.

    Args:
        device: The device of the tensors.
        rows: The buffer, the tensor, and whether to copy it on a separate stream.
    """

    def __init__(self, device: torch.device, rows: Sequence[tuple[Tensor, Tensor, bool]]) -> None:
        self._device = device
        self._in_order = [to for to, _, own in rows if not own], [tensor for _, tensor, own in rows if not own]
        self._overlapping = [to for to, _, own in rows if own], [tensor for _, tensor, own in rows if own]
        # Blocking: the thread sleeps until the event, and does not keep a core busy.
        self._done = torch.cuda.Event(blocking=True) if device.type == "cuda" else None
        self._stream = torch.cuda.Stream(device) if self._overlapping[0] else None
        if self._stream is not None:
            for tensor in self._overlapping[1]:
                tensor.record_stream(self._stream)  # the model may free it while it is being copied

    @torch.no_grad()
    def start(self) -> None:
        """Begin to copy. Copies on the current stream come before everything that is queued on it later."""
        if self._done is None:
            torch._foreach_copy_(*self._in_order)
            return
        current = torch.cuda.current_stream(self._device)
        _copy_async(*self._in_order)
        self._done.record(current)
        if self._stream is not None:
            self._stream.wait_event(self._done)
            with torch.cuda.stream(self._stream):
                _copy_async(*self._overlapping)
            self._done.record(self._stream)

    def wait(self) -> None:
        """Wait until all is copied."""
        if self._done is not None:
            self._done.synchronize()

    def hold(self) -> None:
        """Make the device finish the copy before everything that is queued on it from now on."""
        if self._done is not None:
            torch.cuda.current_stream(self._device).wait_event(self._done)


def _copy_async(into: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    for to, tensor in zip(into, source, strict=True):
        to.copy_(tensor, non_blocking=True)


_OVERLAPPING = WeakSet[_Transfer]()


def hold_writes() -> None:
    """Make devices finish copies of weights before everything that is queued from now on: it will change weights."""
    for transfer in _OVERLAPPING:
        transfer.hold()


@cache
def _hold_steps() -> RemovableHandle:
    """Hold writes before every step of every optimizer. Checking whose weights a step changes would cost more."""
    return register_optimizer_step_pre_hook(lambda *_: hold_writes())

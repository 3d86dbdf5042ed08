"""An average in CPU memory that a thread updates while training goes on.

An update copies the weights to a place aside, which is all that training waits for; the thread then moves the average
towards that copy. One update is under way at a time, and whoever wants to read the average waits for it.
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
    """Keep an average in CPU memory, and update it there on a thread of its own while training goes on.

    It takes none of a GPU's memory, and of the CPU's the size of the weights beside that of the average: each update
    copies the weights there, pinned, before the thread reads them. If the next update is due before the thread is
    done, training waits. Evaluation, states and everything else that reads the average wait as well, so that the
    numbers are those of an average updated in place, bit for bit. What goes wrong on the thread is raised by the next
    call as an ``OffloadError``.

    For a model on the CPU it works alike and gains nothing, since that copy takes about as long as an update.

    Args:
        overlap: Whether a GPU goes on with the next batch while its weights are still being copied, on a stream of
            their own. Steps of ``torch.optim`` optimizers, and loans, wait for the copy. Whatever else writes to
            parameters does not, such as clipping them after a step, or a step replayed as a CUDA graph: where there is
            such a thing leave this False, and the GPU copies before it goes on.

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
    """Does the updates of averages in CPU memory, in the background, as a kernel does them at once.

    Args:
        offload: How.
        kernel: Makes what moves the averages, given the copies that the weights will have in CPU memory.
        online: The model's tensors to move averages towards, anywhere.
        steady: For each of these whether only an optimizer's step changes it. Buffers change in a forward pass.
        copied: Further averages, each with the model's tensor that it takes the value of.

    Attributes:
        staged: What is copied to in each update, for ``online`` and then for ``copied``.
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
        aside = [offload.overlap and tensor.is_cuda and own for tensor, own in zip(online, steady, strict=True)]
        rows = list(zip(self.staged, tensors, [*aside, *(False for _ in copied)], strict=True))
        devices = dict.fromkeys(tensor.device for tensor in tensors)
        self._transfers = [_Transfer(device, [row for row in rows if row[1].device == device]) for device in devices]
        if offload.overlap:
            _OVERLAPPING.update(self._transfers)
            _hold_steps()
        # What the thread is at or has to do, and what went wrong. Setting the first is all that makes an update due.
        self._job: tuple[float, int] | None = None
        self._error: BaseException | None = None
        self._start_thread()

    def _start_thread(self) -> None:
        self._thread = Worker("polyak-offload")
        self._process = os.getpid()

    def __call__(self, weight: float, num_updates: int) -> None:
        """Copy the model's tensors, and leave the rest to the thread. Waits for the update before.

        Args:
            weight: Share of the weights taken, from 0 to 1.
            num_updates: How often this was done.

        Raises:
            OffloadError: If the update before failed.
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
                "may have moved and others not; load a state that was saved before, or begin a new average"
            ) from self._error

    def settle(self) -> None:
        """Wait until the thread has nothing to do, whatever became of it."""
        if self._process != os.getpid():
            # A fork takes no thread along, and what that was at stays half done.
            if self._job is not None:
                self._error, self._job = RuntimeError("the process was forked during an update"), None
            self._start_thread()
        if self._job is not None:
            # In line behind the work itself, and in its place if an interrupt came before that was handed over.
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
    """Return room in CPU memory for a copy that a kernel cannot tell from ``tensor``, pinned for a GPU to write to.

    The averages are not: pinned memory comes in powers of two, and cannot be swapped out.
    """
    if is_expanded(tensor) or tensor.is_conj() or tensor.is_neg():
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    if tensor.is_cuda and not tensor.permute(order).is_contiguous():
        # One with holes goes through memory that is not pinned unless it has none here: who knows when that is done.
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    strides = tensor.stride()
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)


class _Transfer:
    """Copies tensors of one device to CPU memory.

    Args:
        device: The tensors'.
        rows: Where to, what, and whether on a stream of its own.
    """

    def __init__(self, device: torch.device, rows: Sequence[tuple[Tensor, Tensor, bool]]) -> None:
        self._device = device
        self._in_order = [to for to, _, aside in rows if not aside], [tensor for _, tensor, aside in rows if not aside]
        self._aside = [to for to, _, aside in rows if aside], [tensor for _, tensor, aside in rows if aside]
        # The thread sleeps until it happens, instead of keeping a core busy.
        self._done = torch.cuda.Event(blocking=True) if device.type == "cuda" else None
        self._stream = torch.cuda.Stream(device) if self._aside[0] else None
        if self._stream is not None:
            for tensor in self._aside[1]:
                tensor.record_stream(self._stream)  # the model may let it go while it is being copied

    @torch.no_grad()
    def start(self) -> None:
        """Begin to copy. What is not copied aside is ordered against all that the device does next."""
        if self._done is None:
            torch._foreach_copy_(*self._in_order)
            return
        current = torch.cuda.current_stream(self._device)
        _copy_async(*self._in_order)
        self._done.record(current)
        if self._stream is not None:
            self._stream.wait_event(self._done)
            with torch.cuda.stream(self._stream):
                _copy_async(*self._aside)
            self._done.record(self._stream)

    def wait(self) -> None:
        """Wait until all is copied."""
        if self._done is not None:
            self._done.synchronize()

    def hold(self) -> None:
        """Have the device wait until all is copied, before it does anything that it is told from now on."""
        if self._done is not None:
            torch.cuda.current_stream(self._device).wait_event(self._done)


def _copy_async(into: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    for to, tensor in zip(into, source, strict=True):
        to.copy_(tensor, non_blocking=True)


_OVERLAPPING = WeakSet[_Transfer]()


def hold_writes() -> None:
    """Have devices wait until weights are copied, before what they are told from now on: it will change weights."""
    for transfer in _OVERLAPPING:
        transfer.hold()


@cache
def _hold_steps() -> RemovableHandle:
    """Do so before every step of every optimizer from now on. To ask whose weights it changes would cost more."""
    return register_optimizer_step_pre_hook(lambda *_: hold_writes())

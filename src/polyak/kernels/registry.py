"""Chooses the kernel for each pair of tensors: the first in the list that accepts it.

The environment variable ``POLYAK_KERNEL`` names the kernel to begin with (``triton``, ``c`` or ``torch``). Those before
it in the list then serve nothing, and it must be able to serve.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from polyak.errors import KernelError
from polyak.kernels.pairs import Pair, Place, counted

# Moves averages once: called with the share of the weights taken, and the number of the update, a part of the seed.
Update = Callable[[float, int], None]


class Exchange(Protocol):
    """Swaps pairs of tensors in place. An interrupted call may be completed or undone, whatever it had done."""

    @property
    def changed(self) -> Sequence[bool]:
        """For each pair whether the left tensor changed between ``forward`` and ``back``, once ``back`` is done."""

    def forward(self) -> None:
        """Swap what has not been swapped yet."""

    def back(self) -> None:
        """Swap back what has been swapped."""


class Kernel(Protocol):
    """A module with four functions. All kernels give the same bits."""

    def why_not(self, device: torch.device) -> str | None:
        """Return why the kernel cannot serve a device; None if it can.

        Args:
            device: A device of a type that the kernel is listed for.
        """

    def accepts(self, pair: Pair) -> bool:
        """Return whether the kernel can move a pair, or swap it where it has no place.

        Args:
            pair: On a device that the kernel serves.
        """

    def lerp(self, pairs: Sequence[Pair], left_out: Tensor) -> Update:
        """Return a function that moves the left tensors of pairs towards the right ones.

        Args:
            pairs: Pairs on one device, and accepted. Their addresses are noted: where they may change, make a new one.
            left_out: A 0-dim int64 tensor on their device, which counts the tensors that had NaN or inf.
        """

    def swap(self, pairs: Sequence[Pair]) -> Exchange:
        """Return what swaps pairs.

        Args:
            pairs: Pairs on one device, and accepted.
        """


class _Line(NamedTuple):
    """A line of the list. The module is imported when a device needs it, since Triton takes a while.

    Args:
        module: A module with the functions of a ``Kernel``.
        devices: The types of devices that it serves. None stands for all.
        requires: A package that must be installed.
    """

    module: str
    devices: tuple[str, ...] | None = None
    requires: str = "torch"


_LIST = {
    "triton": _Line("polyak.kernels.triton", devices=("cuda",), requires="triton"),
    "c": _Line("polyak.kernels.c", devices=("cpu",)),
    "torch": _Line("polyak.kernels.foreach"),
}


def _kernel(name: str) -> Kernel:
    return cast(Kernel, import_module(_LIST[name].module))


def _why_not(name: str, device: torch.device) -> str | None:
    line = _LIST[name]
    if find_spec(line.requires) is None:
        return f"{line.requires} is not installed"
    return None if line.devices and device.type not in line.devices else _kernel(name).why_not(device)


def _named() -> str | None:
    """Return the kernel that the environment names.

    Raises:
        KernelError: If there is no such kernel, or it cannot serve on this machine.
    """
    name, cpu = os.environ.get("POLYAK_KERNEL"), torch.device("cpu")
    reason = None if not name else _why_not(name, cpu) if name in _LIST else "there is no kernel of this name"
    if reason:
        names = [known for known in _LIST if not _why_not(known, cpu)]
        raise KernelError(f"POLYAK_KERNEL must be {' or '.join(names)} on this machine (got {name!r}): {reason}")
    return name or None


_first = _named()


@cache
def _serving(device_type: str) -> dict[str, Kernel]:
    """Return by name the kernels that serve a type of device, in the order in which they are asked."""
    names = list(_LIST)
    found, device = dict[str, Kernel](), torch.device(device_type)
    for name in names[names.index(_first) if _first else 0 :]:
        devices = _LIST[name].devices
        if devices and device_type not in devices:
            continue
        if not (reason := _why_not(name, device)):
            found[name] = _kernel(name)
        elif name == _first:
            raise KernelError(f"the kernel that POLYAK_KERNEL names must serve {device_type} (got {name!r}): {reason}")
        elif device_type != "cpu" and find_spec(_LIST[name].requires):
            warnings.warn(
                f"the {name} kernel must find the GPU and a C compiler to serve there ({reason}); torch gives the same "
                "averages, more slowly: set POLYAK_KERNEL=torch to use it without this warning",
                stacklevel=2,
            )
    return found


@contextmanager
def only(name: str) -> Iterator[None]:
    """Begin with another kernel for a ``with`` block, as ``POLYAK_KERNEL`` does.

    Args:
        name: As listed.
    """
    global _first  # noqa: PLW0603  tests and benchmarks compare kernels in one process
    before, _first = _first, name
    _serving.cache_clear()
    try:
        yield
    finally:
        _first = before
        _serving.cache_clear()


def serving_cpu() -> list[str]:
    """Return the names of the kernels that serve averages on the CPU, in the order in which they are asked."""
    return list(_serving("cpu"))


def reasons(device_type: str) -> dict[str, str | None]:
    """Return for each kernel, in order, why it does not serve a type of device; None if it does.

    Args:
        device_type: Such as ``"cpu"``.

    Example:
        >>> reasons("cpu")["torch"] is None
        True
    """
    found = dict[str, str | None]()
    for name, line in _LIST.items():
        if line.devices and device_type not in line.devices:
            found[name] = f"it is for {' and '.join(line.devices)}"
        elif _first and list(_LIST).index(name) < list(_LIST).index(_first):
            found[name] = f"POLYAK_KERNEL begins with {_first}"
        else:
            found[name] = _why_not(name, torch.device(device_type))
    return found


def _assigned(pairs: Sequence[Pair]) -> list[tuple[Kernel, list[int]]]:
    """Return for each device the kernels that serve its pairs, and the numbers of these."""
    found = dict[tuple[torch.device, str], tuple[Kernel, list[int]]]()
    for number, pair in enumerate(pairs):
        device = pair.left.device
        name, kernel = next((n, k) for n, k in _serving(device.type).items() if k.accepts(pair))
        found.setdefault((device, name), (kernel, []))[1].append(number)
    return list(found.values())


def lerp(averages: Sequence[Tensor], online: Sequence[Tensor], places: Sequence[Place], left_out: Tensor) -> Update:
    """Return a function that does ``average += weight * (online - average)`` in place for many tensors.

    The arithmetic is in the average's dtype, or in float32 for a 16-bit average, which is then rounded stochastically.
    A value of ``online`` that is NaN or inf leaves that element of the average as it was, whatever its neighbours are:
    so the outcome depends on no split of the work, over threads, devices or shards, and takes one pass over memory.
    The addresses of the tensors are noted: where they may change, make a new one. It takes 46 ns a tensor to have
    autograd count the changes, so that is left to the caller, who knows whether others have the averages.

    Args:
        averages: Tensors to move.
        online: Tensors to move them towards, of the same shapes and on the same devices.
        places: For each tensor what its rounding depends on; used for 16-bit averages only.
        left_out: A 0-dim int64 tensor which counts the tensors that had NaN or inf. On the CPU it waits for each other
            device that averages are on.
    """
    pairs = list(map(Pair, averages, online, places))
    parts = list[tuple[Update, Tensor]]()
    for kernel, numbers in _assigned(pairs):
        group = [pairs[number] for number in numbers]
        device = group[0].left.device
        counter = left_out if device == left_out.device else torch.zeros_like(left_out, device=device)
        parts.append((kernel.lerp(group, counter), counter))
    if len(parts) == 1 and parts[0][1] is left_out:
        return parts[0][0]
    return _Updates(parts, left_out)


class _Updates:
    """Moves averages with several kernels or on several devices.

    Args:
        parts: What moves some of them, and the counter that it uses.
        left_out: To which the counters of other devices are added.
    """

    def __init__(self, parts: Sequence[tuple[Update, Tensor]], left_out: Tensor) -> None:
        self._parts, self._left_out = parts, left_out

    def __call__(self, weight: float, num_updates: int) -> None:
        for update, counter in self._parts:
            update(weight, num_updates)
            if counter is not self._left_out:
                # A number on the CPU goes along with the call; one on another device must be awaited there.
                self._left_out.add_(counter if counter.device.type == "cpu" else counter.to(self._left_out.device))
                counter.zero_()


def lerp_(
    averages: Sequence[Tensor],
    online: Sequence[Tensor],
    weight: float,
    places: Sequence[Place],
    num_updates: int = 0,
    *,
    by: Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Place], Tensor], Update] = lerp,
) -> Tensor:
    """Move every average once, and return how many tensors had NaN or inf, as a 0-dim tensor.

    Autograd counts the changes, as of torch's own operations in place.

    Args:
        averages: Tensors to move.
        online: Tensors to move them towards, of the same shapes and on the same devices.
        weight: Share of ``online`` taken, from 0 to 1.
        places: For each tensor what its rounding depends on; used for 16-bit averages only.
        num_updates: The number of the update, a part of the seed.
        by: Used in place of ``lerp``.
    """
    left_out = torch.zeros((), dtype=torch.int64, device=averages[0].device if averages else None)
    increment_version(counted(averages))
    by(averages, online, places, left_out)(weight, num_updates)
    return left_out


def swap(left: Sequence[Tensor], right: Sequence[Tensor]) -> Exchange:
    """Return what swaps two lists of tensors in place, all or nothing.

    Args:
        left: Tensors.
        right: As many, of the same shapes, dtypes and devices.
    """
    pairs = [Pair(a, b) for a, b in zip(left, right, strict=True)]
    assigned = _assigned(pairs)
    parts = [(kernel.swap([pairs[number] for number in numbers]), numbers) for kernel, numbers in assigned]
    return parts[0][0] if len(parts) == 1 else _Exchanges(parts)


class _Exchanges:
    """Swaps pairs with several kernels or on several devices.

    Args:
        parts: What swaps some of them, and their numbers.
    """

    def __init__(self, parts: Sequence[tuple[Exchange, list[int]]]) -> None:
        self._parts = parts

    @property
    def changed(self) -> list[bool]:
        """For each pair whether the left tensor changed between ``forward`` and ``back``, once ``back`` is done."""
        found = {n: changed for part, numbers in self._parts for n, changed in zip(numbers, part.changed, strict=True)}
        return [found[number] for number in sorted(found)]

    def forward(self) -> None:
        """Swap what has not been swapped yet."""
        for part, _ in self._parts:
            part.forward()

    def back(self) -> None:
        """Swap back what has been swapped."""
        for part, _ in reversed(self._parts):
            part.back()

"""Which kernel serves on which device.

On the CPU the one in C where it was compiled, on a GPU the one in Triton where that is installed, else torch's; or what
the environment variable ``POLYAK_KERNEL`` names (``c``, ``triton`` or ``torch``), where it can serve, and torch's where
it cannot.
"""

import os
import warnings
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from polyak.kernels import cpu, foreach
from polyak.kernels.place import Place

# On the CPU.
KERNELS: dict[str, type[foreach.Lerp]] = {"torch": foreach.Lerp}
EXCHANGES: dict[str, type[foreach.Exchange]] = {"torch": foreach.Exchange}
if not cpu.WHY_NOT:
    KERNELS["c"] = cpu.Lerp
    EXCHANGES["c"] = cpu.Exchange

_WHY_NOT = {"torch": "", "c": cpu.WHY_NOT, "triton": "" if find_spec("triton") else "it is not installed"}
_ASKED = os.environ.get("POLYAK_KERNEL")
if _ASKED and _WHY_NOT.get(_ASKED, "there is none of this name"):
    names = sorted(name for name, why_not in _WHY_NOT.items() if not why_not)
    reason = _WHY_NOT.get(_ASKED, "there is none of this name")
    raise ImportError(f"POLYAK_KERNEL must be one of {names} here (got {_ASKED!r}): {reason}")

CHOSEN = "torch" if cpu.WHY_NOT or _ASKED == "torch" else "c"
Exchange = EXCHANGES[CHOSEN]


@cache
def _kernel_for(device_type: str) -> type[foreach.Lerp]:
    if device_type != "cuda" or _WHY_NOT["triton"] or _ASKED in ("c", "torch"):
        return KERNELS[CHOSEN]  # that in C leaves other devices to torch's
    try:
        from polyak.kernels import triton  # noqa: PLC0415  takes a while, and serves GPUs only

        triton.check()
    except Exception as error:
        if _ASKED:
            raise
        warnings.warn(
            f"Triton must find the GPU and a C compiler to serve there ({type(error).__name__}: {error}); torch does "
            "the same, more slowly: POLYAK_KERNEL=torch asks for that",
            stacklevel=2,
        )
        return foreach.Lerp
    return triton.Lerp


class Lerp(foreach.Lerp):
    """Do what ``foreach.Lerp`` does, on each device by the kernel that serves there.

    The addresses of the tensors are noted: where they may have moved, make a new one.

    Args:
        averages: Tensors to move.
        online: Tensors to move them towards, of the same shapes and on the same devices.
        places: For each tensor what its rounding depends on; used for 16-bit averages only.
        left_out: A 0-dim int64 tensor which counts the tensors that were not all finite. On the CPU it waits for each
            other device that averages are on.
    """

    def __init__(
        self, averages: Sequence[Tensor], online: Sequence[Tensor], places: Sequence[Place], left_out: Tensor
    ) -> None:
        super().__init__([], [], [], left_out)
        triples = list(zip(averages, online, places, strict=True))
        self._parts = list[tuple[foreach.Lerp, Tensor]]()
        for device in dict.fromkeys(average.device for average in averages):
            own = [triple for triple in triples if triple[0].device == device]
            counter = left_out if device == left_out.device else torch.zeros_like(left_out, device=device)
            lerp = _kernel_for(device.type)(
                [a for a, _, _ in own], [x for _, x, _ in own], [p for _, _, p in own], counter
            )
            self._parts.append((lerp, counter))

    def __call__(self, weight: float, num_updates: int) -> None:
        """Move every average once.

        Args:
            weight: Share of ``online`` taken, from 0 to 1.
            num_updates: How often this was done. It is part of the seed.
        """
        for lerp, counter in self._parts:
            lerp(weight, num_updates)
            if counter is not self._left_out:
                # A number on the CPU goes along with the call; from another device it would have to be awaited there.
                self._left_out.add_(counter if counter.device.type == "cpu" else counter.to(self._left_out.device))
                counter.zero_()

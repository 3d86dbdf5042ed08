"""What the names of averages say.

Of EDM2's snapshots: ``network-snapshot-0001234-0.050.pkl`` has seen 1,234 thousand images, width 0.050.

Karras et al., 2024, https://arxiv.org/abs/2312.02696. Files of ``torch.save`` and safetensors with such names are read
too, as ports of EDM2 write them.
"""

import re
from typing import NamedTuple, Self

_NAME = re.compile(r"(.*)-(\d+)-(\d+\.\d+)\.(pkl|pt|pth|safetensors)")


# In a name: of guided-diffusion (ema_0.9999_010000.pt), NeMo (-EMA.ckpt), ESPnet (valid.acc.ave_10best.pth) and others.
_AVERAGE = re.compile(r"(?<![a-z])(ema|swa|ave|avg|averaged?)(?![a-z]|\w*=)(?:[-_]?(0\.\d+))?", re.IGNORECASE)


def average_named(name: str) -> str:
    """Return what a name says of an average: its kind, and its decay if that is there; empty if it names none.

    Args:
        name: Of a file.

    Example:
        >>> average_named("ema_0.9999_010000.pt"), average_named("run-EMA.ckpt"), average_named("step-100.pt")
        ('ema 0.9999', 'ema', '')
    """
    found = _AVERAGE.search(name)
    return " ".join(filter(None, found.groups())).lower() if found else ""


class Snapshot(NamedTuple):
    """What the name of a snapshot says.

    Args:
        run: What the names of all snapshots of a run begin with.
        images: How many the run had seen.
        width: The relative width of the power function that it is an average with, as in the name.
    """

    run: str
    images: int
    width: str

    @classmethod
    def named(cls, name: str) -> Self | None:
        """Return what a name says, or None if it is not the name of a snapshot.

        Args:
            name: The name of a file.

        Example:
            >>> Snapshot.named("network-snapshot-0020971-0.050.pkl")
            Snapshot(run='network-snapshot', images=20971520, width='0.050')
        """
        match = _NAME.fullmatch(name)
        return None if match is None else cls(match[1], _images(int(match[2])), match[3])


def _images(thousands: int) -> int:
    """Return the number of images of a snapshot: a multiple of 1,024 whose full thousands are in the name."""
    images = -(-thousands * 1000 // 1024) * 1024
    return images if images // 1000 == thousands else thousands * 1000

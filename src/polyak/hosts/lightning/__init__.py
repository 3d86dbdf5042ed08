"""Lightning: ``Averaging``, a callback for its ``Trainer``, and ``attach`` for loops with Fabric."""

from polyak.hosts.lightning.callback import Averaging
from polyak.hosts.lightning.fabric import attach

__all__ = ["Averaging", "attach"]

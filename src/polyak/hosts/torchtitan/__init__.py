"""torchtitan: ``attach`` for its ``Trainer``. The section of its configuration is in ``config``, which imports it."""

from polyak.hosts.torchtitan.attached import TorchtitanAttached, attach

__all__ = ["TorchtitanAttached", "attach"]

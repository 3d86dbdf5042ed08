"""MosaicML Composer: ``EMA`` and ``Recorder`` as algorithms of its trainer, and ``compute_ema``.

Composer's users change one import. Importing this adds to Composer what it lacks: events around saving and on
exceptions, and the training weights for a model whose checkpoint has an average that no algorithm takes.
"""

from polyak.hosts.composer import patches
from polyak.hosts.composer.functional import EMAParameters, compute_ema
from polyak.hosts.composer.hosted import EMA, Hosted, Recorder

__all__ = ["EMA", "EMAParameters", "Hosted", "Recorder", "compute_ema"]

patches.install()

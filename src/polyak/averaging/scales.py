"""Removes scales that torchao has computed from the training weights in advance, for the time of a swap."""

from collections.abc import Iterable

from torch import Tensor

from polyak.sharding import is_sharded, scales


class Scales:
    """The scales that ``precompute_float8_dynamic_scale_for_fsdp`` has stored in weights, before a swap.

    If a weight has no scale, torchao computes it from the current weights when it needs one.

    Args:
        tensors: The model's tensors.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        shards = (t._local_tensor if is_sharded(t) else t for t in tensors)  # noqa: SLF001  the wrapper, not its values
        self._held = [(owner, name, getattr(owner, name)) for shard in shards for owner, name in scales(shard)]

    def clear(self) -> None:
        """Remove the scales."""
        for owner, name, _ in self._held:
            setattr(owner, name, None)

    def restore(self) -> None:
        """Restore the scale of each weight."""
        for owner, name, value in self._held:
            setattr(owner, name, value)

"""The scales of weights of torchao during a swap: those that were computed of the training weights in advance."""

from collections.abc import Iterable

from torch import Tensor

from polyak.sharding import is_sharded, scales


class Scales:
    """The scales that ``precompute_float8_dynamic_scale_for_fsdp`` left at weights, before a swap.

    Without one, torchao computes it of the weights that are there, when it needs it.

    Args:
        tensors: The model's.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        shards = (t._local_tensor if is_sharded(t) else t for t in tensors)  # noqa: SLF001  the wrapper, not its values
        self._held = [(owner, name, getattr(owner, name)) for shard in shards for owner, name in scales(shard)]

    def clear(self) -> None:
        """Remove the scales."""
        for owner, name, _ in self._held:
            setattr(owner, name, None)

    def restore(self) -> None:
        """Give each weight its scale back."""
        for owner, name, value in self._held:
            setattr(owner, name, value)

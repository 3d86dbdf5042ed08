"""``MegatronMasters``: the masters of Megatron's optimizers under their names in the full model."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polyak.engines.masters import Master, Masters
from polyak.engines.megatron_layout import Place, under_full_names
from polyak.sharding.fragments import Fragment, FragmentRanks


@dataclass(frozen=True)
class MegatronRanks(FragmentRanks):
    """The ranks of a model that Megatron divides: they differ in names, shards and buffers.

    Args:
        saved_elsewhere: The names of the tensors of this rank that another rank has too, and saves.
    """

    saved_elsewhere: frozenset[str] = frozenset()

    def share(self, tensor: Tensor, name: str = "") -> float:
        """Return the factor of a fragment in a sum over all ranks: 1 on the rank that saves it.

        Args:
            tensor: A fragment.
            name: The name of the tensor.
        """
        return 0.0 if name in self.saved_elsewhere else super().share(tensor, name)

    def broadcast(self, tensors: Iterable[Tensor], device: torch.device | None = None, source: int = 0) -> None:
        """Do nothing: the buffers of other ranks belong to other layers."""


class MegatronMasters(Masters):
    """The masters of this rank under their names in the full model.

    Args:
        places: The places of the tensors of this rank, by name.
        chunks: As Megatron trains them.
        find: As for ``Masters``.
        publish: As for ``Masters``.
        ranks: The ranks that train the model together, if there are several.

    Attributes:
        layout: As given in ``places``.
    """

    def __init__(
        self,
        places: Mapping[str, Place],
        chunks: Sequence[nn.Module],
        find: Callable[[], Mapping[int, Master]],
        publish: Callable[[], None],
        ranks: MegatronRanks | None,
    ) -> None:
        super().__init__(under_full_names(chunks, places), find, publish, ranks)
        self.layout = places

    def fragment(self, name: str, tensor: Tensor) -> Fragment:
        """Return an average, or a tensor of the model, as a part of the full tensor.

        Args:
            name: The name of a tensor of this rank.
            tensor: The elements that this rank has.
        """
        ranks = self.ranks_of_model
        written = not isinstance(ranks, MegatronRanks) or name not in ranks.saved_elsewhere
        start, _ = self.places.get(name, (0, 0))
        return self.layout[name].fragment(tensor, start, written=written)

    def in_fragments(self, state: Any) -> Any:
        """Return a state with a ``Fragment`` in place of each tensor of the model.

        Args:
            state: The state of an algorithm or a loop.
        """
        return replaced(state, self.fragment, self.layout)

    def without_fragments(self, state: Any) -> Any:
        """Return the state that ``in_fragments`` was given.

        Args:
            state: As returned.
        """

        def back(name: str, tensor: Tensor) -> Tensor:
            flat = tensor.as_subclass(Tensor)
            return flat if name in self.places else flat.view(self.layout[name].tensor.shape)

        return replaced(state, back, self.layout)


def replaced(state: Any, replace_one: Callable[[str, Any], Any], names: Mapping[str, Any], kind: type = Tensor) -> Any:
    """Return a state with other values in place of the tensors that have some names.

    Args:
        state: Tensors, and containers of them, by name.
        replace_one: Given a name and what is there.
        names: Those of the tensors.
        kind: The kind of object that is replaced.
    """
    if isinstance(state, Mapping):
        return {
            key: replace_one(key, value)
            if key in names and isinstance(value, kind)
            else replaced(value, replace_one, names, kind)
            for key, value in state.items()
        }
    return [replaced(value, replace_one, names, kind) for value in state] if isinstance(state, list) else state

"""The averaged tensors of a ``BEMA``: an average that lags behind the weights, and a correction of the lag."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polyak import sharding
from polyak.averaging.weights import Shadow
from polyak.errors import CheckpointError
from polyak.profiles import NamedProfile
from polyak.sharding import Ranks, local
from polyak.tensors.slots import check_match


@dataclass(frozen=True, slots=True)
class Correction(NamedProfile):
    """How much each update keeps of the trailing average, and how much of ``weights - first`` it adds.

    Args:
        ema_power: The power kappa of the trailing average.
        bias_power: The power eta of the correction; None for none.
        lag: The offset rho, in steps.
        multiplier: The factor gamma of steps.
        stride: Steps between updates.
    """

    ema_power: float
    bias_power: float | None
    lag: float
    multiplier: float
    stride: int

    @property
    def unit(self) -> None:
        return None

    @property
    def forgets_nothing(self) -> bool:
        # Warnings of a young average do not apply: the correction takes the first weights out.
        return True

    def decay(self, before: float, now: float) -> float:
        kept, n = 1.0, int(before)
        while n < now and kept > 0:
            n += 1
            kept *= 1 - self._age(n) ** -self.ema_power
        return kept

    def added(self, update: int) -> float:
        """Return the share of ``weights - first weights`` that is added.

        Args:
            update: The number of the update, from 1.
        """
        return 0.0 if self.bias_power is None else self._age(update) ** -self.bias_power

    def _age(self, update: int) -> float:
        return self.lag + self.multiplier * self.stride * update


class CorrectedShadow(Shadow):
    """Trailing averages to which a share of ``weights - first`` is added.

    For buffers, such as the statistics of BatchNorm, nothing is added, since a variance must stay positive.

    Args:
        correction: The shares.
        model: The model in training; its weights are the first ones.
        **settings: As for ``Shadow``.
    """

    extra = ("trailing", "first")

    def __init__(self, correction: Correction, model: nn.Module, **settings: Any) -> None:
        super().__init__(model, **settings)
        self._correction = correction
        self._trailing = Shadow(model, **settings)
        self._first = dict[str, Tensor]()
        self._note_first()

    @torch.no_grad()
    def _note_first(self) -> None:
        """Keep the first weights of parameters that have joined."""
        for slot, average in self._movement.listing.averaged:
            if slot.is_parameter and slot.name not in self._first:
                self._first[slot.name] = average.detach().clone()

    def update_(self, weight: float) -> None:
        """Move the trailing averages by ``weight`` of the way to the model's weights, and correct them.

        Args:
            weight: As for ``Shadow.update_``.

        Raises:
            LoanError: As ``Shadow.update_``.
            MismatchError: As ``Shadow.update_``.
        """
        self._trailing.update_(weight)
        super().update_(0.0)  # counts, copies what is copied, and lets new tensors join
        self._note_first()
        self._correct()

    @torch.no_grad()
    def _correct(self) -> None:
        share, trailing = self._correction.added(self.num_updates), self._trailing.averages
        for slot, average in self._movement.listing.averaged:
            own, trails = local(average), local(trailing[slot.name])
            if not slot.is_parameter or not share:
                own.copy_(trails)
                continue
            moved = local(slot.tensor.detach()).to(trails.dtype) - local(self._first[slot.name]).to(trails)
            moved.mul_(share).add_(trails)
            own.copy_(torch.where(moved.isfinite(), moved, own))  # NaN and inf leave their elements as they were

    def agree(self, ranks: Ranks, facts: Mapping[str, Any]) -> None:
        """Check that all ranks average the same; see ``Shadow.agree``."""
        self._trailing.agree(ranks, facts)
        super().agree(ranks, facts)

    def state_dict(self) -> dict[str, Any]:
        """Return what ``Shadow.state_dict`` does, the trailing averages and the first weights."""
        trailing = self._trailing.state_dict()["averages"]
        return {**super().state_dict(), "trailing": trailing, "first": dict(self._first)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from what ``state_dict`` returned.

        Args:
            state: The saved state.

        Raises:
            CheckpointError: If it is the state of another average.
            LoanError: As ``Shadow.load_state_dict``.
            MismatchError: As ``Shadow.load_state_dict``.
        """
        trailing, first = state.get("trailing"), state.get("first")
        if trailing is None or first is None:
            raise CheckpointError(
                "the state must be that of a BEMA, which has the first weights (got one without them); resume by the "
                "algorithm that saved it"
            )
        self._trailing.load_state_dict({**state, "averages": trailing, "training": None})
        super().load_state_dict(state)
        kept = {name: tensor for name, tensor in self.averages.items() if name in self._first or name in first}
        check_match("saved first weights must fit the model", kept, first)
        for name, tensor in first.items():
            self._first[name] = kept[name].detach().clone()
            sharding.copy_(self._first[name], tensor)

"""``Swapper``: swaps averages into their model, and finds them during a swap."""

import weakref
from collections.abc import Callable, Iterable

from torch import Tensor

from polyak import sharding
from polyak.averaging.movement import Movement
from polyak.averaging.swap import Swap, refuse_merged, refuse_second_swap, swap_of
from polyak.errors import LoanError
from polyak.tensors.slots import all_slots


class Swapper:
    """Swaps averages into their model, one swap after the other.

    Args:
        movement: The averages and their model.
    """

    def __init__(self, movement: Movement) -> None:
        self._movement = movement
        self.swap: Swap | None = None
        self._exposed = list[Callable[[], object]]()  # weak references to tensors of others over the averages' memory

    @property
    def active(self) -> Swap | None:
        """The swap while the average is in the model. If one was left incomplete, it ends here."""
        if self.swap is not None and not self.swap.active:
            self.swap = None  # it would keep the model's memory alive
        return self.swap

    def swap_in(self, owner: str) -> None:
        """Put the average in the model.

        Args:
            owner: Who asks, to name it in errors.

        Raises:
            LoanError: If the model holds an average already, or if adapters are merged in it.
        """
        model, listing = self._movement.model, self._movement.listing
        refuse_second_swap(model, owner)
        refuse_merged(model)
        self._movement.follow_model()
        self._movement.wait()
        held = {slot.name for slot in listing.slots}
        swap = Swap(
            model,
            listing.slots,
            [listing.averages[slot.name] for slot in listing.slots],
            [slot for slot in all_slots(model) if slot.name not in held and slot.name not in listing.views],
            [slot for slot in listing.view_slots if not slot.is_parameter],
            keep_averages=self.is_exposed(),
        )
        try:
            self.swap = swap
            swap.begin(owner)
        except BaseException:
            swap.end()
            self.swap = None
            raise

    def restore(self) -> None:
        """Restore the training weights in the model.

        Raises:
            LoanError: If the average is not in the model, or a parameter was changed while it was.
        """
        swap = self.active
        if swap is None:
            raise LoanError("the average must be in the model before the training weights can be restored (it is not)")
        try:
            swap.end()
        finally:
            swap.end()
            self.swap = None

    def expose(self, tensors: Iterable[Tensor]) -> None:
        """Note tensors over the averages' memory that others hold, since a swap must leave these averages in place.

        Args:
            tensors: The tensors, until they are freed.
        """
        self._forget_released()  # a teacher that is read at each step would add to them without end
        self._exposed += map(weakref.ref, tensors)

    def is_exposed(self) -> bool:
        """Return whether somebody still holds such a tensor, which must not get the training weights."""
        self._forget_released()
        return bool(self._exposed)

    def _forget_released(self) -> None:
        self._exposed = [alive for alive in self._exposed if alive() is not None]

    def averaged(self) -> dict[str, Tensor]:
        """Return the average by name, wherever it is now."""
        swap, averages = self.active, self._movement.expose()
        if swap is None:
            return dict(averages)
        sharding.reshard(self._movement.model)
        return swap.averages()

    def training(self) -> dict[str, Tensor]:
        """Return the training weights of the tensors that have an average by name, wherever they are now."""
        swap = self.active
        self._movement.expose()  # the averages may hold the training weights, now or later
        return self._movement.listing.online() if swap is None else swap.training()

    def training_anywhere(self) -> dict[str, Tensor]:
        """Return the same as ``training``, also while another average is in the model."""
        found = self.training()
        if (other := self._other()) is not None:
            found |= {name: tensor for name, tensor in other.training().items() if name in found}
        return found

    def refuse_other(self) -> None:
        """Refuse to read the model's own weights while another average is in it.

        Raises:
            LoanError: If the model holds another average.
        """
        if (other := self._other()) is not None:
            raise LoanError(
                f"the model must hold its own weights (got the average of {other.owner}); restore them first"
            )

    def _other(self) -> Swap | None:
        swap = swap_of(self._movement.model)
        return None if swap is self.swap else swap

"""Lists which tensors of a model have an average: once, and again after tensors have moved in memory."""

from collections.abc import Mapping
from itertools import chain

import torch
from torch import Tensor, nn

from polyak import sharding
from polyak.averaging.creation import check_layout, check_memory, new_average
from polyak.averaging.settings import Settings
from polyak.errors import MemoryLayoutError
from polyak.sharding import is_spread, local
from polyak.tensors import memory
from polyak.tensors.fingerprint import Fingerprint
from polyak.tensors.slots import (
    Policy,
    Slot,
    all_slots,
    check_match,
    decided,
    slots,
    trained_through,
    views_of,
)


class Listing:
    """The averages of a model's tensors by name, and the tensor that belongs to each.

    Args:
        model: The model in training, unwrapped.
        settings: How averages are kept.

    Attributes:
        averages: The averaged and the copied tensors by canonical name.
        slots: The places in the model of the tensors that have an average, in order.
        averaged: Those that are averaged, each with its average.
        copied: Those that are copied, each with its copy.
        views: By name, the tensors in the memory of others: the name of the owner, and the place in its memory.
        view_slots: The places in the model of these tensors.
        policies: What was decided for each tensor, so that an evaluation or a resumed run decides the same.
        fingerprint: Checks that nothing has moved; None if the tensors must be listed again.
    """

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self._model, self._settings = model, settings
        self.averages = dict[str, Tensor]()
        self.slots = list[Slot]()
        self.averaged = list[tuple[Slot, Tensor]]()
        self.copied = list[tuple[Slot, Tensor]]()
        self.views = dict[str, tuple[str, memory.Place | None]]()
        self.view_slots = list[Slot]()
        self.policies = dict[str, Policy]()
        self.fingerprint: Fingerprint | None = None
        self._guarded = False

    def guard(self) -> None:
        """From now on, check the addresses of the averages too, since somebody gets the tensors and may move them.

        Before that nobody can, and checking 4,000 averages would add a fifth to the time of their update.
        """
        if not self._guarded:
            self._guarded = True
            self.fingerprint = self._new_fingerprint() if self.holds() else None

    def holds(self) -> bool:
        """Return whether the model's tensors, and averages that others hold, are still where they were."""
        return self.fingerprint is not None and self.fingerprint.holds()

    def online(self) -> dict[str, Tensor]:
        """Return the model's tensors that have an average, by name."""
        return {slot.name: slot.tensor.detach() for slot in self.slots}

    def kinds(self) -> dict[str, tuple[Tensor, bool]]:
        """Return each average by name, and whether it is averaged, not copied."""
        averaged = {slot.name for slot, _ in self.averaged}
        return {name: (tensor, name in averaged) for name, tensor in self.averages.items()}

    def add(self, slot: Slot, dtype: torch.dtype | None = None) -> Tensor:
        """Make the average of a tensor, which begins with its value, and return it.

        Args:
            slot: The tensor's place in the model.
            dtype: The dtype of a saved average; None for that of a new one.

        Raises:
            DtypeError: If the dtype cannot hold the value.
        """
        policy = self.policies.get(slot.name, Policy.AVERAGE)
        average = self.averages[slot.name] = new_average(slot, policy, self._settings, dtype)
        if slot.name in self.views:
            # It was in the memory of another tensor, whose average it continues.
            owner, place = self.views[slot.name]
            if place is not None and owner in self.averages and not is_spread(average):
                local(average).copy_(place.view(local(self.averages[owner])))
        return average

    def refresh(self, *, join: bool) -> None:
        """List the tensors again.

        Args:
            join: Whether new tensors join, with their current values.

        Raises:
            MemoryLayoutError: If a tensor cannot be averaged.
            MismatchError: If an averaged tensor is missing from the model, or has another shape.
        """
        found = self._found()
        views = views_of(self._model, tied=self._settings.views)
        for name in views:
            self.averages.pop(name, None)
        through = trained_through(views, self._settings.policy)
        if not join:
            found = [slot for slot in found if slot.name in self.averages]
        policies = [(slot, self._policy_of(slot, through)) for slot in found]
        # Tensors that are frozen later are still averaged, since their average has not caught up yet.
        held = [(s, p) for s, p in policies if p is not Policy.LEAVE or s.name in self.averages]
        # The average of a tensor that joins later begins with its value, which must be finite.
        waiting = {s.name for s, _ in held if self.slots and s.name not in self.averages and not _is_finite(s)}
        held = [(slot, policy) for slot, policy in held if slot.name not in waiting]
        for slot, _ in held:
            self._place(slot)
        self.slots = [slot for slot, _ in held]
        self._refuse_shared()
        what = "the model must keep the averaged tensors (if its structure was changed on purpose, attach a new EMA)"
        check_match(what, self.averages, self.online())
        check_memory(self.averages)
        self.views = {
            name: (own.name, memory.Place.of(local(own.tensor), local(slot.tensor)))
            for name, (own, slot) in views.items()
        }
        self.view_slots = [slot for _, slot in views.values()]
        self.copied = [(s, self.averages[s.name]) for s, p in held if p is Policy.COPY]
        self.averaged = [(s, self.averages[s.name]) for s, p in held if p is not Policy.COPY]
        if join and not waiting:
            self.fingerprint = self._new_fingerprint()

    def _refuse_shared(self) -> None:
        """Refuse a model in which an average's own tensor has replaced the one that is averaged."""
        kept = {slot.name for slot in self.slots}
        for slot in all_slots(self._model):
            average = None if slot.name in kept else self.averages.get(slot.name)
            if average is None or not (memory.has_memory(local(average)) and memory.has_memory(local(slot.tensor))):
                continue
            if local(slot.tensor).data_ptr() == local(average).data_ptr():
                raise MemoryLayoutError(
                    f"the model must have memory of its own, and its {slot.name!r} is the average itself, as after "
                    "load_state_dict(ema.model.state_dict(), assign=True); leave out assign, or load clones"
                )

    def _new_fingerprint(self) -> Fingerprint:
        return Fingerprint(self._model, list(self.averages.values()) if self._guarded else ())

    def _found(self) -> list[Slot]:
        # A teacher over the average may be part of the model, and its memory is that of the averages.
        return list(slots(self._model, views=self._settings.views, foreign=list(map(local, self.averages.values()))))

    def _policy_of(self, slot: Slot, through: set[str]) -> Policy:
        if slot.name in self.policies:
            return self.policies[slot.name]
        policy = Policy.AVERAGE if slot.name in through else decided(self._settings.policy, slot)
        if policy is Policy.LEAVE:
            return policy
        check_layout(slot, policy)
        # A buffer with -inf in it is a mask, not a running statistic.
        mask = policy is Policy.AVERAGE and not slot.is_parameter and not bool(local(slot.tensor).isfinite().all())
        self.policies[slot.name] = Policy.COPY if mask else policy
        return self.policies[slot.name]

    def _place(self, slot: Slot) -> None:
        """Make a tensor's average, or move it to the tensor's device."""
        average = self.averages.get(slot.name)
        if average is None:
            self.add(slot)
            return
        if slot.tensor.is_meta and not local(average).is_meta:
            raise MemoryLayoutError(
                f"a model must keep its memory to be averaged, and {slot.name!r} is on the meta device now; the "
                "average is where it was: copy it by state_dict(), or load the model's weights"
            )
        device = self._settings.device or local(slot.tensor).device
        if local(average).device != device:
            self.averages[slot.name] = sharding.beside(average, local(average).to(device))

    def waiting(self) -> list[str]:
        """Return the names of tensors that will join at the next update."""
        if self.holds():
            return []
        through = trained_through(views_of(self._model, tied=self._settings.views), self._settings.policy)
        policy = self._settings.policy
        joining = (s for s in self._found() if s.name in through or decided(policy, s) is not Policy.LEAVE)
        return sorted(slot.name for slot in joining if slot.name not in self.averages)

    def expect(self, averages: Mapping[str, Tensor], waiting: set[str]) -> dict[str, Slot]:
        """Return the places in the model of the averages that are to be loaded, and of those that stay.

        Args:
            averages: The saved averages.
            waiting: The names of tensors that were to join: their averages so far are dropped.
        """
        found = self._found()
        self.averages = {name: own for name, own in self.averages.items() if name in averages or name not in waiting}
        # A tensor that is frozen here and was not in the saved run is still averaged.
        return {slot.name: slot for slot in found if slot.name in averages or slot.name in self.averages}

    def view(self, tensors: Mapping[str, Tensor], slot: Slot) -> Tensor | None:
        """Return what replaces a tensor of the model: its own, or a view of the one whose memory it shares.

        Args:
            tensors: The replacements by name.
            slot: The tensor's place in the model.

        Raises:
            MemoryLayoutError: If it reads the memory as another dtype.
        """
        if slot.name not in self.views:
            return tensors.get(slot.name)
        owner, place = self.views[slot.name]
        if owner not in tensors:
            return None
        if place is None:
            raise MemoryLayoutError(
                f"a module over the average needs a view for each tensor, and {slot.name!r} reads the memory of "
                f"{owner!r} as another dtype; use applied(), which swaps the average into the model"
            )
        return place.view(tensors[owner])

    def device(self) -> torch.device | None:
        """Return the device of the averages: an accelerator if any of them is on one; None if there are none."""
        devices = [local(average).device for _, average in self.averaged]
        return next(chain((d for d in devices if d.type != "cpu"), devices), None)


def _is_finite(slot: Slot) -> bool:
    tensor = local(slot.tensor)
    numeric = tensor.is_floating_point() or tensor.is_complex()
    return not (slot.is_parameter and numeric) or bool(tensor.isfinite().all())

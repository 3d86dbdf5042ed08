"""Moves averages towards a model's tensors, and compares them between ranks."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from polyak import sharding
from polyak.averaging.agreement import agree_on_plain
from polyak.averaging.creation import place_of
from polyak.averaging.listing import Listing
from polyak.averaging.offload import Offloader
from polyak.averaging.quarantine import Quarantine
from polyak.averaging.settings import Settings
from polyak.averaging.swap import swap_of
from polyak.errors import ShardingError
from polyak.kernels import Update, counted, lerp
from polyak.sharding import Ranks, is_spread, local, rows
from polyak.tensors.slots import places_of


class Movement:
    """Averages of a model's tensors that move towards them, in place or in the background.

    Args:
        model: The model in training, unwrapped.
        settings: How averages are kept.

    Attributes:
        model: As given.
        settings: As given.
        listing: The averages, and the tensor that belongs to each.
        quarantine: Counts tensors with NaN or inf.
        num_updates: How often the averages have moved.
        offloader: Updates them in the background; None if nothing does, or it must be made again.
    """

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self.listing, self.quarantine = Listing(model, settings), Quarantine()
        self.num_updates = 0
        self.offloader: Offloader | None = None
        # The update of a kernel, which is valid until a tensor moves in memory, and the copies to make after it.
        self._update: Update | None = None
        self._copies = list[tuple[Tensor, Tensor]]()
        self._counted, self._exposed = list[Tensor](), False
        self.refresh(join=True)

    def move(self, weight: float) -> None:
        """Move every average by ``weight`` of the way to the model's tensors; copy what is copied.

        Args:
            weight: The weight, from 0 to 1.
        """
        fingerprint = self.listing.fingerprint
        if fingerprint is None or not fingerprint.holds():
            self.refresh(join=True)
        update = self._update or self._new_update()
        if self._exposed:
            # Autograd then refuses a backward pass that needs an earlier value of an average. Averages that nobody else
            # holds need no counter, and counting 4,000 of them takes a third of the time of their update.
            increment_version(self._counted)
        update(weight, self.num_updates + 1)
        self.num_updates += 1
        for copied, tensor in self._copies:
            copied.copy_(tensor.detach())

    def expose(self) -> dict[str, Tensor]:
        """Return the averages by name, for callers that may move them, or compute gradients with them."""
        self.wait()
        self._exposed = True
        self.listing.guard()
        return self.listing.averages

    def make_room(self, sizes: Mapping[str, int]) -> None:
        """Grow the memory of averages to have room for padding after them. References to them stay valid.

        Args:
            sizes: By name, the number of elements for which there must be memory.

        Raises:
            ShardingError: If the memory of an average cannot grow.
        """
        self.wait()
        for name, size in sizes.items():
            shard = local(self.listing.averages[name])
            storage, needed = shard.untyped_storage(), size * shard.element_size()
            if not shard.is_contiguous() or shard.storage_offset():
                raise ShardingError(
                    f"an average must have memory of its own for FSDP2 to gather it, and {name!r} is a view of other "
                    "memory; use applied(), which swaps the average into the model"
                )
            if storage.nbytes() < needed:
                storage.resize_(needed)
                self.listing.fingerprint = None  # it may have moved, and kernels note addresses
        self.follow_model()

    @torch.no_grad()
    def _new_update(self) -> Update:
        """Return the update of the averages, and keep it if it can be used again."""
        averaged, counter, offload = self.listing.averaged, self.quarantine.counter, self.settings.offload
        averages = [local(average) for _, average in averaged]
        self._counted = counted(averages)
        # The model's own tensors, not aliases of them: an alias would keep memory that the model frees.
        tensors = [rows(slot.tensor, average) for slot, average in averaged]
        places = [place_of(slot.name, average) for slot, average in averaged]
        copies = [(local(copied), local(slot.tensor)) for slot, copied in self.listing.copied]
        self._copies = copies if offload is None else []
        if offload is not None:
            self._update = self.offloader = Offloader(
                offload,
                lambda staged: lerp(averages, staged, places, counter),
                tensors,
                [slot.is_parameter for slot, _ in averaged],
                copies,
            )
            return self._update
        online = [tensor.to(average.device) for tensor, average in zip(tensors, averages, strict=True)]
        update = lerp(averages, online, places, counter)
        # If the averages are on another device, `online` are copies for this update only.
        if all(tensor is own for tensor, own in zip(online, tensors, strict=True)):
            self._update = update
        return update

    def follow_model(self) -> None:
        """List the tensors again if something has moved in memory. New tensors join only in updates."""
        if not self.listing.holds():
            self.refresh(join=not self.listing.slots)

    @torch.no_grad()
    def refresh(self, *, join: bool) -> None:
        """List the tensors again, unless nothing has moved in memory.

        Args:
            join: Whether new tensors join.
        """
        sharding.reshard(self.model)
        if self.listing.holds():
            return
        self.wait()
        self.listing.fingerprint = self._update = self.offloader = None
        self.listing.refresh(join=join)
        self.quarantine.move_to(self.listing.device())

    def wait(self) -> None:
        """Wait for the update in the background, before an average is read."""
        if self.offloader is not None:
            self.offloader.wait()

    def reset(self, num_updates: int, num_quarantined: int) -> None:
        """Continue with averages that were loaded.

        Args:
            num_updates: How often they have moved.
            num_quarantined: How many tensors had NaN or inf.
        """
        self.num_updates = num_updates
        self.quarantine.reset(num_quarantined)
        self.listing.fingerprint = self.offloader = None
        self.follow_model()

    @torch.no_grad()
    def agree(self, ranks: Ranks, facts: Mapping[str, Any]) -> None:
        """Check that all ranks average the same, and copy rank 0's averages of buffers to all ranks.

        Args:
            ranks: All of which must call this.
            facts: What else they must agree on.

        Raises:
            ShardingError: If they do not; it says which rank and what.
        """
        known = ranks.on_every_rank("the average", self._facts, facts)
        if ranks.replicas:
            known["tensors with NaN or inf"] = self.quarantine.total
        else:
            self.quarantine.sum_over(ranks)
        ranks.agree("the average", known)
        averages, places = self.listing.averages, places_of(self.model)
        slots = [slot for slot in self.listing.slots if not places.differs(slot.name, slot.tensor)]
        agree_on_plain(ranks, {slot.name: averages[slot.name] for slot in slots if slot.is_parameter})
        ranks.broadcast(averages[s.name] for s in slots if not s.is_parameter and not is_spread(s.tensor))

    def _facts(self) -> dict[str, Any]:
        """Return what ranks must agree on in addition to values. An error here on one rank is raised on all."""
        self.follow_model()
        self.wait()
        swap, places = swap_of(self.model), places_of(self.model)
        same = {name: a for name, a in self.listing.averages.items() if not places.differs(name, a)}
        return {
            "swapped in": swap.owner if swap else None,
            "number of updates": self.num_updates,
            "tensors": {name: f"{tuple(a.shape)} of {a.dtype}" for name, a in same.items()},
        }

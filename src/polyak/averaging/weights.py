"""The averaged tensors of a model: how they move, how they are swapped into the model, what is saved of them."""

import math
import warnings
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from polyak import sharding
from polyak.averaging.offload import Offload, Offloader, hold_writes
from polyak.averaging.swap import Swap, refuse_merged, swap_of
from polyak.averaging.view import module_over
from polyak.errors import CopyError, DtypeError, LoanError, MemoryLayoutError, QuarantineWarning, ShardingError
from polyak.kernels import Place, Update, lerp
from polyak.sharding import Ranks, is_spread, local, rows
from polyak.tensors import memory, optimizers
from polyak.tensors.fingerprint import Fingerprint
from polyak.tensors.slots import (
    Policy,
    PolicyRule,
    Slot,
    all_slots,
    check_match,
    default_policy,
    slots,
    trained_through,
    unwrap,
    views_of,
)

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Shadow:
    """The average of a model's weights, tensor by tensor, beginning with their current values.

    Args:
        model: The model in training, wrapped or not.
        dtype: The dtype of the averages. None stands for the model's own, and float32 where that has 16 bits;
            16-bit averages are rounded stochastically, since plain ones do not move at long half-lives.
        policy: What is done with which tensor.
        device: Where the averages are; None for where the model is.
        mesh: Ranks over which the averages are divided, of a model that each of them has in full. A swap gathers them.
        offload: Instead of a device, that averages are on the CPU and move there in the background, and how. All
            methods but ``update_`` wait until they have.
        views: Whether a tensor in another one's memory, such as a transposed alias, has an average of its own. It is
            for averages that are never swapped in.

    Raises:
        ValueError: If ``dtype`` is not a floating-point dtype of 16 bits or more, if both ``device`` and ``offload``
            are given, if ``mesh`` has several dimensions or the model is sharded already, or if ``policy`` does not
            leave a sparse tensor.
        MemoryLayoutError: If a tensor that ``policy`` does not leave overlaps another one in part or itself, or is a
            wrapper of inner tensors, or has a dtype that cannot be averaged.

    Attributes:
        averages: The averaged and the copied tensors by canonical name. While swapped into a model of the same dtype,
            they may hold the training weights.
        num_updates: How often it has moved.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> shadow = Shadow(model)
        >>> _ = nn.init.constant_(model.weight, 2.0), shadow.averages["weight"].fill_(1.0)
        >>> shadow.update_(weight=0.25)
        >>> with shadow.lent(holder="the example"):
        ...     model.weight.item()
        1.25
        >>> model.weight.item()
        2.0
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        dtype: torch.dtype | None = None,
        policy: PolicyRule = default_policy,
        device: torch.device | str | None = None,
        mesh: "DeviceMesh | None" = None,
        offload: Offload | None = None,
        views: bool = False,
    ) -> None:
        if dtype not in (None, torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype must be None, float64, float32, bfloat16 or float16 (got {dtype!r})")
        self._model = unwrap(model)
        self._dtype = dtype
        self._policy = policy
        if offload is not None and device is not None:
            raise ValueError(f"device must be None for an offloaded average, which is on the CPU (got {device!r})")
        self._offload = offload
        self._device = torch.device("cpu") if offload else None if device is None else torch.device(device)
        self._mesh = mesh
        if mesh is not None and (mesh.ndim > 1 or any(is_spread(tensor) for tensor in self._model.parameters())):
            raise ValueError(
                "mesh must have one dimension, and the model must be whole on each of its ranks; the average of a "
                f"sharded model is sharded as it is, without mesh (got {mesh})"
            )
        self._offloader: Offloader | None = None
        self._averages: dict[str, Tensor] = {}
        self.num_updates = 0
        self._quarantined = torch.zeros((), dtype=torch.int64, device="cpu")
        self._quarantined_before = 0
        self._quarantined_by_rank: list[int] = []
        self._slots: list[Slot] = []
        self._averaged: list[tuple[Slot, Tensor]] = []
        self._copied: list[tuple[Slot, Tensor]] = []
        self._fingerprint: Fingerprint | None = None
        self._lerp: Update | None = None
        self._swap: Swap | None = None
        self._with_views = views
        self._views = dict[str, tuple[str, memory.Place | None]]()  # of the owner's name, for what shares its memory
        self._view_slots = list[Slot]()
        self._policies = dict[str, Policy]()  # as decided once: an evaluation or a resume must not decide otherwise
        self._exposed = list[Callable[[], object]]()  # what others hold of the averages' memory, by weak references
        optimizers.watch()
        self._follow_model()

    def _new_average(self, slot: Slot, dtype: torch.dtype | None = None) -> Tensor:
        tensor = slot.tensor
        given, dtype = dtype, dtype or tensor.dtype
        if given is None and dtype in _AVERAGED and dtype.is_floating_point:
            wide = self._dtype or torch.promote_types(dtype, torch.float32)
            # What is copied must not lose a bit.
            dtype = torch.promote_types(dtype, wide) if self._policies.get(slot.name) is Policy.COPY else wide
        if self._mesh is not None and slot.is_parameter and tensor.dim():
            average = sharding.divided(tensor, dtype, self._mesh, self._device)
            _check_range(slot.name, local(average), rows(tensor, average))
            return average
        part = local(tensor).detach().as_subclass(Tensor)
        copy = torch.empty_like(part, dtype=dtype, device=self._device, requires_grad=False).copy_(part)
        _check_range(slot.name, copy, part)
        if slot.name in self._views:
            # It had its memory in another tensor, whose average knows better than the weights of this moment.
            owner, place = self._views[slot.name]
            if place is not None and owner in self._averages and not is_spread(tensor):
                copy.copy_(place.view(local(self._averages[owner])))
        return sharding.beside(tensor, copy)

    def _policy_of(self, slot: Slot, through: set[str]) -> Policy:
        if slot.name in self._policies:
            return self._policies[slot.name]
        policy = Policy.AVERAGE if slot.name in through else self._policy(slot)
        if policy is Policy.LEAVE:
            return policy
        check_layout(slot, policy)
        # A buffer with -inf in it is a mask, not a running statistic.
        mask = policy is Policy.AVERAGE and not slot.is_parameter and not bool(local(slot.tensor).isfinite().all())
        self._policies[slot.name] = Policy.COPY if mask else policy
        return self._policies[slot.name]

    def _follow_model(self, *, join: bool = False) -> None:
        """List the tensors again if the model's or the averages have moved.

        Args:
            join: Whether new ones join, with their current values. An evaluation or a state must not decide on that.
        """
        if self._fingerprint is None or not self._fingerprint.holds():
            self._list_tensors(join=join or not self._slots)

    @torch.no_grad()
    def _list_tensors(self, *, join: bool) -> None:
        sharding.reshard(self._model)
        if self._fingerprint is not None and self._fingerprint.holds():
            return
        self._wait()
        self._fingerprint = self._lerp = self._offloader = None
        # A teacher that is the average may be part of the model: its memory is ours.
        ours = [local(average) for average in self._averages.values()]
        found = list(slots(self._model, views=self._with_views, foreign=ours))
        views = views_of(self._model, tied=self._with_views)
        for name in views:
            self._averages.pop(name, None)
        through = trained_through(views, self._policy)
        if not join:
            found = [slot for slot in found if slot.name in self._averages]
        policies = [(slot, self._policy_of(slot, through)) for slot in found]
        # What is frozen on the way is still averaged: its average has not arrived yet.
        held = [(s, p) for s, p in policies if p is not Policy.LEAVE or s.name in self._averages]
        # What joins begins with its value, which must be one.
        waiting = [s.name for s, _ in held if self._slots and s.name not in self._averages and not _is_finite(s)]
        held = [(slot, policy) for slot, policy in held if slot.name not in waiting]
        for slot, _ in held:
            average = self._averages.get(slot.name)
            if average is not None and slot.tensor.is_meta and not local(average).is_meta:
                raise MemoryLayoutError(
                    f"a model must keep its memory to be averaged, and {slot.name!r} is on the meta device now; the "
                    "average is where it was: copy it by state_dict(), or load the model's weights"
                )
            if average is None:
                self._averages[slot.name] = self._new_average(slot)
            elif local(average).device != (device := self._device or local(slot.tensor).device):
                self._averages[slot.name] = sharding.beside(average, local(average).to(device))
        self._slots = [slot for slot, _ in held]
        check_match("the model must keep the averaged tensors", self._averages, self._online())
        _check_memory(self._averages)
        self._views = {
            name: (own.name, memory.Place.of(local(own.tensor), local(slot.tensor)))
            for name, (own, slot) in views.items()
        }
        self._view_slots = [slot for _, slot in views.values()]
        self._copied = [(s, self._averages[s.name]) for s, p in held if p is Policy.COPY]
        self._averaged = [(s, self._averages[s.name]) for s, p in held if p is not Policy.COPY]
        # Where some are on a GPU, the count is there: elsewhere it would have to be waited for.
        devices = [local(average).device for _, average in self._averaged]
        if devices:
            self._quarantined = self._quarantined.to(next((d for d in devices if d.type != "cpu"), devices[0]))
        if join and not waiting:
            self._fingerprint = Fingerprint(self._model, list(self._averages.values()))

    @property
    def averages(self) -> dict[str, Tensor]:
        """The averaged and the copied tensors by canonical name."""
        self._wait()
        return self._averages

    def _wait(self) -> None:
        """Wait for the update in the background, which whoever reads an average has to."""
        if self._offloader is not None:
            self._offloader.wait()

    @torch.no_grad()
    def _new_lerp(self) -> Update:
        """Return what moves the averages, and keep it where it is good for more than one update."""
        averages = [local(average) for _, average in self._averaged]
        # The model's own tensors, not aliases of them: an alias would keep memory that the model gives up.
        tensors = [rows(slot.tensor, average) for slot, average in self._averaged]
        places = [_place(slot.name, average) for slot, average in self._averaged]
        if self._offload is not None:
            self._lerp = self._offloader = Offloader(
                self._offload,
                lambda staged: lerp(averages, staged, places, self._quarantined),
                tensors,
                [slot.is_parameter for slot, _ in self._averaged],
                [(local(copied), local(slot.tensor)) for slot, copied in self._copied],
            )
            return self._lerp
        online = [tensor.to(average.device) for tensor, average in zip(tensors, averages, strict=True)]
        update = lerp(averages, online, places, self._quarantined)
        # Where the average is on another device, `online` are copies: of this update only.
        if all(tensor is own for tensor, own in zip(online, tensors, strict=True)):
            self._lerp = update
        return update

    def kinds(self) -> dict[str, tuple[Tensor, bool]]:
        """Return each average by name, and whether it is one: the others are copies."""
        averaged = {slot.name for slot, _ in self._averaged}
        return {name: (tensor, name in averaged) for name, tensor in self.averages.items()}

    def _online(self) -> dict[str, Tensor]:
        return {slot.name: slot.tensor.detach() for slot in self._slots}

    def update_(self, weight: float) -> None:
        """Move every average by ``weight`` of the way to the model's weights; copy what is copied.

        A value that is not finite leaves its element of the average as it was; tensors with such values are counted.

        Args:
            weight: From 0 to 1: one less the decay.

        Raises:
            LoanError: If the model holds an average, this or another.
            MismatchError: If an averaged tensor is gone from the model or has changed its shape.
            OffloadError: If the update before failed in the background.
        """
        if swap := swap_of(self._model):
            raise LoanError(
                f"an average must not take in averaged weights: {swap.holder} has swapped its average in; restore the "
                "training weights first"
            )
        self._follow_model(join=True)
        update = self._lerp or self._new_lerp()
        update(weight, self.num_updates + 1)
        self.num_updates += 1
        if self._copied and self._offloader is None:
            self._copy()

    @torch.no_grad()
    def _copy(self) -> None:
        for slot, copied in self._copied:
            local(copied).copy_(local(slot.tensor))

    @property
    def num_quarantined(self) -> int:
        """How many tensors came in with values that are not finite so far. Reading it waits for the device.

        What other ranks saw in their shards is in it as of the last ``agree``.
        """
        self._wait()
        own = int(self._quarantined)
        return self._quarantined_before + (sum(self._quarantined_by_rank) if self._quarantined_by_rank else own)

    def warn_of_quarantine(self, since: int = 0) -> int:
        """Warn if more than ``since`` tensors came in with values that are not finite, and return how many did.

        Args:
            since: What the last call returned.
        """
        count = self.num_quarantined
        if count > since:
            where = f" (by rank: {self._quarantined_by_rank})" if self._quarantined_by_rank else ""
            warnings.warn(
                f"weights must be finite to be averaged: {count - since} tensors with inf or nan came in{where}, and "
                "those values were kept out of the average; look at the loss and the learning rate",
                QuarantineWarning,
                stacklevel=2,
            )
        return count

    @torch.no_grad()
    def distance(self, ranks: Ranks | None = None) -> float:
        """Return the norm of weights minus average over that of the average, both over all averaged parameters.

        Relative, so that it says the same of any model. It takes a pass over both, and waits for the device.

        Args:
            ranks: That train the model together, if there are several. All must call this.

        Raises:
            LoanError: If the model holds another average.
        """
        if (swap := swap_of(self._model)) and swap is not self._swap:
            raise LoanError(
                f"the model must hold its own weights for their distance: {swap.holder} has swapped its own in"
            )
        sharding.reshard(self._model)
        averages, online = self.averaged_tensors(), self._active.training() if self._active else self._online()
        sums = torch.zeros(2, dtype=torch.float64)
        for name in (slot.name for slot, _ in self._averaged if slot.is_parameter):
            parts = local(averages[name]), rows(online[name], averages[name])
            share = 1.0 if ranks is None else ranks.share(averages[name])
            # In pieces, so that the differences take little memory.
            for average, weights in zip(*(part.reshape(-1).split(1 << 22) for part in parts), strict=True):
                wide = average.to(torch.promote_types(average.dtype, torch.float32))
                norms = torch.stack([(weights.to(wide) - wide).norm(), wide.norm()])
                sums = sums.to(norms.device) + share * norms.double().square()
        apart, length = (ranks.total(sums) if ranks else sums).sqrt().tolist()
        if length == 0:
            return 0.0 if apart == 0 else math.inf
        return apart / length

    @torch.no_grad()
    def agree(self, ranks: Ranks, facts: Mapping[str, Any]) -> None:
        """Check that all ranks average the same, and give all of them the first one's averages of buffers.

        Buffers, such as the statistics of BatchNorm, follow what each rank has seen. The averages of parameters that
        are not sharded must be equal bit for bit. All ranks must call this.

        Args:
            ranks: That train the model together.
            facts: What else they must agree on.

        Raises:
            ShardingError: If they do not; it says which rank and what.
        """
        said = ranks.each("the average", self._facts, facts)
        if ranks.replicas:
            said["tensors with inf or nan"] = self.num_quarantined
        else:
            self._quarantined_by_rank = ranks.sums(int(self._quarantined))
        ranks.agree("the average", said)
        agree_on_plain(ranks, {slot.name: self.averages[slot.name] for slot in self._slots if slot.is_parameter})
        ranks.broadcast(self.averages[s.name] for s in self._slots if not s.is_parameter and not is_spread(s.tensor))

    def _facts(self) -> dict[str, Any]:
        """Return what ranks must agree on besides values. What fails here on one rank is raised on all."""
        self._follow_model()
        swap = swap_of(self._model)
        return {
            "swapped in": swap.holder if swap else None,
            "number of updates": self.num_updates,
            "tensors": {name: f"{tuple(a.shape)} of {a.dtype}" for name, a in self.averages.items()},
        }

    @property
    def _active(self) -> Swap | None:
        """The swap of this average, as long as it is in the model. One that was left half done ends here."""
        if self._swap is not None and not self._swap.active:
            self._swap = None  # it keeps the model's memory
        return self._swap

    @property
    def holder(self) -> str | None:
        """Who has swapped this average into the model, or None."""
        return self._active.holder if self._active else None

    def lend(self, holder: str) -> None:
        """Put the average in the model until ``give_back``.

        Where model and average have one dtype their values are exchanged in place, through a scratch buffer of at most
        1 MiB, whatever their layout. Otherwise, and while somebody holds ``averaged_model`` or a state, the model's own
        bits are copied to a backup of the model's size. Lists take a KiB a tensor.

        Args:
            holder: Who asks, to name it in errors.

        Raises:
            LoanError: If the model holds an average already, this or another, or if adapters are merged in it.
        """
        if other := swap_of(self._model):
            raise LoanError(
                f"a model can hold one average at a time: {other.holder} has swapped its own in when {holder} would; "
                "restore the training weights first"
            )
        refuse_merged(self._model)
        self._follow_model()
        self._wait()
        averages = [self._averages[slot.name] for slot in self._slots]
        held = {slot.name for slot in self._slots}
        left = [slot for slot in all_slots(self._model) if slot.name not in held and slot.name not in self._views]
        views = [slot for slot in self._view_slots if not slot.is_parameter]
        swap = Swap(self._model, self._slots, averages, left, views, keep_averages=self._is_exposed())
        try:
            self._swap = swap
            swap.begin(holder)
        except BaseException:
            swap.end()
            self._swap = None
            raise

    def _is_exposed(self) -> bool:
        """Whether somebody holds tensors over the averages' memory, who would read the training weights in it."""
        self._exposed = [alive for alive in self._exposed if alive() is not None]
        return bool(self._exposed)

    def give_back(self) -> None:
        """Restore the training weights in the model, bit for bit.

        Raises:
            LoanError: If the average is not in the model, or a parameter was changed while it was.
        """
        swap = self._active
        if swap is None:
            raise LoanError("the average must be in the model before the training weights can be restored (it is not)")
        try:
            swap.end()
        finally:
            swap.end()
            self._swap = None

    @contextmanager
    def lent(self, holder: str) -> Iterator[nn.Module]:
        """Put the average in the model for a ``with`` block, however that ends.

        Args:
            holder: Who asks, to name it in errors.

        Raises:
            LoanError: If the model holds an average already, this or another.
        """
        before = self._swap
        try:
            self.lend(holder)
            yield self._model
        finally:
            if self._swap is not before and self._active:
                self.give_back()

    def averaged_tensors(self) -> dict[str, Tensor]:
        """Return the average by name, wherever it is now."""
        if not self._active:
            return dict(self.averages)
        sharding.reshard(self._model)
        return self._active.averages()

    def averaged_model(self) -> nn.Module:
        """Return a module whose tensors are the averages: no copy of them, in eval mode, without gradients.

        It is made anew by each call, from the model as it is then. While the average is swapped in this is the model
        itself. Frozen parameters are shared with the model.

        Raises:
            CopyError: If the module would still compute with the model's own tensors, or cannot be made.
            LoanError: If adapters are merged in the model.
        """
        if self._active:
            return self._model
        refuse_merged(self._model)
        self._follow_model()
        self._wait()
        module = self._module_over(self._averages)
        self._match_dtypes(module)
        own = {id(tensor) for tensor in self._model.parameters()}
        self._exposed += [weakref.ref(t) for t in (*module.parameters(), *module.buffers()) if id(t) not in own]
        return module

    def _match_dtypes(self, module: nn.Module) -> None:
        """Widen buffers of a view that have the model's dtype where the averages have a wider one.

        Frozen layers, which may be large, refuse a call instead.
        """
        changed = {slot.tensor.dtype: average.dtype for slot, average in self._averaged}
        averaged = {slot.name for slot, _ in self._averaged}
        averaged |= {name for name, (owner, _) in self._views.items() if owner in averaged}
        for slot in list(all_slots(module)):
            dtype = slot.tensor.dtype
            if slot.name in averaged or changed.get(dtype, dtype) == dtype:
                continue
            if slot.is_parameter:
                slot.owner.register_forward_pre_hook(_refuse_mixed_call)
            elif torch.promote_types(dtype, changed[dtype]) == changed[dtype]:  # no bit is lost
                slot.owner._buffers[slot.attribute] = slot.tensor.to(changed[dtype])  # noqa: SLF001

    def training_model(self) -> nn.Module:
        """Return a module with the training weights: the model itself, unless the average is in it."""
        return self._module_over(self._active.training()) if self._active else self._model

    def _module_over(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Copy the model's structure over ``tensors``, and over its own parameters for the rest."""
        if self._mesh is not None or sharding.is_fsdp(self._model):
            raise ShardingError(
                "a module of its own needs full tensors, and the average is sharded; swap it into the model"
            )
        found = ((slot, self._view(tensors, slot)) for slot in all_slots(self._model))
        return module_over(self._model, {id(slot.tensor): tensor for slot, tensor in found if tensor is not None})

    def _view(self, tensors: Mapping[str, Tensor], slot: Slot) -> Tensor | None:
        """Return what stands for a tensor of the model: its own, or the view of the one whose memory it shares."""
        if slot.name not in self._views:
            return tensors.get(slot.name)
        owner, place = self._views[slot.name]
        if owner not in tensors:
            return None
        if place is None:
            raise MemoryLayoutError(
                f"a module of its own needs a view for each tensor, and {slot.name!r} reads the memory of {owner!r} as "
                "another dtype; use applied(), which swaps the average into the model"
            )
        return place.view(tensors[owner])

    @torch.no_grad()
    def copy_to(self, model: nn.Module, *, training: bool = False) -> None:
        """Copy the average, or the training weights, into another model with the same names.

        Args:
            model: To be overwritten; not the model in training.
            training: Whether to copy the training weights.

        Raises:
            MismatchError: If names or shapes differ.
        """
        sharding.reshard(self._model)
        sharding.reshard(model)
        source = {slot.name: slot.tensor.detach() for slot in all_slots(self._model)}
        if not training:
            source |= self.averaged_tensors()
        elif self._active:
            source |= self._active.training()
        for slot in all_slots(self._model):
            if slot.name in self._views:
                view = self._view(source, slot)
                source[slot.name] = slot.tensor if view is None else view
        target = {slot.name: slot.tensor for slot in all_slots(model)}
        check_match("the model to fill must be like the one in training", source, target)
        for name, tensor in target.items():
            sharding.copy_(tensor.detach(), source[name])

    def state_dict(self) -> dict[str, Any]:
        """Return the averages by name and the counters; while the average is in the model, the training weights too.

        The tensors are over the averages' memory: they follow later updates, and as long as they are held a swap leaves
        the averages where they are.
        """
        averages = self.averaged_tensors()
        state: dict[str, Any] = {
            "averages": averages,
            "num_updates": self.num_updates,
            "num_quarantined": self.num_quarantined,
            # As text, since `torch.distributed.checkpoint` takes lists apart.
            "copied": "\n".join(sorted(name for name in averages if self._policies.get(name) is Policy.COPY)),
            "waiting": "\n".join(self._waiting()),
            "dtype": str(self._dtype),
        }
        if self._active:
            state["training"] = self._active.training()
        else:
            state["averages"] = {n: sharding.beside(a, local(a).detach()) for n, a in averages.items()}
            self._exposed += map(weakref.ref, state["averages"].values())
        return state

    def _waiting(self) -> list[str]:
        """Return the names of tensors that will join at the next update."""
        if self._fingerprint is not None and self._fingerprint.holds():
            return []
        through = trained_through(views_of(self._model, tied=self._with_views), self._policy)
        found = slots(self._model, views=self._with_views, foreign=[local(a) for a in self._averages.values()])
        joining = (s for s in found if s.name in through or self._policy(s) is not Policy.LEAVE)
        return sorted(slot.name for slot in joining if slot.name not in self._averages)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned, under any wrapper of the model.

        A state that was taken while the average was lent brings the training weights along, and the model gets them.

        Args:
            state: As saved.

        Raises:
            LoanError: If the model holds an average.
            MismatchError: If names or shapes differ from the model's.
        """
        if swap := swap_of(self._model):
            raise LoanError(f"a state can be loaded only into training weights, and {swap.holder} has swapped them out")
        sharding.reshard(self._model)
        if self._offloader is not None:
            self._offloader.settle()  # what comes replaces a broken average as well
        averages: Mapping[str, Tensor] = state["averages"]
        # A tensor that is frozen here and was not there is averaged on.
        ours = [local(average) for average in self._averages.values()]
        found = slots(self._model, views=self._with_views, foreign=ours)
        waiting = set((state.get("waiting") or "").splitlines())
        self._averages = {name: own for name, own in self._averages.items() if name in averages or name not in waiting}
        held = {s.name: s for s in found if s.name in averages or s.name in self._averages}
        online = {name: slot.tensor.detach() for name, slot in held.items()}
        check_match("a saved average must fit the model", online, averages)
        training: Mapping[str, Tensor] | None = state.get("training")
        if training:
            check_match("saved training weights must fit the model", online, training)
        hold_writes()
        # What was decided then holds on: a mask that was infinite may be finite now.
        if state.get("copied") is not None:
            copied = state["copied"].splitlines()
            self._policies |= {name: Policy.COPY if name in copied else Policy.AVERAGE for name in online}
        keeps_dtypes = state.get("dtype") == str(self._dtype)  # the model may have had another when averaging began
        for name, tensor in online.items():
            average = self._averages.get(name)
            if average is None or (keeps_dtypes and average.dtype != averages[name].dtype):
                average = self._new_average(held[name], averages[name].dtype if keeps_dtypes else None)
                self._averages[name] = average
            sharding.copy_(average, averages[name])
            if training:
                sharding.copy_(tensor, training[name])
        self.num_updates = int(state["num_updates"])
        self._quarantined_before = int(state["num_quarantined"])
        self._quarantined_by_rank.clear()
        self._quarantined = torch.zeros((), dtype=torch.int64, device="cpu")
        self._fingerprint = self._offloader = None
        self._follow_model()


_AVERAGED = {torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.complex128}


def check_layout(slot: Slot, policy: Policy) -> None:
    """Check that a tensor can be averaged or copied, and swapped.

    Args:
        slot: Where it is.
        policy: What is to be done with it.

    Raises:
        MemoryLayoutError: If its class, its dtype or its layout does not allow it.
        ValueError: If it is sparse.
    """
    tensor = local(slot.tensor)
    if slot.tensor.layout != torch.strided:
        raise ValueError(
            f"only strided tensors can be averaged or copied: the policy must leave {slot.name!r} (got {policy!r} "
            f"for one of {slot.tensor.layout})"
        )
    remedy = "freeze it, or leave it out by EMA(policy=...)"
    if memory.is_wrapper(tensor):
        raise MemoryLayoutError(
            f"an averaged tensor must have memory of its own, and {slot.name!r} is a {type(tensor).__name__}, which "
            f"keeps its values in inner tensors; {remedy}"
        )
    if policy is Policy.AVERAGE and tensor.dtype not in _AVERAGED:
        known = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in _AVERAGED))
        raise MemoryLayoutError(
            f"an averaged tensor must be one of {known} ({slot.name!r} has {tensor.dtype}); {remedy}"
        )
    if memory.has_memory(tensor) and memory.overlaps_itself(memory.compact(tensor)):
        raise MemoryLayoutError(
            f"the elements of an averaged or copied tensor must not share memory, and some of {slot.name!r} do (shape "
            f"{tuple(tensor.shape)}, strides {tensor.stride()}); register a .clone() of it, or {remedy}"
        )


def _refuse_mixed_call(module: nn.Module, inputs: object) -> None:
    del inputs
    tensor = next(module.parameters(recurse=False))
    if not torch.is_autocast_enabled(tensor.device.type):
        raise CopyError(
            f"ema_model must have one dtype to be called, and a frozen {type(module).__name__} of it has "
            f"{tensor.dtype}, the average another; evaluate the model in `with attached.applied():`, use "
            f"torch.autocast, or average in EMA(dtype={tensor.dtype})"
        )


def _is_finite(slot: Slot) -> bool:
    tensor = local(slot.tensor)
    numeric = tensor.is_floating_point() or tensor.is_complex()
    return not (slot.is_parameter and numeric) or bool(tensor.isfinite().all())


def _check_range(name: str, average: Tensor, tensor: Tensor) -> None:
    """Refuse an average that would begin with inf where the model's value is finite."""
    dtype = average.dtype
    if not dtype.is_floating_point or torch.finfo(dtype).max >= torch.finfo(tensor.dtype).max:
        return
    if bool((average.isinf() & tensor.isfinite().to(average.device)).any()):
        raise DtypeError(
            f"values must be at most {torch.finfo(dtype).max:g} to be averaged in {dtype} (got "
            f"{float(tensor.abs().max()):g} in {name!r}): use a dtype with a wider range, or None for the model's"
        )


def _check_memory(averages: Mapping[str, Tensor]) -> None:
    """Check that the averages still have their memory: others may hold tensors over it, and resize them."""
    for name, average in averages.items():
        part = local(average)
        size = sum(stride * (n - 1) for n, stride in zip(part.shape, part.stride(), strict=True)) + 1
        if part.numel() and part.untyped_storage().nbytes() < (part.storage_offset() + size) * part.element_size():
            raise MemoryLayoutError(
                f"an average must keep its memory, and that of {name!r} has shrunk to "
                f"{part.untyped_storage().nbytes()} bytes: do not resize what state_dict() gave, and load a state"
            )


def _place(name: str, average: Tensor) -> Place:
    seed, offset = zlib.crc32(name.encode()), sharding.offset(average)
    return Place(seed) if offset is None else Place(seed, tuple(average.shape), offset)


# Rows that a checksum takes together: what it needs in memory next to the tensors.
_PIECE = 1 << 20
_AS_INT = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_REMEDY = (
    "a parameter of which each rank holds a shard, such as experts, must be a DTensor (DTensor.from_local with Shard), "
    "or be left out by policy; if all ranks should have the same, one went astray: resume from a checkpoint"
)


@torch.no_grad()
def agree_on_plain(ranks: Ranks, tensors: Mapping[str, Tensor]) -> None:
    """Check that what is not sharded is equal on all ranks bit for bit: it is saved as rank 0 has it.

    Args:
        ranks: All of which must call this.
        tensors: By name, sharded or not; the same names on all ranks.

    Raises:
        ShardingError: If it is not; it names the tensors.
    """
    plain = {name: tensor.detach() for name, tensor in tensors.items() if not is_spread(tensor)}
    ranks.agree("the average", {"sum of the bits of": _checksums(plain)}, _REMEDY)


def _checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return for each tensor the sum of its bits taken as integers: equal on each device, in whatever order.

    Rows are weighted by their places, so that the same rows in another order have another sum.
    """
    sums = list(map(_checksum, tensors.values()))
    first = sums[0].device if sums else None
    return dict(zip(tensors, torch.stack([one.to(first) for one in sums]).tolist() if sums else [], strict=True))


def _checksum(tensor: Tensor) -> Tensor:
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    bits = real.view(_AS_INT[real.element_size()])
    rows = (bits.sum(-1, dtype=torch.int64) if bits.dim() > 1 else bits).reshape(-1)
    total = torch.zeros((), dtype=torch.int64, device=rows.device)
    for at, piece in enumerate(rows.split(_PIECE)):
        first = at * _PIECE + 1
        total += (piece * torch.arange(first, first + len(piece), device=rows.device)).sum()
    return total


def refuse_unsynchronized(ranks: Ranks | None, model: nn.Module, policy: PolicyRule) -> None:
    """Refuse to save averages of parameters that ``DistributedDataParallel`` does not keep equal: one rank's are saved.

    Nothing is communicated, so that rank 0 can save the state by itself where each rank has the full model.

    Args:
        ranks: That train the model together, if there are several.
        model: Wrapped or not.
        policy: What is done with which tensor.

    Raises:
        ShardingError: If there are such parameters; it names them.
    """
    ignored = set(map(id, ranks.unsynchronized)) if ranks else set[int]()
    names = [slot.name for slot in slots(model) if id(slot.tensor) in ignored and policy(slot) is not Policy.LEAVE]
    if names:
        raise ShardingError(
            "a parameter must be the same on all ranks for one of them to save its average, and "
            f"DistributedDataParallel was told to ignore {names[:8]}{' and more' if len(names) > 8 else ''}: make each "
            "a DTensor (DTensor.from_local with Shard), or leave it out by policy"
        )

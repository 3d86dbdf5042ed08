"""Swaps the average into a model, and restores the training weights.

A swap that has begun also ends, whatever happens: an exception, an interrupt at any line, a tensor that was moved. The
phase says how far it is. If an interrupt leaves it incomplete, the next reader completes it. All tensors here are
detached, instead of using `torch.no_grad`, since an interrupt in its exit would leave gradients switched off.
"""

import sys
import threading
import warnings
from collections.abc import Callable, Collection, Sequence
from enum import Enum
from itertools import compress

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from polyak import kernels, sharding
from polyak.averaging.buffers import Buffer, kept_names
from polyak.averaging.changes import report_changed, warn_of_gradients
from polyak.averaging.derived import forget_derived
from polyak.averaging.gradients import Gradients
from polyak.averaging.held import Held
from polyak.averaging.offload import hold_writes
from polyak.averaging.scales import Scales
from polyak.averaging.versions import Versions
from polyak.errors import LoanError, PlanWarning
from polyak.sharding import is_spread, local, rows
from polyak.tensors import memory, optimizers
from polyak.tensors.slots import Slot, all_slots, own_attribute, rescaled_in_forward, unwrap


class Phase(Enum):
    """How far a swap is. Only in OUT are all training weights in the model."""

    OUT = "out"
    ENTERING = "entering"
    IN = "in"
    LEAVING = "leaving"


class Swap:
    """Puts averages into a model and restores the training weights, bit for bit.

    Parameters with the same dtype and device as their averages are exchanged with them in place, which takes no memory.
    All others are copied to a backup, and so are all parameters if the averages must stay where they are. Buffers
    always have a backup, since an evaluation may change them. Nothing else may change, which is checked by checksums.

    Args:
        model: The model, unwrapped.
        slots: The places in the model of the tensors that have an average.
        averages: Their averages.
        left: The places of the other tensors.
        views: The places of buffers over the memory of others, which are swapped with them.
        keep_averages: Whether the averages must stay where they are, because somebody else reads them.

    Attributes:
        owner: The name of the average that was swapped in, for errors.
        scope: The swap ends when this object is gone; None if only a call ends it.
    """

    def __init__(
        self,
        model: nn.Module,
        slots: Sequence[Slot],
        averages: Sequence[Tensor],
        left: Sequence[Slot],
        views: Sequence[Slot],
        *,
        keep_averages: bool,
    ) -> None:
        self.owner = ""
        self.scope: Callable[[], object] | None = None
        self.phase = Phase.OUT
        self.model, self._slots, self._averages = model, slots, averages
        self._lock = threading.RLock()
        # Aliases keep this memory where it is, whatever happens to the model.
        self._tensors = [rows(slot.tensor, a).detach() for slot, a in zip(slots, averages, strict=True)]
        self._shards = [local(a) for a in averages]
        # What a forward pass may change is copied to a backup, and its changes are not reported.
        rescaled = rescaled_in_forward(model)
        self._steady = [id(slot.tensor) not in rescaled for slot in slots]
        self._exchanged = [
            slot.is_parameter and steady and not keep_averages and _exchangeable(t, a)
            for slot, steady, t, a in zip(slots, self._steady, self._tensors, self._shards, strict=True)
        ]
        self._exchange = kernels.swap(
            *(list(compress(side, self._exchanged)) for side in (self._tensors, self._shards))
        )
        self._backup = dict[int, Tensor]()  # by number of the slot
        self._buffers = list[Buffer]()
        self._left = [slot for slot in left if not slot.is_parameter]
        self._views = views
        self._kept = kept_names(self._left)
        watched = [s for s in left if s.name not in self._kept and id(s.tensor) not in rescaled]
        self._watched = [(s.name, memory.compact(local(s.tensor).detach())) for s in watched if _has_bits(s.tensor)]
        self._sums: list[int] | None = None
        self._changed = list[str]()
        self._held = [Held(slot) for slot in all_slots(model) if slot.is_parameter]
        self.parameters = {id(held.tensor) for held in self._held}
        self._versions = Versions(self._tensors)
        self._gradients: Gradients | None = None
        self._scales: Scales | None = None
        self._sharded = [slot for slot in slots if is_spread(slot.tensor)]
        # Tensors that are not sharded, but whose average is.
        self._gathered = [
            slot for slot, a in zip(slots, averages, strict=True) if is_spread(a) > is_spread(slot.tensor)
        ]
        self._mesh = next((a.device_mesh for a in averages if is_spread(a)), None)

    @property
    def active(self) -> bool:
        """Whether the model does not hold its training weights. A swap that was left incomplete ends now."""
        self.settle()
        return self.phase is not Phase.OUT

    def begin(self, owner: str) -> None:
        """Put the average in the model. After an error or an interrupt, ``end`` restores what was changed.

        Args:
            owner: The name of the average, for errors.
        """
        with self._lock:
            hold_writes()
            self.owner = owner
            # All allocations come before any change. A backup is on the average's device. If that is not the model's,
            # the model's device has no memory for it.
            for i, (slot, tensor, shard) in enumerate(zip(self._slots, self._tensors, self._shards, strict=True)):
                if not slot.is_parameter:
                    self._buffers.append(Buffer(slot, slot.tensor, tensor, tensor.clone()))
                elif not self._exchanged[i]:
                    self._backup[i] = tensor.to(shard.device, copy=True)
            for slot in self._left:
                alias = local(slot.tensor).detach()
                before = alias.clone() if slot.name in self._kept else None
                self._buffers.append(Buffer(slot, slot.tensor, alias, before))
            for slot in self._views:
                self._buffers.append(Buffer(slot, slot.tensor, local(slot.tensor).detach(), None))
            self._gradients = Gradients({held.slot.name: held.tensor for held in self._held})
            self._scales = Scales(slot.tensor for slot in self._slots)
            _SWAPS[id(self.model)] = self
            self.phase = Phase.ENTERING
            self._exchange.forward()
            for i, (tensor, shard) in enumerate(zip(self._tensors, self._shards, strict=True)):
                if not self._exchanged[i]:
                    memory.write_(tensor, shard)
            self._scales.clear()
            self._gather()
            self._publish()
            self._versions.leave()
            self._sums = kernels.checksums(self._all_watched())
            self.phase = Phase.IN

    def end(self) -> None:
        """Restore the training weights, bit for bit. If this is interrupted, it can be called again.

        Raises:
            LoanError: If a parameter was changed while the average was in the model, or a tensor cannot be restored.
                All others are restored first.
        """
        with self._lock:
            if self.phase is Phase.OUT:
                return
            if self._sums is not None:
                self._note_changes(self._sums)
                self._sums = None
            self.phase = Phase.LEAVING
            # Try twice, since an allocation that fails may succeed a moment later.
            failures = self._restore() and self._restore()
            if not failures:
                self._versions.restore()
            exchanged = (slot.name for slot in compress(self._slots, self._exchanged))
            changed = self._changed + list(compress(exchanged, self._exchange.changed))
            graded = self._gradients.restore() if self._gradients is not None else []
            self.phase = Phase.OUT
            _SWAPS.pop(id(self.model), None)
            self._backup.clear()
            self._buffers.clear()
            self._changed.clear()
            self._gradients = self._scales = None
        if graded:
            warn_of_gradients(graded, self.owner)
        if failures:
            raise LoanError(
                f"training weights must be restored after a swap, and {failures[0][0]!r} could not be "
                f"({failures[0][1]}; {len(failures)} in all): load a checkpoint"
            ) from failures[0][1]
        if changed:
            report_changed(changed, self.owner)

    def _note_changes(self, before: Sequence[int]) -> None:
        names = [*(self._slots[i].name for i in self._backup if self._steady[i]), *(name for name, _ in self._watched)]
        try:
            sums = kernels.checksums(self._all_watched())
        except Exception:  # restoring the weights matters more than knowing whether they changed
            return
        self._changed = [name for name, now, then in zip(names, sums, before, strict=True) if now != then]
        self._changed += [held.slot.name for held in self._held if held.is_replaced]

    def settle(self) -> None:
        """End the swap if an interrupt has left it incomplete, or its scope no longer exists.

        Raises:
            LoanError: If a signal handler calls this while weights are being exchanged.
        """
        if self.phase in (Phase.ENTERING, Phase.LEAVING):
            if _is_running(self):
                raise LoanError(
                    f"a signal handler must not use weights while {self.owner} exchanges them; only note in it that "
                    "the signal came, and save or evaluate after the step"
                )
            with self._lock:
                if self.phase in (Phase.ENTERING, Phase.LEAVING):
                    self.end()
        elif self.phase is Phase.IN and self.scope is not None and self.scope() is None:
            self.end()  # first: the warning may be made an error
            warnings.warn(
                f"the swap by {self.owner} was left without its end, perhaps by an interrupt: the training weights "
                "were restored now",
                PlanWarning,
                stacklevel=3,
            )

    def averages(self) -> dict[str, Tensor]:
        """Return the averages by name, wherever they are now."""
        swapped = self.active
        found = zip(self._slots, self._averages, self._tensors, self._exchanged, strict=True)
        return {s.name: sharding.beside(a, t) if swapped and exchanged else a for s, a, t, exchanged in found}

    def training(self) -> dict[str, Tensor]:
        """Return the training weights by name, while the average is in the model."""
        buffers = {buffer.slot.name: buffer.before for buffer in self._buffers if buffer.before is not None}
        found = dict[str, Tensor]()
        for i, (slot, average) in enumerate(zip(self._slots, self._averages, strict=True)):
            kept = average if self._exchanged[i] else self._backup.get(i, buffers.get(slot.name))
            assert kept is not None
            found[slot.name] = average if kept is average else sharding.beside(average, kept)
        return found

    def _all_watched(self) -> list[Tensor]:
        backups = [memory.compact(self._tensors[i]) for i in self._backup if self._steady[i]]
        return backups + [tensor for _, tensor in self._watched]

    def _restore(self) -> list[tuple[str, Exception]]:
        """Restore all tensors that can be; return those that cannot, each with its error."""
        failures = list[tuple[str, Exception]]()

        def attempt(name: str, act: Callable[[], object]) -> None:
            try:
                act()
            except Exception as error:  # the other tensors must be restored, whatever it is
                failures.append((name, error))

        attempt("the exchanged parameters", self._exchange.back)
        for i, kept in self._backup.items():
            attempt(self._slots[i].name, lambda i=i, kept=kept: memory.write_(self._tensors[i], kept))
        if self._scales is not None:
            attempt("scales of weights", self._scales.restore)
        attempt("the shards", self._reshard)
        for held in self._held:
            attempt(held.slot.name, held.put_back)
        for slot, tensor, average in zip(self._slots, self._tensors, self._averages, strict=True):
            if slot.is_parameter:
                # It may have been moved or replaced while it held the average.
                attempt(slot.name, lambda slot=slot, tensor=tensor, average=average: _follow(slot, tensor, average))
        modules = set(self.model.modules())
        for slot in self._slots:
            attempt(slot.name, lambda slot=slot: _check_in(slot, modules))
        moved = any(held.is_moved for held in self._held)
        for buffer in self._buffers:
            attempt(buffer.slot.name, lambda buffer=buffer: buffer.restore(moved=moved))
        attempt("the gathered rows", self._gather)
        attempt("the weights that follow masters", self._publish)
        return failures

    def _gather(self) -> None:
        """Give every rank all rows of tensors whose average is sharded and which are not."""
        if self._gathered and self._mesh is not None:
            sharding.gather([slot.tensor for slot in self._gathered], self._mesh)

    def _publish(self) -> None:
        """Update what depends on the weights: caches of torch, and the weights that follow an engine's masters."""
        forget_derived()
        if (publish := own_attribute(self.model, "publish_weights")) is not None:
            publish()

    def _reshard(self) -> None:
        """Reshard, so that no module holds full tensors that were gathered from averaged shards."""
        if self._sharded:
            sharding.reshard(self.model)
            if not all(is_spread(slot.tensor) for slot in self._sharded):
                sharding.reshard_after_an_error(self.model)


def _is_running(swap: Swap) -> bool:
    """Return whether `begin` or `end` of a swap is on the stack of this thread."""
    frame = sys._getframe(1)  # noqa: SLF001
    while frame is not None:
        if frame.f_code.co_qualname in ("Swap.begin", "Swap.end") and frame.f_locals.get("self") is swap:
            return True
        frame = frame.f_back
    return False


_SWAPS = dict[int, Swap]()  # by id of the model, which its swap keeps alive


def swap_of(model: nn.Module) -> Swap | None:
    """Return the swap that keeps a model's training weights, if there is one. If its scope no longer exists, end it.

    Args:
        model: Wrapped or not.
    """
    swap = _SWAPS.get(id(unwrap(model))) if _SWAPS else None
    if swap is None and _SWAPS:
        own = {id(parameter) for parameter in model.parameters()}
        swap = next((other for other in list(_SWAPS.values()) if own & other.parameters), None)
    return swap if swap is not None and swap.active else None


def refuse_second_swap(model: nn.Module, owner: str) -> None:
    """Refuse to swap an average into a model that holds one already.

    Args:
        model: Wrapped or not.
        owner: The name of the second average, for the error.

    Raises:
        LoanError: If the model holds an average.
    """
    if other := swap_of(model):
        raise LoanError(
            f"a model can hold one average at a time: {other.owner} has swapped its own in when {owner} would; restore "
            "the training weights first"
        )


def refuse_averaged_weights(model: nn.Module) -> None:
    """Refuse to move an average towards a model that holds averaged weights.

    Args:
        model: Wrapped or not.

    Raises:
        LoanError: If the model holds an average.
    """
    if swap := swap_of(model):
        raise LoanError(
            f"an average must not take in averaged weights: {swap.owner} has swapped its average in; restore the "
            "training weights first"
        )


def _refuse_step(optimizer: Optimizer) -> None:
    for swap in list(_SWAPS.values()):
        moved = (id(p) for group in optimizer.param_groups for p in group["params"])
        if any(p in swap.parameters for p in moved) and swap.active:
            raise LoanError(
                f"an optimizer step must not run on averaged weights: {swap.owner} has swapped its average in; "
                "restore the training weights first"
            )


optimizers.guards.append(_refuse_step)


def _exchangeable(tensor: Tensor, average: Tensor) -> bool:
    """Return whether the two can exchange their values in place."""
    if tensor.dtype != average.dtype or tensor.device != average.device or tensor.is_inference():
        return False
    plain = not (tensor.is_conj() or tensor.is_neg() or average.is_conj() or average.is_neg())
    return plain and not memory.is_expanded(tensor)


def _has_bits(tensor: Tensor) -> bool:
    return memory.has_memory(local(tensor)) and not tensor.is_quantized


def _check_in(slot: Slot, modules: Collection[nn.Module]) -> None:
    """Check that the module of a restored tensor is still in the model, which has other weights otherwise."""
    if slot.owner not in modules:
        raise ValueError("its module was replaced in the model, which keeps the new one")


def _follow(slot: Slot, tensor: Tensor, average: Tensor) -> None:
    """Copy restored weights to the parameter's current tensor, if that is another one."""
    here = rows(slot.tensor, average)
    if here.data_ptr() != tensor.data_ptr():
        if here.is_meta:
            raise ValueError("it is on the meta device now")
        if here.shape != tensor.shape:
            raise ValueError(f"it has the shape {tuple(here.shape)} now, and had {tuple(tensor.shape)}")
        memory.write_(here, tensor)


def refuse_merged(model: nn.Module) -> None:
    """Refuse a model with adapters merged into frozen weights, which would keep computing with the training adapters.

    Args:
        model: The model that is about to hold the average, or to be copied for it.

    Raises:
        LoanError: If a module with frozen and trained parameters has a true ``merged``, as those of LoRA have.
    """
    for name, module in model.named_modules():
        if own_attribute(module, "merged") is True and len({p.requires_grad for p in module.parameters()}) > 1:
            raise LoanError(
                f"adapters must not be merged when the average replaces them, and those of {name or 'the model'!r} "
                "are: call train(), or unmerge them, before"
            )

"""The averaged tensors of a model: how they move, how they are lent to the model, what is saved of them."""

import copy
import math
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import compress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from polyak import sharding
from polyak.errors import DtypeError, LoanError, QuarantineWarning, ShardingError
from polyak.kernels import Exchange, Lerp, Place, counting_with
from polyak.offload import Offload, Offloader, hold_writes
from polyak.select import Inventory, Policy, PolicyRule, Slot, check_match, default_policy, slots, unwrap
from polyak.sharding import Ranks, is_spread, local, rows

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Loan:
    """An average in a model, and what has to be given back to it.

    ``Shadow.lend`` makes one. While it stands, an optimizer step over the model's parameters raises. It may stand again
    once it has ended.

    Args:
        model: Who gets the average, unwrapped.
        slots: Where in it.
        averages: What each of these places gets.
        unmoved: Whether the model still holds the same tensors in the same places.

    Attributes:
        holder: Who lends, to name it in errors.
    """

    @torch.no_grad()
    def __init__(
        self, model: nn.Module, slots: Sequence[Slot], averages: Sequence[Tensor], unmoved: Callable[[], bool]
    ) -> None:
        self.holder = ""
        self._model, self._slots, self._averages, self._unmoved = model, slots, averages, unmoved
        # What is here of each: all that follows is done to shards beside shards, and to rows beside rows.
        parts = [(rows(slot.tensor, a), local(a)) for slot, a in zip(slots, averages, strict=True)]
        # Values of one dtype change places. Others need room.
        self._alike = [a.dtype == t.dtype and a.device == t.device for t, a in parts]
        alike = list(compress(parts, self._alike))
        self._exchange = Exchange([t for t, _ in alike], [a for _, a in alike])
        self._converting = [a for (_, a), same in zip(parts, self._alike, strict=True) if not same]
        self._tensors: list[Tensor] = []
        self._aside: list[Tensor] = []
        self._parameters = {id(slot.tensor) for slot in slots if slot.is_parameter}
        self._sharded = [slot for slot in slots if is_spread(slot.tensor)]
        # Where the average is divided over ranks and the model is not.
        self._divided = [slot for slot, a in zip(slots, averages, strict=True) if is_spread(a) > is_spread(slot.tensor)]
        self._mesh = next((a.device_mesh for a in averages if is_spread(a)), None)
        self._guard: RemovableHandle | None = None

    @property
    def may_stay(self) -> bool:
        """Whether what this keeps when it has ended is no memory of the model's."""
        return not self._exchange.has_views

    @property
    def _converted(self) -> list[Tensor]:
        return [tensor for tensor, same in zip(self._tensors, self._alike, strict=True) if not same]

    @property
    def kept(self) -> dict[str, Tensor]:
        """The training weights by name, as long as the loan stands."""
        aside = iter(self._aside)
        found = zip(self._slots, self._averages, self._alike, strict=True)
        return {slot.name: a if same else sharding.beside(a, next(aside)) for slot, a, same in found}

    @torch.no_grad()
    def start(self, holder: str) -> None:
        """Put the average in the model. After an error or an interrupt, ``end`` puts right what was begun.

        Args:
            holder: Who lends.
        """
        hold_writes()
        self.holder = holder
        # Aliases, so that this memory stays where it is, whatever becomes of the model.
        self._tensors = [rows(slot.tensor, a).detach() for slot, a in zip(self._slots, self._averages, strict=True)]
        # What can run out of memory comes before any change. An average that is on another device is there for want of
        # room on this one.
        self._aside = [t.to(a.device, copy=True) for t, a in zip(self._converted, self._converting, strict=True)]
        _LOANS[id(self._model)] = self
        self._guard = register_optimizer_step_pre_hook(self._refuse_step)
        self._exchange.forward()
        if self._aside:
            torch._foreach_copy_(self._converted, self._converting)
        self._gather()

    @torch.no_grad()
    def end(self) -> None:
        """Put the training weights back, bit for bit. It may be called again when it was interrupted."""
        self._exchange.back()
        if self._aside:
            torch._foreach_copy_(self._converted, self._aside)
        self._reshard()
        if self._tensors and not self._unmoved():
            # The model may have been moved, or have replaced a tensor, while it held the average.
            for slot, tensor, average in zip(self._slots, self._tensors, self._averages, strict=True):
                here = rows(slot.tensor, average)
                if here.data_ptr() != tensor.data_ptr():
                    here.copy_(tensor)
        self._gather()
        if self._guard:
            self._guard.remove()
        _LOANS.pop(id(self._model), None)
        self._tensors = self._aside = list[Tensor]()

    def _gather(self) -> None:
        """Let every rank have all rows where the average is divided and the model is not."""
        if self._divided and self._mesh is not None:
            sharding.gather([slot.tensor for slot in self._divided], self._mesh)

    def _reshard(self) -> None:
        """Let no module hold whole tensors that were gathered from averaged shards."""
        if self._sharded:
            sharding.reshard(self._model)
            if not all(is_spread(slot.tensor) for slot in self._sharded):
                sharding.reshard_after_an_error(self._model)

    def _refuse_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        del args, kwargs
        if any(id(p) in self._parameters for group in optimizer.param_groups for p in group["params"]):
            raise LoanError(
                f"an optimizer step must not run on averaged weights: {self.holder} has lent its average to the model; "
                "let it be given back first"
            )


_LOANS = dict[int, Loan]()  # by id of the model, which its loan keeps alive


def _check_range(name: str, tensor: Tensor, average: Tensor) -> None:
    """Refuse an average that would begin with inf where the model's value is finite."""
    dtype = average.dtype
    if not dtype.is_floating_point or torch.finfo(dtype).max >= torch.finfo(tensor.dtype).max:
        return
    if bool((average.isinf() & tensor.isfinite().to(average.device)).any()):
        raise DtypeError(
            f"values must be at most {torch.finfo(dtype).max:g} to be averaged in {dtype} (got "
            f"{float(tensor.abs().max()):g} in {name!r}): use a dtype with a wider range, or None for the model's"
        )


def loan_of(model: nn.Module) -> Loan | None:
    """Return the loan that ``model`` holds, if any.

    Args:
        model: Wrapped or not.
    """
    return _LOANS.get(id(unwrap(model)))


class Shadow:
    """The average of a model's weights, tensor by tensor, beginning with their current values.

    Args:
        model: The model in training, wrapped or not.
        dtype: The dtype of the averages. None stands for the model's own, and float32 where that has 16 bits;
            16-bit averages are rounded stochastically, since plain ones do not move at long half-lives.
        policy: What is done with which tensor.
        device: Where the averages are; None for where the model is.
        mesh: Ranks over which the averages are divided, of a model that each of them has whole. A loan gathers them.
        offload: Instead of a device, that averages are on the CPU and move there in the background, and how. All
            methods but ``update_`` wait until they have.

    Raises:
        ValueError: If ``dtype`` is not a floating-point dtype of 16 bits or more, if both ``device`` and ``offload``
            are given, if ``mesh`` has several dimensions or the model is sharded already, or if ``policy`` does not
            leave a sparse tensor.

    Attributes:
        averages: The averaged and the copied tensors by canonical name. While lent to a model of the same dtype, they
            hold the training weights.
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
        # All averages share the counter by which autograd knows that a tensor has changed since it was used: they move
        # at once, and to count that up for each takes as long as to move a small one.
        self._counter = torch.empty(0)
        self.num_updates = 0
        self._quarantined = torch.zeros((), dtype=torch.int64)
        self._quarantined_before = 0
        self._quarantined_by_rank: list[int] = []
        self._slots: list[Slot] = []
        self._averaged: list[tuple[Slot, Tensor]] = []
        self._copied: list[tuple[Slot, Tensor]] = []
        self._inventory: Inventory | None = None
        self._lerp: Callable[[float, int], None] | None = None
        self._lender: Loan | None = None
        self._loan: Loan | None = None
        self._module: nn.Module | None = None
        self._follow_model()

    def _new_average(self, slot: Slot) -> Tensor:
        tensor = slot.tensor
        dtype = tensor.dtype
        if dtype.is_floating_point:
            dtype = self._dtype or torch.promote_types(dtype, torch.float32)
        if self._mesh is not None and slot.is_parameter and tensor.dim():
            average = sharding.divided(tensor, dtype, self._mesh, self._device)
            _check_range(slot.name, rows(tensor, average), local(average))
            return average
        part = local(tensor)
        copy = torch.empty_like(part, dtype=dtype, device=self._device, requires_grad=False).copy_(part)
        _check_range(slot.name, part, copy)
        return sharding.beside(tensor, counting_with(self._counter, copy))

    def _policy_of(self, slot: Slot) -> Policy:
        policy = self._policy(slot)
        if policy is not Policy.LEAVE and slot.tensor.layout != torch.strided:
            raise ValueError(
                f"only strided tensors can be averaged or copied: the policy must leave {slot.name!r} (got {policy!r} "
                f"for one of {slot.tensor.layout})"
            )
        # A buffer with -inf in it is a mask, not a running statistic.
        mask = policy is Policy.AVERAGE and not slot.is_parameter and not bool(local(slot.tensor).isfinite().all())
        return Policy.COPY if mask else policy

    def _follow_model(self) -> None:
        """List the tensors again if the model's have changed: new ones join, beginning with their current values."""
        if self._inventory is None or not self._inventory.holds():
            self._list_tensors()

    @torch.no_grad()
    def _list_tensors(self) -> None:
        sharding.reshard(self._model)
        if self._inventory is not None and self._inventory.holds():
            return
        self._wait()
        self._inventory = self._lerp = self._offloader = self._lender = None
        policies = [(slot, self._policy_of(slot)) for slot in slots(self._model)]
        # What is frozen on the way goes on being averaged: its average has not arrived yet.
        held = [(s, p) for s, p in policies if p is not Policy.LEAVE or s.name in self.averages]
        for slot, _ in held:
            average = self.averages.get(slot.name)
            if average is None:
                self.averages[slot.name] = self._new_average(slot)
            elif local(average).device != (device := self._device or local(slot.tensor).device):
                self.averages[slot.name] = sharding.beside(average, local(average).to(device))
        self._slots, self._module = [slot for slot, _ in held], None
        check_match("the model must keep the averaged tensors", self.averages, self._online())
        self._copied = [(s, self.averages[s.name]) for s, p in held if p is Policy.COPY]
        self._averaged = [(s, self.averages[s.name]) for s, p in held if p is not Policy.COPY]
        # Where some are on a GPU, the count is there: elsewhere it would have to be waited for.
        devices = [local(average).device for _, average in self._averaged]
        if devices:
            self._quarantined = self._quarantined.to(next((d for d in devices if d.type != "cpu"), devices[0]))
        self._inventory = Inventory(self._model)

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
    def _new_lerp(self) -> Callable[[float, int], None]:
        """Return what moves the averages, and keep it where it is good for more than one update."""
        averages = [local(average) for _, average in self._averaged]
        # The model's own tensors, not aliases of them: an alias would keep memory that the model gives up.
        tensors = [rows(slot.tensor, average) for slot, average in self._averaged]
        places = [_place(slot.name, average) for slot, average in self._averaged]
        if self._offload is not None:
            self._lerp = self._offloader = Offloader(
                self._offload,
                lambda staged: Lerp(averages, staged, places, self._quarantined),
                tensors,
                [slot.is_parameter for slot, _ in self._averaged],
                [(local(copied), local(slot.tensor)) for slot, copied in self._copied],
            )
            return self._lerp
        online = [tensor.to(average.device) for tensor, average in zip(tensors, averages, strict=True)]
        lerp = Lerp(averages, online, places, self._quarantined)
        # Where the average is on another device, `online` are copies: of this update only.
        if all(tensor is own for tensor, own in zip(online, tensors, strict=True)):
            self._lerp = lerp
        return lerp

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
        if loan := _LOANS.get(id(self._model)):
            raise LoanError(
                f"an average must not take in averaged weights: {loan.holder} has lent its average to the model; "
                "let it be given back first"
            )
        self._follow_model()
        lerp = self._lerp or self._new_lerp()
        lerp(weight, self.num_updates + 1)
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
        if (loan := loan_of(self._model)) and loan is not self._loan:
            raise LoanError(f"the model must hold its own weights for their distance: {loan.holder} has lent its own")
        sharding.reshard(self._model)
        averages, online = self.averaged_tensors(), self._loan.kept if self._loan else self._online()
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

        Buffers, such as the statistics of BatchNorm, follow what each rank has seen. Where every rank has the whole
        model their averages of parameters must be equal bit for bit. All ranks must call this.

        Args:
            ranks: That train the model together.
            facts: What else they must agree on.

        Raises:
            ShardingError: If they do not; it says which rank and what.
        """
        self._follow_model()
        said = {
            **facts,
            "number of updates": self.num_updates,
            "tensors": {name: f"{tuple(a.shape)} of {a.dtype}" for name, a in self.averages.items()},
        }
        if ranks.replicas:
            own = [(slot.name, average) for slot, average in self._averaged if slot.is_parameter]
            said["tensors with inf or nan"] = self.num_quarantined
            said["sum of the bits of"] = _checksums({name: average for name, average in own if not is_spread(average)})
        else:
            self._quarantined_by_rank = ranks.sums(int(self._quarantined))
        ranks.agree("the average", said)
        ranks.broadcast(self.averages[s.name] for s in self._slots if not s.is_parameter and not is_spread(s.tensor))

    @property
    def holder(self) -> str | None:
        """Who has lent this average to the model, or None."""
        return self._loan.holder if self._loan else None

    def lend(self, holder: str) -> None:
        """Put the average in the model until ``give_back``.

        Where model and average have one dtype their values change places, through a scratch buffer of at most 1 MiB,
        however they are laid out. Otherwise the model's own bits are kept aside, which takes the model's size in
        memory. Lists take a KiB a tensor.

        Args:
            holder: Who asks, to name it in errors.

        Raises:
            LoanError: If the model holds an average already, this or another.
        """
        if other := loan_of(self._model):
            raise LoanError(
                f"a model can hold one average at a time: {other.holder} has lent its own when {holder} would; "
                "let the first be given back"
            )
        self._follow_model()
        self._wait()
        if self._lender is None:
            assert self._inventory is not None
            averages = [self._averages[slot.name] for slot in self._slots]
            self._lender = Loan(self._model, self._slots, averages, self._inventory.holds)
        self._loan = loan = self._lender
        try:
            loan.start(holder)
        except BaseException:
            self.give_back()
            raise

    def give_back(self) -> None:
        """Put the training weights back in the model, bit for bit.

        Raises:
            LoanError: If the average is not lent.
        """
        if not self._loan:
            raise LoanError("the average must be lent before it can be given back (it is not)")
        try:
            self._loan.end()
        except BaseException:
            self._loan.end()
            raise
        finally:
            if not self._loan.may_stay:
                self._lender = None
            self._loan = None

    @contextmanager
    def lent(self, holder: str) -> Iterator[nn.Module]:
        """Lend the average to the model for the length of a ``with`` block, however that ends.

        Args:
            holder: Who asks, to name it in errors.

        Raises:
            LoanError: If the model holds an average already, this or another.
        """
        before = self._loan
        try:
            self.lend(holder)
            yield self._model
        finally:
            if self._loan is not before:
                self.give_back()

    def averaged_tensors(self) -> dict[str, Tensor]:
        """Return the average by name, wherever it is now."""
        if not self._loan:
            return dict(self.averages)
        sharding.reshard(self._model)
        kept, online = self._loan.kept, self._online()
        return {
            name: sharding.beside(own, rows(online[name], own)) if local(kept[name]) is local(own) else own
            for name, own in self.averages.items()
        }

    def averaged_model(self) -> nn.Module:
        """Return a module whose tensors are the averages: no copy, in eval mode, without gradients.

        While the average is lent this is the model itself. Frozen parameters are shared with the model.
        """
        if self._loan:
            return self._model
        self._follow_model()
        self._wait()
        if self._module is None:
            self._module = self._module_over(self.averages)
        return self._module

    def training_model(self) -> nn.Module:
        """Return a module with the training weights: the model itself, unless the average is lent to it."""
        return self._module_over(self._loan.kept) if self._loan else self._model

    def _module_over(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Copy the model's structure over ``tensors``, and over its own parameters for the rest."""
        memo = dict[int, Any]()
        for slot in slots(self._model):
            if slot.name in tensors:
                tensor = tensors[slot.name]
                memo[id(slot.tensor)] = nn.Parameter(tensor, requires_grad=False) if slot.is_parameter else tensor
            elif slot.is_parameter:
                memo[id(slot.tensor)] = slot.tensor
        if self._mesh is not None or sharding.is_fsdp(self._model):
            raise ShardingError(
                "a module of its own needs whole tensors, and the average is in shards; lend it to the model"
            )
        return copy.deepcopy(self._model, memo).eval()

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
        source = {slot.name: slot.tensor.detach() for slot in slots(self._model)}
        if not training:
            source |= self.averaged_tensors()
        elif self._loan:
            source |= self._loan.kept
        target = {slot.name: slot.tensor for slot in slots(model)}
        check_match("the model to fill must be like the one in training", source, target)
        for name, tensor in target.items():
            sharding.copy_(tensor.detach(), source[name])

    def state_dict(self) -> dict[str, Any]:
        """Return the averages by name and the counters; while the average is lent, the training weights too."""
        state: dict[str, Any] = {
            "averages": self.averaged_tensors(),
            "num_updates": self.num_updates,
            "num_quarantined": self.num_quarantined,
        }
        if self._loan:
            state["training"] = dict(self._loan.kept)
        return state

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
        if loan := loan_of(self._model):
            raise LoanError(f"a state cannot be loaded while {loan.holder} has lent its average to the model")
        sharding.reshard(self._model)
        if self._offloader is not None:
            self._offloader.settle()  # what comes replaces a broken average as well
        averages: Mapping[str, Tensor] = state["averages"]
        # A tensor that is frozen here and was not there is averaged on.
        held = {s.name: s for s in slots(self._model) if s.name in averages or s.name in self._averages}
        online = {name: slot.tensor.detach() for name, slot in held.items()}
        check_match("a saved average must fit the model", online, averages)
        training: Mapping[str, Tensor] | None = state.get("training")
        if training:
            check_match("saved training weights must fit the model", online, training)
        hold_writes()
        for name, tensor in online.items():
            sharding.copy_(self._averages.setdefault(name, self._new_average(held[name])), averages[name])
            if training:
                sharding.copy_(tensor, training[name])
        self.num_updates = int(state["num_updates"])
        self._quarantined_before = int(state["num_quarantined"])
        self._quarantined_by_rank.clear()
        self._quarantined = torch.zeros((), dtype=torch.int64)
        self._inventory = self._offloader = self._lender = None
        self._follow_model()


def _place(name: str, average: Tensor) -> Place:
    seed, offset = zlib.crc32(name.encode()), sharding.offset(average)
    return Place(seed) if offset is None else Place(seed, tuple(average.shape), offset)


_AS_INT = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return for each tensor the sum of its bits taken as integers: equal on each device, in whatever order."""
    reals = {n: torch.view_as_real(t) if t.is_complex() else t for n, t in tensors.items()}
    sums = [tensor.view(_AS_INT[tensor.element_size()]).sum(dtype=torch.int64) for tensor in reals.values()]
    return dict(zip(reals, torch.stack(sums).tolist() if sums else [], strict=True))

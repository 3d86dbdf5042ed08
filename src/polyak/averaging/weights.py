"""``Shadow``: the averaged tensors of a model. It moves them, swaps them in, saves and copies them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from polyak import sharding
from polyak.averaging.distance import relative_distance
from polyak.averaging.fullyshard import sharded_module
from polyak.averaging.modules import averaged_module, copy_into, module_of, own_tensors
from polyak.averaging.movement import Movement
from polyak.averaging.offload import Offload
from polyak.averaging.outofrange import warn_of_range
from polyak.averaging.saving import load_tensors, tensors_state
from polyak.averaging.settings import settings_for
from polyak.averaging.swap import refuse_averaged_weights, refuse_merged
from polyak.averaging.swapper import Swapper
from polyak.sharding import Ranks
from polyak.tensors import optimizers
from polyak.tensors.slots import PolicyRule, default_policy, unwrap

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Shadow:
    """The average of a model's weights, tensor by tensor. It begins with their current values.

    Args:
        model: The model in training, wrapped or not.
        dtype: The dtype of the averages. None for the model's own, and float32 where that has 16 bits; 16-bit averages
            are rounded stochastically, since plain ones do not move at long half-lives.
        policy: Decides which tensors are averaged, copied or left.
        device: The device of the averages; None for the model's.
        mesh: Ranks over which the averages are sharded, if each of them has the full model. A swap gathers them.
        offload: How averages are kept on the CPU and moved in the background, instead of a device. All methods except
            ``update_`` wait until they have moved.
        views: Whether a tensor in another one's memory, such as a transposed alias, has its own average. This is only
            for averages that are never swapped in.

    Raises:
        ValueError: If ``dtype`` is not a floating-point dtype of 16 bits or more, if both ``device`` and ``offload``
            are given, if ``mesh`` has several dimensions or the model is sharded already, or if ``policy`` does not
            leave a sparse tensor.
        MemoryLayoutError: If a tensor that ``policy`` does not leave overlaps another one in part or itself, is a
            wrapper of inner tensors, or has a dtype that cannot be averaged.

    Attributes:
        extra: The names of further entries of its state.
        model: The model in training, unwrapped.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> shadow = Shadow(model)
        >>> _ = nn.init.constant_(model.weight, 2.0), shadow.averages["weight"].fill_(1.0)
        >>> shadow.update_(weight=0.25)
        >>> with shadow.swapped(owner="the example"):
        ...     model.weight.item()
        1.25
        >>> model.weight.item()
        2.0
    """

    extra: ClassVar[tuple[str, ...]] = ()

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
        self.model = unwrap(model)
        given = {"dtype": dtype, "policy": policy, "mesh": mesh, "offload": offload, "views": views}
        optimizers.watch()
        self._movement = Movement(self.model, settings_for(self.model, device=device, **given))
        self._swapper = Swapper(self._movement)

    def update_(self, weight: float) -> None:
        """Move every average by ``weight`` of the way to the model's weights; copy what is copied.

        Where the weights have NaN or inf, the average stays as it was; tensors with such values are counted.

        Args:
            weight: ``1 - decay``, from 0 to 1.

        Raises:
            LoanError: If the model holds an average, this or another.
            MismatchError: If an averaged tensor is missing from the model or has another shape.
            OffloadError: If the previous update failed in the background.
        """
        refuse_averaged_weights(self.model)
        self._movement.move(weight)

    @property
    def num_updates(self) -> int:
        """How often it has moved."""
        return self._movement.num_updates

    @property
    def averages(self) -> dict[str, Tensor]:
        """The averaged and the copied tensors by canonical name. In a swap they may hold the training weights."""
        return self._movement.expose()

    def kinds(self) -> dict[str, tuple[Tensor, bool]]:
        """Return each average by name, and whether it is averaged, not copied."""
        self._movement.expose()
        return self._movement.listing.kinds()

    @property
    def num_quarantined(self) -> int:
        """How many tensors came with NaN or inf, on other ranks up to the last ``agree``. It waits for the device."""
        self._movement.wait()
        return self._movement.quarantine.total

    def warn_of_quarantine(self, since: int = 0) -> int:
        """Warn if more than ``since`` tensors had NaN or inf; return how many did.

        Args:
            since: What the last call returned.
        """
        self._movement.wait()
        return self._movement.quarantine.warn(since)

    def warn_of_range(self) -> bool:
        """Warn of averages that have reached the limit of their dtype; return whether any have."""
        self._movement.wait()
        return warn_of_range(self._movement.listing.averaged)

    def distance(self, ranks: Ranks | None = None, pipeline: Ranks | None = None) -> float:
        """Return the norm of weights minus average over that of the average, both over all averaged parameters.

        It takes a pass over both, and waits for the device.

        Args:
            ranks: The ranks that train the model together, if there are several. All must call this.
            pipeline: The ranks of all stages, if the model is a stage of a pipeline.

        Raises:
            LoanError: If the model holds another average.
            ShardingError: If it does on another rank.
        """
        return relative_distance(self._movement, self._swapper, ranks, pipeline)

    def agree(self, ranks: Ranks, facts: Mapping[str, Any]) -> None:
        """Check that all ranks average the same, and give all of them rank 0's averages of buffers.

        Buffers, such as the statistics of BatchNorm, follow what each rank has seen. The averages of parameters that
        are not sharded must be equal bit for bit. All ranks must call this.

        Args:
            ranks: The ranks that train the model together.
            facts: What else they must agree on.

        Raises:
            ShardingError: If they do not; it says which rank and what.
        """
        self._movement.agree(ranks, facts)

    @property
    def owner(self) -> str | None:
        """Who has swapped this average into the model, or None."""
        swap = self._swapper.active
        return swap.owner if swap else None

    def swap_in(self, owner: str) -> None:
        """Put the average in the model until ``restore``.

        If both have the same dtype, their values are exchanged in place, through a scratch buffer of at most 1 MiB.
        Otherwise, and while somebody holds ``averaged_model()`` or a state, the weights are copied to a backup first.

        Args:
            owner: Who asks, to name it in errors.

        Raises:
            LoanError: If the model holds an average already, this or another, or if adapters are merged in it.
        """
        self._swapper.swap_in(owner)

    def restore(self) -> None:
        """Restore the training weights in the model, bit for bit.

        Raises:
            LoanError: If the average is not in the model, or a parameter was changed while it was.
        """
        self._swapper.restore()

    @contextmanager
    def swapped(self, owner: str) -> Iterator[nn.Module]:
        """Put the average in the model for a ``with`` block, however that ends.

        Args:
            owner: Who asks, to name it in errors.

        Raises:
            LoanError: If the model holds an average already, this or another.
        """
        before = self._swapper.swap
        try:
            self.swap_in(owner)
            yield self.model
        finally:
            if self._swapper.swap is not before and self._swapper.active:
                self.restore()

    def averaged_tensors(self) -> dict[str, Tensor]:
        """Return the average by name, wherever it is now."""
        return self._swapper.averaged()

    def training_tensors(self) -> dict[str, Tensor]:
        """Return the training weights of averaged tensors by name, wherever they are now, without a copy."""
        self._movement.follow_model()
        found = self._swapper.training_anywhere()
        return {name: found[name].detach() for name, (_, averaged) in self.kinds().items() if averaged}

    def averaged_model(self) -> nn.Module:
        """Return a module over the averages themselves, not copies of them, in eval mode and without gradients.

        While the average is swapped in, it is the model itself. Frozen parameters are shared with the model. If the
        averages are sharded, ``fully_shard`` is applied to the module too, over their shards.

        Raises:
            CopyError: If the module would still compute with the model's own tensors, or cannot be made.
            LoanError: If adapters are merged in the model.
            ShardingError: If ``fully_shard`` cannot be applied to it as to the model.
        """
        if self._swapper.active:
            return self.model
        refuse_merged(self.model)
        self._movement.follow_model()
        sharded = sharding.is_fsdp(self.model) or self._movement.settings.mesh is not None
        module = (sharded_module if sharded else averaged_module)(self._movement)
        self._swapper.expose(own_tensors(module, self.model))
        return module

    def training_model(self) -> nn.Module:
        """Return a module with the training weights: the model itself, unless the average is in it."""
        return module_of(self._movement, self._swapper.training()) if self._swapper.active else self.model

    def copy_to(self, model: nn.Module, *, training: bool = False) -> None:
        """Copy the average, or the training weights, into another model with the same names.

        Args:
            model: The model to be overwritten; not the one in training.
            training: Whether to copy the training weights.

        Raises:
            MismatchError: If names or shapes differ.
        """
        copy_into(model, self._movement, self._swapper.training() if training else self._swapper.averaged())

    def state_dict(self) -> dict[str, Any]:
        """Return the averages by name and the counters; while the average is in the model, the training weights too.

        The tensors are over the averages' memory and follow updates; while somebody holds them, no swap moves averages.
        """
        return tensors_state(self._movement, self._swapper)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from what ``state_dict`` returned, under any wrapper of the model.

        A state that was taken while the average was in the model has the training weights, and the model gets them.

        Args:
            state: The saved state.

        Raises:
            LoanError: If the model holds an average.
            MismatchError: If names or shapes differ from the model's.
        """
        load_tensors(self._movement, state)

"""Reads from a model how ``fully_shard`` was called, and makes the same calls for a copy of the model.

torch has no public way to read this. Attributes that a version of torch does not have are an error by name.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from polyak.errors import ShardingError
from polyak.sharding.tensors import as_sharded, local, reshard, reshard_after_an_error, sharded_like

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_PACKAGE = "torch.distributed.fsdp._fully_shard"
_INSTEAD = "use applied(), which swaps the average into the model"


@dataclass(frozen=True)
class Managed:
    """A parameter that ``fully_shard`` manages, or is to manage in a copy.

    Args:
        tensor: The parameter, sharded if it is managed.
        module: The first module that has it.
        attribute: Its name in that module.
        placement: Along which dimension it is sharded.
        held: torch's object for it; None if it is not managed yet.
    """

    tensor: Tensor
    module: nn.Module
    attribute: str
    placement: Any
    held: Any = None

    @classmethod
    def of(cls, held: Any) -> "Managed":
        """Return the parameter that an object of torch describes.

        Args:
            held: An ``FSDPParam``.
        """
        info = held._module_info  # noqa: SLF001
        return cls(held.sharded_param, info.module, info.param_name, held.fsdp_placement, held)

    @property
    def memory(self) -> Tensor:
        """The memory of its local shard with the padding, as a tensor of one dimension."""
        return self.held._sharded_param_data  # noqa: SLF001

    @property
    def size(self) -> int:
        """The number of elements of the largest shard. All ranks send as many; those with fewer elements pad them."""
        return self.held.padded_sharded_param_size.numel()

    def stand_in(self, dtype: torch.dtype) -> Tensor:
        """Return a parameter without memory, of the shape that it has before ``fully_shard``.

        Args:
            dtype: The dtype of its values.
        """
        if self.held is None:
            return nn.Parameter(torch.empty_like(self.tensor, dtype=dtype, device="meta"), requires_grad=False)
        full = torch.empty(self.held._orig_size, dtype=dtype, device="meta")  # noqa: SLF001
        if (spec := self.held._unsharded_dtensor_spec) is None:  # noqa: SLF001
            return nn.Parameter(full, requires_grad=False)
        # It is also sharded by tensor parallelism.
        like = torch.empty_strided(spec.tensor_meta.shape, spec.tensor_meta.stride, dtype=dtype, device="meta")
        return as_sharded(full, spec.mesh, spec.placements, like)

    def hold(self, like: Tensor, memory: Tensor) -> None:
        """Make the modules of a copy compute with a shard, over memory that others write to.

        Args:
            like: The sharded tensor to compute with.
            memory: The memory of its local shard with the padding, as a tensor of one dimension.
        """
        shard = nn.Parameter(sharded_like(like, local(like).detach()), requires_grad=False)
        self.held.sharded_param = shard
        self.held._sharded_param_data = memory  # noqa: SLF001
        self.held._setattr_on_modules(shard)  # noqa: SLF001


@dataclass(frozen=True)
class Unit:
    """The arguments of one call of ``fully_shard``, and the parameters that it manages.

    Args:
        modules: One, or several that are gathered together.
        mesh: The ranks; None if it manages no parameters.
        precision: The mixed-precision policy.
        offloads: Whether shards are kept on the CPU.
        parameters: Those that it manages.
    """

    modules: tuple[nn.Module, ...]
    mesh: "DeviceMesh | None"
    precision: Any
    offloads: bool
    parameters: tuple[Managed, ...]

    def wrap(self, twin: Callable[[nn.Module], nn.Module], mesh: "DeviceMesh") -> list[Managed]:
        """Call ``fully_shard`` in the same way for a copy; return its parameters, in the order of ``parameters``.

        A copy frees full tensors after each forward pass: the next one must gather what its shards have become.

        Args:
            twin: Returns the module of the copy for one of the model.
            mesh: Where there is none.

        Raises:
            ShardingError: If it would not manage the same parameters.
        """
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard  # noqa: PLC0415

        modules = [twin(module) for module in self.modules]
        placements = {id(getattr(twin(p.module), p.attribute)): p.placement for p in self.parameters}
        ignored = {p for p in chain.from_iterable(m.parameters() for m in modules) if id(p) not in placements}
        fully_shard(
            modules if modules[1:] else modules[0],
            mesh=self.mesh or mesh,
            reshard_after_forward=True,
            shard_placement_fn=lambda parameter: placements[id(parameter)],
            mp_policy=self.precision,
            # Memory that is not pinned, since the shards are in that of others.
            offload_policy=CPUOffloadPolicy(pin_memory=False) if self.offloads else OffloadPolicy(),
            ignored_params=ignored or None,
        )
        found = {(id(p.module), p.attribute): p for p in _unit(_state(modules[0])).parameters}
        wanted = [(id(twin(p.module)), p.attribute) for p in self.parameters]
        if found.keys() != set(wanted):
            names = sorted({name for _, name in found.keys() ^ set(wanted)})
            raise ShardingError(
                "a copy of a model under fully_shard must have the same parameters in each call of it (got "
                f"{names[:5]} in one of the two): register no parameters after fully_shard, or {_INSTEAD}"
            )
        return [found[key] for key in wanted]


def units_of(model: nn.Module) -> list[Unit]:
    """Return the calls of ``fully_shard`` in a model, inner modules first. The model holds its shards afterwards.

    Args:
        model: A model with ``fully_shard``.

    Raises:
        ShardingError: If that cannot be read, or cannot be done again for a copy.
    """
    from torch.distributed.fsdp import FSDPModule  # noqa: PLC0415

    reshard(model)
    states = dict[int, Any]()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            states.setdefault(id(_state(module)), _state(module))
    try:
        if any(group.is_unsharded for state in states.values() for group in _groups(state)):
            reshard_after_an_error(model)
        units = [_unit(state) for state in states.values()]
    except AttributeError as error:
        raise ShardingError(
            f"torch must show what fully_shard was called with for ema.model (torch {torch.__version__}: {error}); "
            f"{_INSTEAD}"
        ) from error
    return units[::-1]


def _unit(state: Any) -> Unit:
    groups = _groups(state)
    meshes = [group.mesh_info for group in groups]
    spmd = any(getattr(info, "is_spmd_mesh", False) for info in meshes)
    if meshes[1:] or spmd or any(info.shard_mesh_dim is None for info in meshes):
        kind = "several meshes in one call" if meshes[1:] else "dp_mesh_dims" if spmd else "replicate()"
        raise ShardingError(f"ema.model needs a model of plain calls of fully_shard (got {kind}); {_INSTEAD}")
    parameters = tuple(Managed.of(held) for group in groups for held in group.fsdp_params)
    for parameter in parameters:
        if hasattr(local(parameter.tensor), "fsdp_pre_all_gather"):
            raise ShardingError(
                f"ema.model needs parameters that fully_shard gathers as they are (got {parameter.attribute!r}, a "
                f"{type(local(parameter.tensor)).__name__}, which converts itself); {_INSTEAD}"
            )
    return Unit(
        state._modules,  # noqa: SLF001
        meshes[0].mesh if meshes else None,
        state._mp_policy,  # noqa: SLF001
        any(parameter.held.offload_to_cpu for parameter in parameters),
        parameters,
    )


def reshard_abandoned(module: nn.Module) -> None:
    """Let a module hold its shards if an exception in its last forward pass has left full tensors in it.

    Args:
        module: An outermost one of ``fully_shard``.
    """
    from torch.distributed.fsdp import FSDPModule  # noqa: PLC0415

    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    if not any(group.is_unsharded for part in parts for group in _groups(_state(part))):
        return
    for part in parts:
        part.reshard()
    if isinstance(module, FSDPModule) and hasattr(module, "reset_iter_state"):  # since torch 2.13
        module.reset_iter_state()


def _state(module: Any) -> Any:
    return module._get_fsdp_state()  # noqa: SLF001


def _groups(state: Any) -> Sequence[Any]:
    groups: Sequence[Any] | None = getattr(state, "_fsdp_param_groups", None)
    # An earlier version of torch has one or none.
    return [one for one in [state._fsdp_param_group] if one is not None] if groups is None else groups  # noqa: SLF001


# A module without what fully_shard has made of it.


def class_before(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module had before ``fully_shard``.

    Args:
        module: Any module.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not isinstance(module, fsdp.FSDPModule):
        return type(module)
    return next(base for base in type(module).__mro__ if not issubclass(base, fsdp.FSDPModule))


def attributes_before(module: nn.Module) -> Mapping[str, Any]:
    """Return the attributes of a module without the state and the hooks of ``fully_shard``.

    Args:
        module: Any module.
    """
    if _PACKAGE not in sys.modules:
        return vars(module)
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY  # noqa: PLC0415

    found = dict(vars(module))
    for name, value in vars(module).items():
        if name in {STATE_KEY, REGISTRY_KEY} or (name.endswith("_hooks") and isinstance(value, dict)):
            found[name] = type(value)((key, one) for key, one in value.items() if not _is_of_fsdp(key, one))
    return found


def _is_of_fsdp(key: object, value: object) -> bool:
    """Whether a hook, a state or an entry in the registry of composable functions is one of ``fully_shard``."""
    modules = (getattr(value, "__module__", None), getattr(key, "__module__", None))
    return key == "fully_shard" or any(isinstance(m, str) and m.startswith(_PACKAGE) for m in modules)

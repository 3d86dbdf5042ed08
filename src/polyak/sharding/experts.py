"""Experts that are plain tensors and differ by rank: their declaration, and their places in the full model.

Averages stay plain local tensors. Only where they leave the process, in a state, an export or a record, they get the
names and the shapes that they have in the full model.
"""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from polyak.errors import ShardingError
from polyak.sharding.tensors import is_sharded, local, sharded_over

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Experts:
    """The declaration of the experts in one module.

    Args:
        mesh: The ranks whose experts are together those of the model; of one dimension.
        dim: The dimension along which each tensor is a shard; None if this rank has whole experts.
        numbers: For whole experts, the name in the full model of each child module.
    """

    mesh: "DeviceMesh"
    dim: int | None
    numbers: Mapping[str, str]

    def name(self, rest: str) -> str:
        """Return the name of a tensor in the full model, below this module.

        Args:
            rest: Its name below this module here.
        """
        child, dot, below = rest.partition(".")
        return f"{self.numbers.get(child, child)}{dot}{below}"

    def name_here(self, rest: str) -> str | None:
        """Return the name of a tensor here, below this module; None if other ranks have it.

        Args:
            rest: Its name below this module in the full model.
        """
        if self.dim is not None:
            return rest
        here = {number: child for child, number in self.numbers.items()}
        child, dot, below = rest.partition(".")
        return f"{here[child]}{dot}{below}" if child in here else None


_DECLARED: "weakref.WeakKeyDictionary[nn.Module, Experts]" = weakref.WeakKeyDictionary()


def declare_experts(
    module: nn.Module, mesh: "DeviceMesh", *, dim: int = 0, numbers: Sequence[int | str] | None = None
) -> None:
    """Declare that a module's plain parameters differ by rank, and how they form the parameters of the full model.

    Averages of such parameters are then swapped, and saved by ``torch.distributed.checkpoint``, exported and recorded
    as the full model has them. Without this they are refused, because one rank's would stand for all. Experts that are
    ``DTensor`` need no declaration. Call it before ``attach``, on all ranks of the mesh.

    Args:
        module: Holds this rank's experts, and nothing else.
        mesh: The ranks whose experts are together those of the model, in their order; of one dimension, such as
            ``mesh["ep"]``. Other ranks with the same coordinate have the same experts.
        dim: Along which dimension each parameter is a shard of the full one, of equal size on all ranks.
        numbers: If this rank has whole experts as child modules, such as those of a ``ModuleList``: the name of each in
            the full model, in order. Rank 1 of two with two experts each has ``[2, 3]``.

    Raises:
        ShardingError: If the mesh has several dimensions, the shapes of the ranks differ, a parameter is a ``DTensor``,
            or two ranks have an expert of the same number.

    Example:
        >>> import polyak  # on each of 4 ranks, with 2 of 8 experts
        >>> experts = nn.ParameterDict({"up": torch.zeros(2, 16, 64), "down": torch.zeros(2, 64, 16)})
        >>> polyak.declare_experts(experts, init_device_mesh("cpu", (4,)))  # doctest: +SKIP
    """
    if mesh.ndim != 1:
        raise ShardingError(
            f"experts must be declared over a mesh of one dimension (got {mesh.ndim}): slice it, such as mesh['ep']"
        )
    children = [name for name, _ in module.named_children()]
    names = {} if numbers is None else dict(zip(children, map(str, numbers), strict=False))
    found: list[Any] = [None] * mesh.size()
    own = _own_facts(module, dim, None if numbers is None else list(map(str, numbers)), len(children))
    torch.distributed.all_gather_object(found, own, mesh.get_group())
    _check(found, by_number=numbers is not None)
    _DECLARED[module] = Experts(mesh, dim if numbers is None else None, names)


def _own_facts(module: nn.Module, dim: int, numbers: list[str] | None, children: int) -> dict[str, Any]:
    error = None
    if shards := [name for name, parameter in module.named_parameters() if is_sharded(parameter)]:
        error = f"{shards[:3]} are DTensors, which need no declaration"
    elif numbers is None and (low := [n for n, p in module.named_parameters() if p.dim() <= dim]):
        error = f"{low[:3]} have no dimension {dim}"
    elif numbers is not None and len(numbers) != children:
        error = f"there are {children} child modules and {len(numbers)} numbers"
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    return {"error": error, "numbers": numbers, "shapes": shapes}


def _check(found: Sequence[Mapping[str, Any]], *, by_number: bool) -> None:
    """Raise the same error on all ranks if their declarations do not fit together."""
    for rank, one in enumerate(found):
        if one["error"]:
            raise ShardingError(f"experts must be plain parameters of one module each (on rank {rank} {one['error']})")
        if (one["numbers"] is not None) is not by_number or (not by_number and one["shapes"] != found[0]["shapes"]):
            raise ShardingError(
                "the experts of all ranks must have the same names and shapes, or numbers on each rank (got "
                f"{found[0]['shapes']} on rank 0, {one['shapes']} on rank {rank}): give numbers=, the name of each"
            )
    numbers = [number for one in found for number in one["numbers"] or []]
    if len(set(numbers)) < len(numbers):
        twice = sorted({number for number in numbers if numbers.count(number) > 1})
        raise ShardingError(f"each expert must be on one rank of the mesh (got {twice[:5]} twice): give other numbers")


def has_numbered_experts(model: nn.Module) -> bool:
    """Return whether ranks hold whole experts, under other names on each.

    Args:
        model: Any model.
    """
    found = (_DECLARED[module] for module in model.modules() if module in _DECLARED) if _DECLARED else ()
    return any(experts.dim is None for experts in found)


def has_experts(model: nn.Module) -> bool:
    """Return whether experts of a model were declared.

    Args:
        model: Any model.
    """
    return any(module in _DECLARED for module in model.modules()) if _DECLARED else False


def declared(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a model that were declared to differ by rank.

    Args:
        model: Any model.
    """
    modules = [module for module in model.modules() if module in _DECLARED] if _DECLARED else []
    return [p for p in chain.from_iterable(module.parameters() for module in modules) if not is_sharded(p)]


class Places:
    """The names and shapes that tensors of a model have in the full model, where some ranks hold other experts.

    Args:
        named: The modules of the model with the canonical prefix of each, as of ``tensors.slots.places_of``.
    """

    def __init__(self, named: Iterator[tuple[str, nn.Module]]) -> None:
        self._experts = {prefix: _DECLARED[module] for prefix, module in named if module in _DECLARED}

    @property
    def partial(self) -> bool:
        """Whether other ranks hold tensors of the full model that this one does not have."""
        return any(experts.dim is None for experts in self._experts.values())

    def _of(self, name: str) -> tuple[str, Experts] | None:
        return next((item for item in self._experts.items() if name.startswith(item[0])), None)

    def name(self, name: str) -> str:
        """Return the name of a tensor in the full model.

        Args:
            name: Its canonical name here.
        """
        found = self._of(name)
        return name if found is None else found[0] + found[1].name(name[len(found[0]) :])

    def differs(self, name: str, tensor: Tensor) -> bool:
        """Return whether each rank has a different tensor under a name, or only this rank has it.

        Args:
            name: Its canonical name here.
            tensor: The tensor.
        """
        found = self._of(name)
        return found is not None and (found[1].dim is None or tensor.dim() > found[1].dim) and not is_sharded(tensor)

    def shards(self, name: str, tensor: Tensor) -> int:
        """Return the number of ranks that have different tensors of this kind; 1 if all have the same.

        Args:
            name: Its canonical name here.
            tensor: The tensor.
        """
        found = self._of(name)
        return found[1].mesh.size() if found is not None and self.differs(name, tensor) else 1

    def as_full(self, tensors: Mapping[str, T]) -> dict[str, T]:
        """Return tensors as the full model has them, over the same memory.

        Args:
            tensors: By canonical name here. Other things keep their form, and get their names in the full model.
        """
        if not self._experts:
            return dict(tensors)
        return {self.name(name): self._as_full(name, tensor) for name, tensor in tensors.items()}

    def _as_full(self, name: str, tensor: Any) -> Any:
        found = self._of(name)
        if found is None or found[1].dim is None or not isinstance(tensor, Tensor) or not self.differs(name, tensor):
            return tensor
        return sharded_over(tensor, found[1].mesh, found[1].dim)

    def as_local(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors of the full model as this rank has them; those of other ranks are left out.

        Args:
            tensors: By name, as ``as_full`` returned them, or full.
        """
        if not self._experts:
            return dict(tensors)
        here = ((self._name_here(name), tensor) for name, tensor in tensors.items())
        return {name: self._as_local(name, tensor) for name, tensor in here if name is not None}

    def _name_here(self, name: str) -> str | None:
        found = self._of(name)
        below = None if found is None else found[1].name_here(name[len(found[0]) :])
        return name if found is None else None if below is None else found[0] + below

    def _as_local(self, name: str, tensor: Tensor) -> Tensor:
        found = self._of(name)
        dim = None if found is None else found[1].dim
        if found is None or dim is None or tensor.dim() <= dim:
            return tensor
        if is_sharded(tensor):
            return local(tensor)
        mesh = found[1].mesh
        return tensor.chunk(mesh.size(), dim)[mesh.get_local_rank()] if tensor.shape[dim] >= mesh.size() else tensor

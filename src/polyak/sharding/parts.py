"""``ModelParts``: several modules that one rank of a pipeline holds, as one model."""

import weakref
from typing import TYPE_CHECKING

from torch import nn

from polyak.errors import ArgumentError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Not attributes of the modules: those are copied with them, which a group cannot be.
_GROUPS: "weakref.WeakKeyDictionary[nn.Module, ProcessGroup]" = weakref.WeakKeyDictionary()


class ModelParts(nn.Module):
    """Modules that are trained as one model, each with the names of its own tensors: no prefix is added.

    A rank of an interleaved pipeline holds several stages. Give ``attach``, ``export_averaged`` and a ``Recorder`` one
    ``ModelParts`` of them. Each part may be in its ``DistributedDataParallel`` or under ``fully_shard``. The stages of
    ``torch.distributed.pipelining`` are found by themselves; for a pipeline of another library, ``group`` says which
    ranks hold the model. It has no ``forward``: the schedule of the pipeline calls the parts.

    Args:
        *parts: The modules, in the order of the model.
        group: The ranks that hold the parts of one model, all stages with their replicas and shards. None where
            ``torch.distributed.pipelining`` runs the parts, or one process holds the whole model.

    Raises:
        ArgumentError: If there are no parts, or two parts have a tensor of the same name.

    Example:
        >>> first, last = nn.Sequential(nn.Linear(2, 2)), nn.ModuleDict({"head": nn.Linear(2, 1)})
        >>> from polyak import EMA
        >>> [row.name for row in EMA("10ba").plan(ModelParts(first, last))]
        ['0.weight', '0.bias', 'head.weight', 'head.bias']
    """

    def __init__(self, *parts: nn.Module, group: "ProcessGroup | None" = None) -> None:
        super().__init__()
        if not parts or not all(isinstance(part, nn.Module) for part in parts):
            raise ArgumentError(
                "ModelParts must get one or more modules, as ModelParts(first, second) (got "
                f"{[type(part).__name__ for part in parts]})"
            )
        held = dict[str, int]()
        for number, part in enumerate(parts):
            names = [name for name, _ in (*part.named_parameters(), *part.named_buffers())]
            if shared := sorted(held.keys() & set(names)):
                raise ArgumentError(
                    f"the parts of a model must have different names (got {shared[:5]} in parts {held[shared[0]]} and "
                    f"{number}); keep each part's modules under the names that they have in the whole model"
                )
            held |= dict.fromkeys(names, number)
            self.add_module(str(number), part)
        if group is not None:
            _GROUPS[self] = group

    @property
    def parts(self) -> list[nn.Module]:
        """The parts."""
        return list(self.children())

    @property
    def group(self) -> "ProcessGroup | None":
        """The ranks that hold the model, as given; a copy has none."""
        return _GROUPS.get(self)

"""``Masters``: the float32 masters of an engine as a module with the names of the model whose weights they become."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from polyak.errors import OptimizerError
from polyak.sharding import Ranks
from polyak.sharding.fragments import Fragment
from polyak.tensors.slots import all_slots, unwrap


@dataclass(frozen=True)
class Master:
    """The part of a parameter's master that this rank has.

    Args:
        tensor: Its elements, of one dimension: a view of the memory that the optimizer steps.
        offset: Where they begin in the flattened parameter.
        length: The length of the flattened parameter.
    """

    tensor: Tensor
    offset: int
    length: int


class Masters(nn.Module):
    """The model's structure over the masters: parameters are parts of masters, buffers are the model's own.

    An average of this module is an average of the masters. It has no ``forward``.

    Args:
        model: The model in training, wrapped or not.
        find: Returns by the parameter's id the part of its master that this rank has, which may be empty. It is asked
            again before each update and each swap, since engines move masters in memory.
        publish: Lets the model's weights follow the masters. All ranks must call it.
        ranks: The ranks that train the model together, if there are several.
        gathered: Returns a context of the full tensor of one of the model's, which may be partitioned.

    Raises:
        OptimizerError: If there are no masters.

    Attributes:
        model: The model in training, unwrapped.
        names: The canonical names of all parameters that have a master, on this rank or others.
        places: By canonical name, where the part of a master on this rank is in its parameter.
        ranks_of_model: As given.
        gathered: As given.
    """

    model: nn.Module
    ranks_of_model: Ranks | None

    def __init__(
        self,
        model: nn.Module,
        find: Callable[[], Mapping[int, Master]],
        publish: Callable[[], None],
        ranks: Ranks | None,
        gathered: Callable[[Tensor], AbstractContextManager[Tensor]] = nullcontext,
    ) -> None:
        super().__init__()
        model = unwrap(model)
        # Not registered as a submodule, whose parameters would be this one's too.
        self.__dict__["model"] = model
        self.ranks_of_model = ranks
        self._find, self._publish, self.gathered = find, publish, gathered
        self.names = set[str]()
        self.places = dict[str, tuple[int, int]]()
        self._ids = dict[str, int]()
        twins = _twins(model, self)
        masters, seen = find(), set[int]()
        for slot in all_slots(model):
            master = masters.get(id(slot.tensor)) if slot.is_parameter else None
            if master is None or id(slot.tensor) in seen:
                continue
            seen.add(id(slot.tensor))
            self.names.add(slot.name)
            if not master.tensor.numel():
                continue
            parameter = nn.Parameter(master.tensor.detach(), requires_grad=True)
            twins[id(slot.owner)]._parameters[slot.attribute] = parameter  # noqa: SLF001  see `_twins`
            self.places[slot.name] = master.offset, master.length
            self._ids[slot.name] = id(slot.tensor)
        self._parameters_by_name = {slot.name: slot.tensor for slot in all_slots(self) if slot.is_parameter}
        if not self.names:
            raise OptimizerError(
                "the optimizer must step parameters of the model (it has masters of none of them); give it parameters "
                "of the model"
            )

    def follow(self) -> None:
        """Find the masters again, since engines move them when they offload or load.

        Raises:
            OptimizerError: If there are none now.
        """
        masters = self._find()
        for name, parameter in self._parameters_by_name.items():
            master = masters.get(self._ids[name])
            if master is None or master.tensor.numel() != parameter.numel():
                raise OptimizerError(
                    f"a master must stay on its rank to be averaged, and that of {name!r} is gone or has another size; "
                    "reload the states that the engine has offloaded, or attach again"
                )
            if master.tensor.data_ptr() != parameter.data_ptr():
                parameter.data = master.tensor.detach()

    def publish_weights(self) -> None:
        """Let the model's weights follow the masters, into which an average was swapped. All ranks must call this."""
        self._publish()

    def in_fragments(self, state: Any) -> Any:
        """Return a state with a ``Fragment`` in place of each part of a master, for ``torch.distributed.checkpoint``.

        Args:
            state: The state of an algorithm or a loop.
        """
        return _replaced(state, lambda name, tensor: Fragment.of(tensor, *self.places[name]), self.places)

    def without_fragments(self, state: Any) -> Any:
        """Return the state that ``in_fragments`` was given.

        Args:
            state: As returned.
        """
        return _replaced(state, lambda _, tensor: tensor.as_subclass(Tensor), self.places)


def _twins(module: nn.Module, twin: nn.Module) -> dict[int, nn.Module]:
    """Give a twin the structure and the buffers of a module; return the twins of all its submodules by their ids."""
    twins = {id(module): twin}
    twin._buffers = module._buffers  # noqa: SLF001  the same dict, which has the buffer that the model has now
    twin._non_persistent_buffers_set = module._non_persistent_buffers_set  # noqa: SLF001
    for name, child in module.named_children():
        if id(child) not in twins:
            twins |= _twins(child, nn.Module())
        twin._modules[name] = twins[id(child)]  # noqa: SLF001  it may have the name of an attribute of `Masters`
    return twins


def _replaced(state: Any, replace: Callable[[str, Tensor], Tensor], names: Mapping[str, Any]) -> Any:
    if isinstance(state, Mapping):
        return {
            key: replace(key, value) if isinstance(value, Tensor) and key in names else _replaced(value, replace, names)
            for key, value in state.items()
        }
    if isinstance(state, list):
        return [_replaced(value, replace, names) for value in state]
    return state

"""How an average follows Megatron's optimizer: its steps, its backward passes and its checkpoints."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils.hooks import RemovableHandle

from polyak.algorithm import Algorithm
from polyak.averaging.swap import refuse_second_swap
from polyak.engines.attached import EngineAttached
from polyak.engines.handle import refuse_swapped
from polyak.engines.hooks import Methods
from polyak.engines.masters import Masters
from polyak.engines.megatron import masters_of
from polyak.engines.megatron_export import save_average
from polyak.engines.megatron_layout import inside
from polyak.engines.megatron_masters import MegatronMasters, replaced
from polyak.engines.megatron_publish import stream
from polyak.events import Event
from polyak.publish import Load
from polyak.sharding import Communicator
from polyak.sharding.fragments import Fragment
from polyak.training.block import block
from polyak.training.counted import CountedLoop
from polyak.training.options import LoopOptions

# Of an optimizer, with what each would do to averaged weights.
_REFUSED = {
    "zero_grad": "a training step must begin",
    "state_dict": "a checkpoint must be saved",
    "sharded_state_dict": "a checkpoint must be saved",
    "save_parameter_state": "a checkpoint must be saved",
    "load_state_dict": "a checkpoint must be loaded",
    "load_parameter_state": "a checkpoint must be loaded",
    "reload_model_params": "weights must be loaded",
    "offload_to_cpu": "masters must be moved",
    "restore_from_cpu": "masters must be moved",
}


class MegatronAttached(EngineAttached):
    """An average of the masters of Megatron's optimizer, and its handle. ``polyak.hosts.megatron.attach`` makes it.

    Args:
        algorithms: One ``EMA``, or a list of one.
        model: A chunk of the model, or a list of chunks.
        optimizer: As ``get_megatron_optimizer`` returned it.
        options: The options of the loop.

    Raises:
        ArgumentError: If there is another algorithm than an ``EMA``, or model and optimizer are none of Megatron's.
        OptimizerError: If the masters cannot be averaged.
        ShardingError: If another rank refuses.
        TimeError: If a time is in a unit that is not counted.
    """

    def __init__(
        self, algorithms: Algorithm | Sequence[Algorithm], model: Any, optimizer: Any, options: LoopOptions
    ) -> None:
        self._held = masters_of(model, optimizer)
        super().__init__(algorithms, self._held, options)
        self._given = model
        self._methods = Methods(optimizer)
        _surround(self._methods, self.loop, self._masters, optimizer)
        chunks = model if isinstance(model, (list, tuple, nn.ModuleList)) else [model]
        self._hooks = [_guard(inside(chunk), self._masters) for chunk in chunks]

    def detach(self) -> None:
        """Stop counting. The average stays; the optimizer has its own methods again."""
        self._methods.remove()
        while self._hooks:
            self._hooks.pop().remove()
        super().detach()

    @block
    def applied(self) -> Iterator[Any]:
        """Swap the average into the masters, and the weights that follow them, for a ``with`` block.

        All ranks must enter and leave it together: the weights are gathered from the masters as after a step.

        Raises:
            LoanError: If the model holds an average already.
            ShardingError: If the ranks disagree.
        """
        refuse_second_swap(self._masters, "applied()")
        self._masters.follow()
        with self._loop.between(Event.EVAL_START, Event.EVAL_END):
            yield self._given

    def sharded_state_dict(self) -> dict[str, Any]:
        """Return the state for ``megatron.core.dist_checkpointing``. All ranks must call this.

        ``dist_checkpointing.save`` saves it with the model's and the optimizer's. To resume, give what this returns to
        ``dist_checkpointing.load``, and what that returns to ``load_state_dict``. It loads on any number of ranks,
        whatever their tensor, pipeline, expert and data parallelism.

        Raises:
            LoanError: If the average is swapped in.
        """
        return _for_megatron(self.state_dict(), "polyak")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from what ``state_dict`` or ``sharded_state_dict`` returned, after it was filled.

        Load the states of the model and the optimizer first.

        Args:
            state: As ``dcp.load`` has filled it, or as ``dist_checkpointing.load`` returned it.

        Raises:
            CheckpointError: If it is the state of other algorithms.
            LoanError: If the average is swapped in.
            MismatchError: If names or shapes differ from the masters' on this rank.
        """
        refuse_swapped(self._masters, "a state must be loaded")
        super().load_state_dict(_from_megatron(state, self._held))

    def save(self, path: str | Path, *, overwrite: bool = False, dtype: torch.dtype | None = None) -> None:
        """Save the averaged weights as safetensors, under Megatron's names of the full model, in its shapes.

        Layers and experts are numbered as in the full model, and tensors are as with one rank. Each rank writes its
        parts to disk, and rank 0 puts them together, one file at a time. All ranks must call this.

        Args:
            path: A file whose name ends in ``.safetensors``, or a folder.
            overwrite: Whether what was saved there before is replaced.
            dtype: Of what is averaged, such as ``torch.float32``; None for the model's own.

        Raises:
            FileExistsError: If there is something already.
            LoanError: If averaging has not begun.
            ArgumentError: If ``dtype`` is not a floating-point dtype.
        """
        save_average(self._begun(), self._held, Path(path), dtype, overwrite=overwrite)

    def _stream(self, ranks: Communicator, load: Load, *, every_rank: bool) -> None:
        stream(self._held, ranks, load, every_rank=every_rank)


def _surround(methods: Methods, loop: CountedLoop, masters: Masters, optimizer: Any) -> None:
    """Replace methods of the optimizer. What replaces them must not keep the average alive, and the loop does not."""

    def step(inner: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_swapped(masters, "an optimizer step must be made")
        loop.begin()
        result = inner(*args, **kwargs)
        # With the norm of the gradients and the number of zeros in them.
        if result[0] and len(loop.algorithms):
            masters.follow()
            loop.finish_batch()
        return result

    def refusing(what: str) -> Any:
        def method(inner: Any, *args: Any, **kwargs: Any) -> Any:
            refuse_swapped(masters, what)
            return inner(*args, **kwargs)

        return method

    methods.around("step", step)
    for name, what in _REFUSED.items():
        if hasattr(optimizer, name):
            methods.around(name, refusing(what))


def _guard(model: nn.Module, masters: Masters) -> RemovableHandle:
    """Refuse a backward pass through a model's output while an average is swapped in, before there are gradients."""

    def refuse(gradient: Tensor) -> None:
        del gradient
        refuse_swapped(masters, "a backward pass must be made")

    def watch(module: nn.Module, args: Any, output: Any) -> None:
        del module, args
        for tensor in _pytree.tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(refuse)

    return model.register_forward_hook(watch)


# `dist_checkpointing` separates what is in a list, and loses its order: all containers are dicts there.
_LIST = "list of "


def _for_megatron(state: Any, path: str) -> Any:
    if isinstance(state, Fragment):
        return _sharded_tensors(state, path)
    if isinstance(state, list):
        size = len(state)
        return {f"{_LIST}{size}: {n}": _for_megatron(one, f"{path}.{n}") for n, one in enumerate(state)}
    if isinstance(state, Mapping):
        return {key: _for_megatron(value, f"{path}.{key}") for key, value in state.items()}
    return state


def _sharded_tensors(fragment: Fragment, key: str) -> dict[str, Any]:
    """Return a fragment as tensors that Megatron saves, one for each of its blocks.

    What is in CPU memory is copied: a save in the background would read it there after later updates. What is on a GPU,
    Megatron copies before training continues.
    """
    from megatron.core.dist_checkpointing import ShardedTensor  # noqa: PLC0415  in use where it is called

    return {
        str(number): ShardedTensor(
            key,
            data.clone() if data.is_cpu else data,
            data.dtype,
            tuple(data.shape),
            tuple(fragment.size()),
            box.offsets,
            None,  # blocks of unequal size
            replica_id=0 if fragment.written else 1,
        )
        for number, (box, data) in enumerate(fragment.blocks())
    }


def _from_megatron(state: Any, masters: MegatronMasters) -> Any:
    """Return a state with lists and tensors as ``state_dict`` has them."""

    def join(name: str, blocks: Mapping[str, Tensor]) -> Tensor:
        del name
        return torch.cat([blocks[number].reshape(-1) for number in sorted(blocks, key=int)])

    def lists(found: Any) -> Any:
        if not isinstance(found, Mapping):
            return found
        if any(isinstance(key, str) and key.startswith(_LIST) for key in found):
            return [lists(found[key]) for key in sorted(found, key=lambda key: int(key.rpartition(" ")[2]))]
        return {key: lists(value) for key, value in found.items()}

    return lists(replaced(state, join, masters.layout, Mapping))

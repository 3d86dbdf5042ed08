"""Saves and loads a loop's state whose tensors are sharded over ranks, with ``torch.distributed.checkpoint``."""

from pathlib import Path
from typing import Any

from polyak.sharding import has_spread, is_fsdp, is_initialized, reshard
from polyak.tensors.slots import slots
from polyak.training.loop import Loop


def is_sharded(loop: Loop) -> bool:
    """Return whether each rank must save its own shards of the state. A collective: all ranks must call it.

    Args:
        loop: The loop whose state is to be saved.
    """
    model = loop.state.model
    return is_initialized() and (
        is_fsdp(model)
        or has_spread(list(model.parameters()))
        or any(has_spread(algorithm.state_dict()) for algorithm in loop.algorithms if algorithm.swaps)
    )


def save(loop: Loop, folder: Path, *, weights: bool) -> None:
    """Save the state of a loop. A collective: all ranks must call it.

    Args:
        loop: The loop to be saved.
        folder: The folder to be made, in that of the checkpoint that is being written.
        weights: Whether to save the model's weights too, because the rest of the checkpoint has averaged weights.
    """
    from polyak.sharding import dcp  # noqa: PLC0415  takes half a second to import

    with loop.state.writing(folder.parent):
        dcp.save(_state(loop, weights), folder)


def load(loop: Loop, folder: Path, *, weights: bool) -> None:
    """Resume from what ``save`` wrote, on the same ranks or others. A collective: all ranks must call it.

    Args:
        loop: The loop to be resumed.
        folder: As given to ``save``.
        weights: As given to ``save``; the model gets them.

    Raises:
        CheckpointError: If it is the state of other algorithms.
    """
    from polyak.sharding import dcp  # noqa: PLC0415  takes half a second to import

    state = _state(loop, weights)
    dcp.load(state, folder)
    loop.load_state_dict(state["loop"])


def _state(loop: Loop, weights: bool) -> dict[str, Any]:
    state: dict[str, Any] = {"loop": loop.state_dict()}
    if weights:
        reshard(loop.state.model)
        state["weights"] = {slot.name: slot.tensor.detach() for slot in slots(loop.state.model) if slot.persistent}
    return state

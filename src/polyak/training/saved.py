"""Checks a state that a loop resumes from."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from polyak.averaging.habits import kind_of
from polyak.errors import CheckpointError


def check_saved(state: Any, ours: list[str]) -> None:
    """Check that a state is what ``state_dict()`` of a loop with the same algorithms returned.

    Args:
        state: Any object.
        ours: The names of the loop's algorithms.

    Raises:
        CheckpointError: If it is not. The message says what it is, if that is recognized, and what to do.
    """
    if not isinstance(state, Mapping) or not {"algorithms", "timestamp"} <= state.keys():
        raise CheckpointError(f"the state must be one that ema.state_dict() returned ({_found(state)}")
    pairs, clock = state["algorithms"], state["timestamp"]
    whole = isinstance(pairs, (list, tuple)) and all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs
    )
    if not whole or not isinstance(clock, Mapping) or not {"batch", "epoch", "epoch_length"} <= clock.keys():
        raise CheckpointError(
            "the state must be whole, with pairs of a name and a state in 'algorithms' and numbers in 'timestamp' (it "
            "is not); save what ema.state_dict() returns as it is"
        )
    saved = [name for name, _ in pairs]
    if saved != ours:
        raise CheckpointError(f"the state must be that of {ours} (got that of {saved})")


def _found(state: Any) -> str:
    if not isinstance(state, Mapping):
        return f"got {kind_of(state)}); read a file by torch.load(path, weights_only=True) first"
    keys = ", ".join(repr(str(key)) for key in list(state)[:3])
    if "ema_started" in state:
        return "got the state of an EMA alone); give it to ema.algorithm.load_state_dict(...)"
    if state and all(isinstance(value, Tensor) for value in state.values()):
        return (
            f"got tensors by name: {keys}, ..., as a model's state dict has them); give them to "
            "model.load_state_dict(...); to begin the average with them, set ema.average.ema_model to a module that "
            "has them"
        )
    if "param_groups" in state:
        return "got the state of an optimizer); give it to optimizer.load_state_dict(...)"
    inner = [str(key) for key, value in state.items() if isinstance(value, Mapping) and "algorithms" in value]
    if inner:
        return (
            f"got a checkpoint in which that is under {inner[0]!r}); give ema.load_state_dict(checkpoint[{inner[0]!r}])"
        )
    return f"got the keys {keys or 'of nothing'}); save ema.state_dict(), and load that"

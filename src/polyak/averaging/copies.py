"""Copies of an average: with a copy of its model, or without a model, to be pickled."""

import copy
from typing import TYPE_CHECKING, Any

from torch import nn

from polyak.averaging import states
from polyak.errors import CopyError, PolyakError

if TYPE_CHECKING:
    from polyak.averaging.online import OnlineAverage


def check_copyable(average: "OnlineAverage") -> None:
    """Check that this process has the full average.

    Args:
        average: The average to be copied.

    Raises:
        CopyError: If it does not.
    """
    ranks = average.ranks
    sharded = average.settings.mesh is not None or (ranks is not None and not ranks.replicas)
    if sharded or average.in_pipeline:
        raise CopyError(
            f"one process must have the full average to copy or pickle an EMA, and {average.name} is sharded; save "
            "its state_dict() with torch.distributed.checkpoint"
        )


def copy_of_model(model: nn.Module | None, memo: dict[int, Any]) -> nn.Module | None:
    """Return the copy of the model in training: the one in ``memo``, or a new one.

    Args:
        model: The model; None if it is not known yet.
        memo: What ``copy.deepcopy`` has copied, by id.

    Raises:
        CopyError: If it cannot be copied.
    """
    try:
        return copy.deepcopy(model, memo)
    except PolyakError:
        raise
    except Exception as error:
        raise CopyError(
            f"the model must be copyable, since an EMA is copied with it (got {error}); copy ema.state_dict(), and "
            "load it into another EMA"
        ) from error


def without_model(average: "OnlineAverage") -> "OnlineAverage":
    """Return an average without its model, to be pickled: its tensors wait on the CPU for a model.

    Args:
        average: An average with or without a model.

    Raises:
        CopyError: If it is sharded.
    """
    check_copyable(average)
    new = copy.copy(average)
    waiting = average.pending
    if waiting is None and average.shadow is not None:
        waiting = states.state_of(average), True
    new.pending = None if waiting is None else (states.cloned(waiting[0], "cpu"), waiting[1])
    new.model = new.ranks = new.restore_at = new.shadow = None
    new.progress = copy.copy(average.progress)
    return new

"""Errors and warnings about tensors that have changed while the average was in the model."""

import sys
import warnings
from collections.abc import Sequence

from polyak.errors import LoanError, PlanWarning


def warn_of_gradients(names: Sequence[str], owner: str) -> None:
    """Warn of gradients that have changed in place, which cannot be undone.

    Args:
        names: The parameters.
        owner: Who has swapped the average in.
    """
    warnings.warn(
        f"gradients must not change while the average is in the model, and those of {_shown(names)} did in the swap by "
        f"{owner}, and keep the change; call zero_grad() before the evaluation, or after it before the next backward()",
        PlanWarning,
        stacklevel=4,
    )


def report_changed(names: Sequence[str], owner: str) -> None:
    """Raise an error about tensors that have changed; warn instead if another exception is on its way.

    Args:
        names: The tensors.
        owner: Who has swapped the average in.

    Raises:
        LoanError: If no other exception is being raised.
    """
    message = (
        f"parameters must not change while the average is in the model, and {_shown(names)} did in the swap by "
        f"{owner} (merged adapters, an optimizer step, or a call of its eval()?): trained parameters are restored and "
        "their average has the change; frozen ones, and buffers too large to be kept, have it too; load a checkpoint, "
        "and evaluate without what changes them; let a policy copy such a buffer"
    )
    if sys.exception() is not None:
        warnings.warn(message, PlanWarning, stacklevel=5)  # an error would hide the exception that leaves the block
        return
    raise LoanError(message)


def _shown(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

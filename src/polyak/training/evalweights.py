"""``eval_weights``: which weights an evaluation uses, with the same values for all trainers."""

import warnings
from typing import Literal

from torch import nn

from polyak.averaging.swap import swap_of
from polyak.errors import ArgumentError, LoanError

EvalWeights = Literal["averaged", "raw", "both"]
"""``"averaged"``: the average, if there is one. ``"raw"``: the training weights. ``"both"``: metrics under their plain
names are those of the average, and those of the training weights have ``raw`` in their names."""

_DEPRECATED: dict[object, EvalWeights] = {"training": "raw"}


def eval_weights_of(given: object, *, stacklevel: int = 3) -> EvalWeights:
    """Return the value of an argument ``eval_weights``.

    Args:
        given: As given; ``"training"`` is the deprecated name of ``"raw"``.
        stacklevel: The stacklevel of the warning, as for ``warnings.warn``.

    Raises:
        ArgumentError: If it is not one of its values.

    Example:
        >>> eval_weights_of("both")
        'both'
    """
    if isinstance(given, str):
        if given in _DEPRECATED:
            new = _DEPRECATED[given]
            warnings.warn(
                f"eval_weights={given!r} is deprecated; write {new!r}", DeprecationWarning, stacklevel=stacklevel
            )
            return new
        if given in ("averaged", "raw", "both"):
            return given
    raise ArgumentError(
        f"eval_weights must be 'averaged', 'raw' or 'both' (got {given!r}); 'averaged' evaluates the average, 'raw' "
        "the training weights"
    )


def refuse_raw_of_averaged(model: nn.Module) -> None:
    """Refuse to evaluate raw weights while the model holds an average: the results would be those of the average.

    Args:
        model: Wrapped or not.

    Raises:
        LoanError: If the model holds an average.
    """
    if swap := swap_of(model):
        raise LoanError(
            f"the raw weights must be in the model to be evaluated ({swap.owner} has swapped its average in); evaluate "
            "both after the block, or read ema.model in it"
        )

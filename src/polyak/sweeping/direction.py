"""Decides whether a higher or a lower value of a metric is better, if its name clearly says so."""

import re
from itertools import pairwise

from polyak.sweeping.results import EvaluationError

# The name that a number without a name gets. It is taken for a loss, unless the function's name says otherwise.
UNNAMED = "value"

_LOWER = frozenset(
    (
        "bce",
        "bpb",
        "bpc",
        "bpd",
        "brier",
        "cer",
        "crossentropy",
        "ece",
        "err",
        "error",
        "errors",
        "fid",
        "kid",
        "loss",
        "losses",
        "mae",
        "mape",
        "mse",
        "nll",
        "perplexity",
        "ppl",
        "rmse",
        "wer",
        "xent",
    )
)
_HIGHER = frozenset(
    (
        "acc",
        "accuracy",
        "ap",
        "auc",
        "auprc",
        "auroc",
        "bleu",
        "cider",
        "correlation",
        "dice",
        "em",
        "f1",
        "iou",
        "kappa",
        "map",
        "mcc",
        "meteor",
        "miou",
        "mrr",
        "ndcg",
        "pearson",
        "pesq",
        "precision",
        "psnr",
        "r2",
        "recall",
        "reward",
        "roc",
        "rouge",
        "score",
        "sdr",
        "snr",
        "spearman",
        "ssim",
        "stoi",
        "winrate",
    )
)


def direction(metric: str, function: str, *, maximize: bool | None) -> bool:
    """Return whether a higher value of a metric is better.

    Args:
        metric: Its name.
        function: The name of the function that returns it, which names a metric without a name.
        maximize: What the user says; None for nothing.

    Raises:
        EvaluationError: If nobody says it: neither the user nor the name.

    Example:
        >>> direction("val_loss", "validate", maximize=None), direction("accuracy", "validate", maximize=True)
        (False, True)
    """
    if maximize is not None:
        return maximize
    words = _words(metric if metric != UNNAMED else function)
    lower, higher = bool(words & _LOWER), bool(words & _HIGHER)
    if (lower and not higher) or (metric == UNNAMED and not higher):
        return False
    hint = "higher is usually better" if higher and not lower else "its name does not say it"
    raise EvaluationError(
        f"it must be known whether a lower or a higher {_shown(metric, function)} is better ({hint}); say so with "
        "--maximize or --minimize, in Python with maximize=True or minimize=True"
    )


def asked(*, maximize: bool | None, minimize: bool | None) -> bool | None:
    """Return what the two arguments of ``sweep`` say together, as ``maximize``; None if they say nothing.

    Args:
        maximize: As given.
        minimize: As given.

    Raises:
        EvaluationError: If they contradict each other.
    """
    if maximize is not None and minimize is not None and maximize == minimize:
        raise EvaluationError(f"maximize and minimize must not both be {maximize}; give one of them")
    return (None if minimize is None else not minimize) if maximize is None else maximize


def _shown(metric: str, function: str) -> str:
    return f"value of {function}" if metric == UNNAMED else metric


def _words(name: str) -> set[str]:
    """Return the words of a name, and each two neighbours together: cross_entropy is ``crossentropy`` too."""
    apart = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower()
    words = [word for word in re.split(r"[^a-z0-9]+", apart) if word]
    return {*words, *(first + second for first, second in pairwise(words))}

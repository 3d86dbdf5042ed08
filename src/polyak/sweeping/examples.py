"""Uses losses of single examples for an interval of their mean, and to find averages as good as the best."""

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, variance


def interval(values: Sequence[float], comparisons: int = 1) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean of values; None for fewer than two values.

    Args:
        values: One for each example, of which one tells nothing about another.
        comparisons: How many such intervals together hold with 95 %, by Bonferroni's inequality.

    Example:
        >>> low, high = interval([0.0, 1.0] * 50)
        >>> round(low, 2), round(high, 2)
        (0.4, 0.6)

    References:
        Student's t by Cornish and Fisher's expansion: Abramowitz and Stegun, 1964, formula 26.7.5
    """
    if len(values) < 2:
        return None
    mean, free = fmean(values), len(values) - 1
    z = NormalDist().inv_cdf(1 - 0.025 / max(1, comparisons))
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    margin = t * math.sqrt(variance(values, mean) / len(values))
    return mean - margin, mean + margin


def is_worse(values: Sequence[float], best: Sequence[float], *, maximize: bool) -> bool:
    """Return whether an average is worse than the best by more than chance: by the paired difference, at 95 %.

    Args:
        values: The values of the average, one for each example.
        best: The values of the best average, for the same examples.
        maximize: Whether a higher value is better.

    Example:
        >>> is_worse([1.1, 2.1, 3.2], [1.0, 2.0, 3.0], maximize=False)
        True
    """
    bounds = interval([(b - a if maximize else a - b) for a, b in zip(values, best, strict=True)])
    return bounds is not None and bounds[0] > 0

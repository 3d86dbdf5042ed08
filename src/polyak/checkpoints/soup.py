"""Greedy soups: checkpoints join an average one by one, the best first, and stay if it does not get worse."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, isnan

from torch import Tensor

from polyak.checkpoints.averaging import Plan, average, plan
from polyak.checkpoints.opening import Checkpoint
from polyak.errors import ArgumentError

Evaluate = Callable[[str, dict[str, Tensor]], float]


@dataclass(frozen=True, slots=True)
class Ingredient:
    """A checkpoint that was tried.

    Args:
        checkpoint: The checkpoint.
        alone: Its own value.
        joined: The value of the soup with it; that of itself for the first.
        kept: Whether it is in the soup.
    """

    checkpoint: Checkpoint
    alone: float
    joined: float
    kept: bool


@dataclass(frozen=True, slots=True)
class Soup:
    """The result of `greedy_soup`.

    Args:
        plan: Averages what is in the soup. The best counts as the newest: its dtypes, layout and integers are kept.
        value: The value of the soup.
        ingredients: All that were tried, the best first.
    """

    plan: Plan
    value: float
    ingredients: Sequence[Ingredient]


def greedy_soup(
    opened: Sequence[Checkpoint],
    evaluate: Evaluate,
    *,
    maximize: bool | Callable[[], bool] = False,
    common: bool = False,
) -> Soup:
    """Return the greedy soup of checkpoints. One set of weights is in memory at a time.

    Each is evaluated. Then the average of the best and the next is evaluated, and the next stays if the average is no
    worse, and so on. A value that is NaN is worse than any other.

    Args:
        opened: The checkpoints.
        evaluate: Takes a name for people and weights; returns their value.
        maximize: Whether higher is better, or what returns it once all are evaluated.
        common: As for `average_checkpoints`.

    Raises:
        ArgumentError: If all values are NaN.
        CheckpointError: If the checkpoints are not of one model, or one is damaged.

    References:
        Wortsman et al., 2022, https://arxiv.org/abs/2203.05482, recipe 1
    """
    whole = plan(opened, [1.0] * len(opened), common=common)
    opened = whole.checkpoints

    def rank(value: float) -> float:
        return inf if isnan(value) else -value if higher else value

    def valued(name: str, inside: Sequence[Checkpoint]) -> float:
        made = Plan(inside, [1.0] * len(inside), whole.names)
        return evaluate(name, {tensor: average(made, tensor) for tensor in made.names})

    alone = [valued(str(one.path), [one]) for one in opened]
    higher = maximize() if callable(maximize) else maximize
    best_first = sorted(range(len(opened)), key=lambda i: rank(alone[i]))
    first = best_first[0]
    if isnan(alone[first]):
        raise ArgumentError(f"an evaluation must give a number (got NaN for all {len(alone)} checkpoints); correct it")
    soup, value = [opened[first]], alone[first]
    tried = [Ingredient(opened[first], value, value, kept=True)]
    for i in best_first[1:]:
        larger = [opened[i], *soup]  # the best stays the last, which counts as the newest
        joined = valued(f"a soup of {len(larger)} with {opened[i].path}", larger)
        kept = rank(joined) <= rank(value)
        if kept:
            soup, value = larger, joined
        tried.append(Ingredient(opened[i], alone[i], joined, kept))
    return Soup(Plan(soup, [1.0] * len(soup), whole.names, whole.left_out), value, tried)

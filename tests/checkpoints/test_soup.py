"""A greedy soup takes what a float64 reference of the published recipe takes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from polyak import ArgumentError
from polyak.checkpoints import open_checkpoint
from polyak.checkpoints.averaging import average
from polyak.checkpoints.soup import greedy_soup


def opened(folder, values):
    for i, value in enumerate(values):
        save_file({"w": torch.tensor([float(value)], dtype=torch.float64)}, folder / f"{i}.safetensors")
    return [open_checkpoint(folder / f"{i}.safetensors") for i in range(len(values))]


def recipe(values, value_of):
    """Return which numbers the published recipe takes: sort, then add what does not make the mean worse."""
    first, *rest = sorted(range(len(values)), key=lambda i: -value_of(values[i]))
    taken = [first]
    for i in rest:
        if value_of(mean(values, [*taken, i])) >= value_of(mean(values, taken)):
            taken.append(i)
    return taken


def mean(values, which) -> float:
    return sum(values[i] for i in which) / len(which)


@given(st.lists(st.integers(-8, 8), min_size=1, max_size=6), st.booleans())
@settings(max_examples=20)
def test_a_soup_takes_what_the_published_recipe_takes(tmp_path_factory, values, maximize) -> None:
    sign = 1 if maximize else -1
    asked: list[str] = []

    def evaluate(name, state) -> float:
        asked.append(name)
        return sign * -abs(state["w"].item() - 1)

    soup = greedy_soup(opened(tmp_path_factory.mktemp("soup"), values), evaluate, maximize=maximize)
    want = recipe(values, lambda value: -abs(value - 1))
    assert [int(one.path.stem) for one in reversed(soup.plan.checkpoints)] == want
    assert [int(one.checkpoint.path.stem) for one in soup.ingredients if one.kept] == want
    assert average(soup.plan, "w").item() == pytest.approx(mean(values, want))
    assert len(asked) == 2 * len(values) - 1


def test_what_gives_nan_never_joins(tmp_path) -> None:
    def evaluate(name, state) -> float:
        value = state["w"].item()
        return float("nan") if value > 1.5 else value

    soup = greedy_soup(opened(tmp_path, [1, 2, 3]), evaluate)
    assert [one.path.stem for one in soup.plan.checkpoints] == ["0"]
    assert [one.kept for one in soup.ingredients] == [True, False, False]
    with pytest.raises(ArgumentError, match="got NaN for all 2 checkpoints"):
        greedy_soup(opened(tmp_path, [2, 3]), evaluate)

"""Averages equal the published formulas, derived here in float64: those of fairseq, and of merges in place of a decay.

No code of these is in here, and fairseq is not installed: the formulas are.
"""

import math
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file, save_file

from polyak import Cooldown
from polyak.checkpoints import average_checkpoints, weights_at


def write(folder, count: int, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(0)
    states = [{"w": torch.randn(1000, generator=generator).to(dtype)} for _ in range(count)]
    for i, state in enumerate(states, 1):
        save_file(state, folder / f"step-{100 * i}.safetensors")
    return sorted(folder.glob("*.safetensors")), [state["w"].double() for state in states]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_a_uniform_average_is_the_sum_divided_by_the_number_as_fairseq_has_it(tmp_path, count, dtype) -> None:
    paths, values = write(tmp_path, count, dtype)
    average_checkpoints(paths, tmp_path / "out.safetensors")
    exact = sum(values) / count
    got = load_file(tmp_path / "out.safetensors")["w"]
    assert torch.equal(got, exact.to(dtype))
    in_float32 = sum(value.float() for value in values) / count  # as it computes: rounded at each sum
    assert torch.allclose(got.float(), in_float32, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_an_average_is_that_of_mergekits_linear_merge_within_its_float32(tmp_path, dtype) -> None:
    pytest.importorskip("mergekit")
    from mergekit.merge_methods.base import TensorBatch
    from mergekit.merge_methods.linear import linear_merge

    paths, values = write(tmp_path, 3, dtype)
    weights = [0.5, 1.0, 2.5]
    average_checkpoints(paths, tmp_path / "out.safetensors", weights=weights)
    got = load_file(tmp_path / "out.safetensors")["w"]
    batch = TensorBatch(tuple(value.to(dtype).unsqueeze(0) for value in values))
    theirs = linear_merge.implementation(batch, torch.tensor([weights]))[0]
    assert torch.allclose(got.double(), theirs.double(), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_a_merge_of_megatron_is_a_sum_in_float32_with_weights_that_are_divided_by_their_sum(tmp_path) -> None:
    paths, values = write(tmp_path, 4)
    shares = [1 - math.sqrt(i / 4) for i in range(5)]
    weights = [before - after for before, after in pairwise(shares)]  # as its "minus-sqrt" has them
    average_checkpoints(paths, tmp_path / "out.safetensors", weights=weights)
    theirs = torch.zeros(1000)
    for weight, value in zip(weights, values, strict=True):
        theirs += value.float() * weight
    got = load_file(tmp_path / "out.safetensors")["w"]
    assert torch.allclose(got, theirs / sum(weights), rtol=1e-5, atol=1e-6)
    assert torch.equal(got, (sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)).float())


# The share of the full learning rate that is left at a fraction of the decay.
DECAYS = {
    "1-sqrt": lambda x: 1 - math.sqrt(x),
    "linear": lambda x: 1 - x,
    "1-square": lambda x: 1 - x**2,
}


def merge_weights(decay, count: int) -> list[float]:
    """Return the weights of checkpoints whose merge acts as a decay of the learning rate does.

    If checkpoint j has the weight c_j, a gradient step between checkpoints i and i + 1 counts as the sum of the c_j
    after it. So that step i counts as the decay says, c_j must be the drop of the decay from j to j + 1 (WSM, 2025,
    https://arxiv.org/abs/2507.17634, theorem 3.1).
    """
    return [decay(j / count) - decay((j + 1) / count) for j in range(count)]


@pytest.mark.parametrize("shape", list(DECAYS))
@pytest.mark.parametrize("count", [2, 4, 9])
def test_a_cooldown_over_checkpoints_is_the_merge_that_acts_as_the_decay(tmp_path, shape, count) -> None:
    paths, values = write(tmp_path, count)
    want = merge_weights(DECAYS[shape], count)
    assert sum(want) == pytest.approx(1)
    profile = Cooldown(f"{100 * count}ba", shape)
    times = [100.0 * (i + 1) for i in range(count)]
    assert weights_at(profile, times) == pytest.approx(want)
    average_checkpoints(paths, tmp_path / "out.safetensors", profile=profile)
    exact = sum(weight * value for weight, value in zip(want, values, strict=True))
    assert torch.allclose(load_file(tmp_path / "out.safetensors")["w"].double(), exact, rtol=1e-6, atol=1e-7)

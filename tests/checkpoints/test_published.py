"""Averages equal the published formulas, derived here in float64: those of fairseq, and of merges in place of a decay.

No code of these is in here, and fairseq is not installed: the formulas are.
"""

import math

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

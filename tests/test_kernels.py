import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyak.kernels import SCRATCH_ELEMENTS, Exchange, lerp_
from polyak.kernels.foreach import _round

SHAPES = [(3,), (4, 5), (2, 3, 4, 5), (), (0,), (SCRATCH_ELEMENTS + 1,), (700, 400)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def tensors(dtype, seed) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]
    made[2] = made[2].to(memory_format=torch.channels_last)
    made.append(torch.randn(6, 8, generator=generator).to(dtype)[:, ::2])  # not dense
    made.append(torch.randn(5, 7, generator=generator).to(dtype).t())
    return made


@pytest.mark.parametrize("weight", [0.0, 1e-4, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("online_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_lerp_is_that_of_float64_for_each_pair_of_dtypes(dtype, online_dtype, weight) -> None:
    averages, online = tensors(dtype, 0), tensors(online_dtype, 1)
    # Laid out otherwise, in part: what counts is the place in the tensor.
    online[4] = online[4].clone()
    online[2] = online[2].contiguous()
    sizes = [a.double().abs() + x.double().abs() for a, x in zip(averages, online, strict=True)]
    want = [a.double() + weight * (x.double() - a.double()) for a, x in zip(averages, online, strict=True)]
    left_out = lerp_(averages, online, weight, range(len(averages)))
    assert int(left_out) == 0
    for got, true, size in zip(averages, want, sizes, strict=True):
        unit = torch.finfo(dtype).eps * size + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        assert ((got.double() - true).abs() <= unit).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_one_gives_the_weights_themselves_and_zero_leaves_the_average(dtype) -> None:
    averages, online = tensors(dtype, 0), tensors(dtype, 1)
    before = [a.clone() for a in averages]
    lerp_(averages, online, 0.0, range(len(averages)))
    assert all(torch.equal(a, b) for a, b in zip(averages, before, strict=True))
    lerp_(averages, online, 1.0, range(len(averages)))
    assert all(torch.equal(a, x) for a, x in zip(averages, online, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64])
def test_a_tensor_that_is_not_finite_leaves_its_average_and_no_other_as_it_was(dtype, bad) -> None:
    averages = [torch.ones(SCRATCH_ELEMENTS + 5, dtype=dtype), torch.ones(3, dtype=dtype)]
    online = [torch.full_like(a, 2) for a in averages]
    online[0][-1] = bad
    assert int(lerp_(averages, online, 0.5, [0, 1])) == 1
    assert torch.equal(averages[0], torch.ones_like(averages[0]))
    assert torch.equal(averages[1], torch.full_like(averages[1], 1.5))


def test_large_finite_float16_weights_are_no_infinity() -> None:
    average, online = torch.zeros(1000), torch.full((1000,), 60000.0, dtype=torch.float16)
    assert int(lerp_([average], [online], 1.0, [0])) == 0
    assert average[0] == 60000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 3e4])
def test_stochastic_rounding_has_the_right_mean_and_goes_to_a_neighbour(dtype, scale) -> None:
    values = torch.randn(2000, generator=torch.Generator().manual_seed(0)).clamp_(-2, 2) * scale
    rounded = torch.stack([_round(values, dtype, seed, 0).double() for seed in range(2000)])
    limits = torch.finfo(dtype)
    unit = (values.double().abs() * limits.eps).clamp(min=limits.tiny * limits.eps)
    assert ((rounded - values).abs() <= unit).all()
    # The mean of 2000 roundings is off by a 2000 ** -0.5 of half a unit: six times that is not chance.
    assert ((rounded.mean(0) - values).abs() <= 6 * 0.5 * unit / 2000**0.5).all()


@given(st.integers(1, 3000), st.integers(0, 2**32 - 1))
def test_the_chance_in_rounding_does_not_depend_on_how_the_work_is_split(cut, seed) -> None:
    values = torch.linspace(-3, 3, 3001)
    whole = _round(values, torch.bfloat16, seed, 0)
    parts = [_round(values[:cut], torch.bfloat16, seed, 0), _round(values[cut:], torch.bfloat16, seed, cut)]
    assert torch.equal(whole, torch.cat(parts))


def pairs() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    left = [*tensors(torch.float32, 0), *tensors(torch.bfloat16, 0), torch.arange(5), torch.tensor([True, False])]
    right = [*tensors(torch.float32, 1), *tensors(torch.bfloat16, 1), torch.arange(5, 10), torch.tensor([False, True])]
    right[4] = right[4].contiguous()
    return left, right


def same(some, others) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def test_an_exchange_swaps_all_values_and_swaps_them_back() -> None:
    left, right = pairs()
    old_left, old_right = [t.clone() for t in left], [t.clone() for t in right]
    exchange = Exchange(left, right)
    exchange.forward()
    assert same(left, old_right)
    assert same(right, old_left)
    exchange.back()
    assert same(left, old_left)
    assert same(right, old_right)


def test_an_exchange_that_is_interrupted_anywhere_goes_back_even_if_that_is_interrupted_too(monkeypatch) -> None:
    class Stop(BaseException):
        pass

    real = Exchange._step
    calls = 0
    stops = set[tuple[int, str]]()

    def step(self, number) -> None:
        nonlocal calls
        calls += 1
        if (calls, "before") in stops:
            raise Stop
        real(self, number)
        if (calls, "after") in stops:
            raise Stop

    monkeypatch.setattr(Exchange, "_step", step)
    left, right = pairs()
    old_left, old_right = [t.clone() for t in left], [t.clone() for t in right]
    total = 3 * len(Exchange(left, right)._buckets)
    for first in range(1, total + 1):
        for second in (1, 2, 3, 4, 5):
            for when in ("before", "after"):
                calls, stops = 0, {(first, when), (first + second, when)}
                exchange = Exchange(left, right)
                with pytest.raises(Stop):
                    exchange.forward()
                try:
                    exchange.back()
                except Stop:
                    exchange.back()
                assert same(left, old_left)
                assert same(right, old_right)


def test_an_exchange_needs_no_more_than_its_scratch() -> None:
    left, right = [torch.zeros(10 * SCRATCH_ELEMENTS)], [torch.ones(10 * SCRATCH_ELEMENTS)]
    assert sum(s.numel() for s in Exchange(left, right)._scratches.values()) <= SCRATCH_ELEMENTS


def test_the_pieces_of_a_large_tensor_are_rounded_by_chances_of_their_own() -> None:
    average = torch.ones(2 * SCRATCH_ELEMENTS, dtype=torch.bfloat16)
    lerp_([average], [average + 0.5], 0.001, [7])
    first, second = average.chunk(2)
    assert not torch.equal(first, second)

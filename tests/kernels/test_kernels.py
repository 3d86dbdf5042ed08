import importlib.util
import itertools
import math
import sys
from contextlib import suppress
from functools import cache, partial
from unittest import mock

import pytest
import torch
import warm
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from polyak import KernelError, kernels
from polyak.kernels import SCRATCH_ELEMENTS, Pair, Place, c, exchange, foreach, pieces, registry, rounding
from polyak.kernels.pieces import Scratch
from polyak.kernels.rounding import RandomBits, RowBits, key, round_

SHAPES = [(3,), (4, 5), (2, 3, 4, 5), (), (0,), (SCRATCH_ELEMENTS + 1,), (700, 400)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def begin_with(name, function):
    """Return a function of the kernels that begins with the kernel of this name."""

    def call(*arguments):
        with kernels.only(name):
            return function(*arguments)

    return call


KERNELS = {name: begin_with(name, kernels.lerp) for name in kernels.serving_cpu()}
EXCHANGES = {name: begin_with(name, kernels.swap) for name in KERNELS}
needs_c = pytest.mark.skipif("c" not in KERNELS, reason=f"no kernel in C: {c.WHY_NOT}")


@pytest.fixture(params=["torch", "c"], scope="module")
def kernel(request):
    if request.param not in KERNELS:
        pytest.skip(f"no kernel in C: {c.WHY_NOT}")
    return request.param


@pytest.fixture
def lerp_(kernel):
    return partial(kernels.lerp_, by=KERNELS[kernel])


@cache
def drawn(seed) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in (*SHAPES, (6, 8), (5, 7))]


def tensors(dtype, seed) -> list[torch.Tensor]:
    made = [tensor.to(dtype, copy=True) for tensor in drawn(seed)]
    made[2] = made[2].to(memory_format=torch.channels_last)
    made[-2] = made[-2][:, ::2]  # not dense
    made[-1] = made[-1].t()
    return made


def places(tensors) -> list[Place]:
    return [Place(seed) for seed in range(len(tensors))]


@pytest.mark.parametrize("weight", [0.0, 1e-4, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("online_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_lerp_is_that_of_float64_for_each_pair_of_dtypes(lerp_, dtype, online_dtype, weight) -> None:
    averages, online = tensors(dtype, 0), tensors(online_dtype, 1)
    # Laid out otherwise, in part: what counts is the place in the tensor.
    online[4] = online[4].clone()
    online[2] = online[2].contiguous()
    sizes = [a.double().abs() + x.double().abs() for a, x in zip(averages, online, strict=True)]
    want = [a.double() + weight * (x.double() - a.double()) for a, x in zip(averages, online, strict=True)]
    left_out = lerp_(averages, online, weight, places(averages))
    assert int(left_out) == 0
    for got, true, size in zip(averages, want, sizes, strict=True):
        unit = torch.finfo(dtype).eps * size + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        assert ((got.double() - true).abs() <= unit).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_one_gives_the_weights_themselves_and_zero_leaves_the_average(lerp_, dtype) -> None:
    averages, online = tensors(dtype, 0), tensors(dtype, 1)
    before = [a.clone() for a in averages]
    lerp_(averages, online, 0.0, places(averages))
    assert all(torch.equal(a, b) for a, b in zip(averages, before, strict=True))
    lerp_(averages, online, 1.0, places(averages))
    assert all(torch.equal(a, x) for a, x in zip(averages, online, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("online_dtype", [*DTYPES, torch.complex64])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64])
def test_nan_or_inf_in_the_weights_leaves_its_element_of_the_average_unchanged_and_no_other(
    lerp_, dtype, online_dtype, bad
) -> None:
    if online_dtype.is_complex and not dtype.is_complex:
        pytest.skip("a complex weight has no real average")
    sizes = [SCRATCH_ELEMENTS + 5, 3, 1_000_003]
    averages = [torch.ones(size, dtype=dtype) for size in sizes]
    online = [torch.full((size,), 2, dtype=online_dtype) for size in sizes]
    for place in (0, 100, -1):
        online[0][place] = bad
        online[2][place] = bad
    assert int(lerp_(averages, online, 0.5, places(averages))) == 2
    for average, tensor in zip(averages, online, strict=True):
        assert torch.equal(average, torch.where(tensor.isfinite(), 1.5, 1.0).to(dtype))


def test_large_finite_weights_are_no_infinity(lerp_) -> None:
    for dtype, large in ((torch.float16, 60000.0), (torch.float32, 3e38)):
        average, online = torch.zeros(1000), torch.full((1000,), large, dtype=dtype)
        assert int(lerp_([average], [online], 1.0, [Place(0)])) == 0
        assert torch.equal(average, online.float())


@needs_c
@pytest.mark.parametrize("scale", [1.0, 1e-38, 1e38])
@pytest.mark.parametrize("online_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernels_give_the_same_bits(monkeypatch, dtype, online_dtype, scale) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(c, "_JOB", 1 << 12)  # enough of them for all threads
    begin, ours, theirs, online = tensors(dtype, 0), tensors(dtype, 0), tensors(dtype, 0), tensors(online_dtype, 1)
    for tensor in (*begin, *online):
        tensor.mul_(scale)
    online[5][7] = float("nan")
    where = places(ours)
    for weight in (0.0, 1e-4, 0.3, 0.5, 0.9, 1 - 2**-25, 1.0):
        for tensor, value in zip((*ours, *theirs), (*begin, *begin), strict=True):
            tensor.copy_(value)
        counts = [
            int(kernels.lerp_(averages, online, weight, where, 5, by=KERNELS[name]))
            for name, averages in (("c", ours), ("torch", theirs))
        ]
        assert counts[0] == counts[1]
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(*(t.reshape(-1).contiguous().view(torch.uint8) for t in (one, other)))


@needs_c
@pytest.mark.parametrize("has_openmp", [True, False])
def test_c_does_all_jobs_with_the_threads_of_torch_and_with_its_own(monkeypatch, has_openmp) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(c, "_JOB", 1 << 12)
    monkeypatch.setattr(c, "_SWAP", 1 << 12)
    if not has_openmp:
        monkeypatch.setattr(c._team, "address", 0)
    average, other, online = torch.zeros(100_001), torch.zeros(100_001), torch.arange(100_001.0)
    assert int(kernels.lerp_([average], [online], 0.5, [Place(0)], by=KERNELS["c"])) == 0
    assert torch.equal(average, online / 2)
    EXCHANGES["c"]([average], [other]).forward()
    assert torch.equal(other, online / 2)
    assert not average.any()


@needs_c
def test_float16_is_read_exactly_by_c() -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    average = torch.zeros(every.shape)
    kernels.lerp_([average], [every], 1.0, [Place(0)], by=KERNELS["c"])
    want = torch.where(every.isfinite(), every.float(), 0)
    assert torch.equal(average.view(torch.int32), want.view(torch.int32))


@needs_c
def test_a_forked_process_has_threads_of_its_own() -> None:
    program = """
import os, torch
from polyak.kernels import Place, lerp, only
torch.set_num_threads(2)
with only("c"):
    lerp = lerp([torch.zeros(1_000_000)], [torch.ones(1_000_000)], [Place(0)], torch.zeros((), dtype=torch.int64))
lerp(0.5, 1)
child = os.fork()
lerp(0.5, 2)
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    done = warm.run("-c", program)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("size", [3, 3000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_backward_pass_through_an_average_that_has_moved_is_an_error(lerp_, dtype, size) -> None:
    average, inputs = torch.ones(size, dtype=dtype), torch.ones(size, dtype=dtype, requires_grad=True)
    loss = (average * inputs).sum()
    lerp_([average], [torch.zeros(size, dtype=dtype)], 0.5, [Place(0)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_update_counts_only_the_tensors_that_have_nan_or_inf_in_it(kernel) -> None:
    averages, online = [torch.ones(3) for _ in range(3)], [torch.ones(3) for _ in range(3)]
    left_out = torch.zeros((), dtype=torch.int64)
    update = KERNELS[kernel](averages, online, places(averages), left_out)
    for number, tensor in enumerate(online, start=1):
        tensor[1] = float("nan")
        update(0.5, number)
        tensor[1] = 1
        assert int(left_out) == number


def test_a_nan_in_a_16_bit_average_becomes_the_one_that_all_kernels_write(lerp_) -> None:
    for dtype, nan in ((torch.bfloat16, 0x7FC0), (torch.float16, 0x7E00)):
        average = torch.ones(4 * 1024, dtype=dtype)
        average.view(torch.int16)[5] = 0x7FFF
        lerp_([average], [torch.ones_like(average)], 0.3, [Place(0)])
        assert int(average.view(torch.int16)[5]) == nan
        assert int(average.isnan().sum()) == 1


@pytest.mark.parametrize("shape", [(30, 20), (90, 70), (SCRATCH_ELEMENTS // 100, 300)])
def test_a_shard_is_rounded_by_its_indices_however_it_is_laid_out(lerp_, shape) -> None:
    place = Place(5, shape=shape, offset=(0, 0))
    one = torch.ones(shape, dtype=torch.bfloat16)
    other = one.t().contiguous().t()
    lerp_([one], [torch.full_like(one, 1.5)], 0.001, [place])
    lerp_([other], [torch.full_like(other, 1.5)], 0.001, [place])
    assert one.unique().numel() == 2
    assert torch.equal(one, other)


def with_all_kinds_of_counters() -> list[torch.Tensor]:
    """Return tensors of which two share the counter of their changes, and the last, an inference tensor, has none."""
    with torch.inference_mode():
        last = torch.ones(3)
    return [torch.ones(3), *torch.ones(6).split(3), last]


def test_each_average_counts_as_changed_whatever_counters_they_share(kernel) -> None:
    averages = with_all_kinds_of_counters()
    online = [torch.zeros(3) for _ in averages]
    before = [average._version for average in averages[:-1]]
    with torch.inference_mode():
        kernels.lerp_(averages, online, 0.5, places(averages), 1, by=KERNELS[kernel])
    assert all(average._version > version for average, version in zip(averages, before, strict=False))
    assert all(torch.equal(average, torch.full((3,), 0.5)) for average in averages)


def test_all_that_is_swapped_counts_as_changed_whatever_counters_it_shares(exchange_of) -> None:
    left, right = with_all_kinds_of_counters(), with_all_kinds_of_counters()
    exchange = exchange_of(left, right)
    counting = left[:-1] + right[:-1]
    before = [tensor._version for tensor in counting]
    with torch.inference_mode():
        exchange.forward()
    assert all(tensor._version > version for tensor, version in zip(counting, before, strict=True))


@pytest.mark.parametrize("name", ["torch", "c", "cobol"])
def test_the_environment_can_force_a_kernel(monkeypatch, name) -> None:
    monkeypatch.setenv("POLYAK_KERNEL", name)
    spec = importlib.util.spec_from_file_location("polyak.kernels.another_registry", registry.__file__)
    another = importlib.util.module_from_spec(spec)  # it reads the environment once, when it is imported
    if name == "torch" or (name == "c" and not c.WHY_NOT):
        spec.loader.exec_module(another)
        assert another.serving_cpu()[0] == name
    else:
        with pytest.raises(KernelError, match=r"POLYAK_KERNEL must be (triton or )?(c or )?torch on this machine"):
            spec.loader.exec_module(another)


def test_a_16_bit_average_is_rounded_otherwise_in_each_update() -> None:
    assert len({key(seed, update) for seed in range(50) for update in range(50)}) == 2500
    average, online = torch.zeros(1000, dtype=torch.bfloat16), torch.ones(1000)
    for update in range(1000):
        kernels.lerp([average], [online], [Place(1)], torch.zeros((), dtype=torch.int64))(0.001, update)
    # 1 - 0.999 ** 1000 is 0.632; rounding to nearest would have stalled at 0.25.
    assert abs(average.double().mean() - 0.632) < 0.005


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 3e4])
def test_stochastic_rounding_has_the_right_mean_and_goes_to_a_neighbour(dtype, scale) -> None:
    values = torch.randn(2000, generator=torch.Generator().manual_seed(0)).clamp_(-2, 2) * scale
    scratch = Scratch()

    def rounded_with(seed) -> torch.Tensor:
        rounded = values.clone()
        round_(rounded, dtype, RandomBits(Place(seed), values.shape, 0, scratch).of(values), scratch)
        assert torch.equal(rounded.to(dtype).float(), rounded)
        return rounded.double()

    rounded = torch.stack([rounded_with(seed) for seed in range(2000)])
    limits = torch.finfo(dtype)
    unit = (values.double().abs() * limits.eps).clamp(min=limits.tiny * limits.eps)
    assert ((rounded - values).abs() <= unit).all()
    # The mean of 2000 roundings is off by a 2000 ** -0.5 of half a unit: six times that is no accident.
    assert ((rounded.mean(0) - values).abs() <= 6 * 0.5 * unit / 2000**0.5).all()


def bits_of(indices, number) -> list[int]:
    """What C, Triton and torch are to draw for these indices in a whole, in arithmetic without a limit."""

    def mixed(x) -> int:
        x = ((x ^ (x >> 16)) * 0x21F0AAAD) % 2**32
        x = ((x ^ (x >> 15)) * 0x735A2D97) % 2**32
        return x ^ (x >> 15)

    words = [mixed((index // 2) % 2**32 ^ number ^ mixed(index // 2**33)) for index in indices]
    return [word >> 16 * (index % 2) & 0xFFFF for word, index in zip(words, indices, strict=True)]


@pytest.mark.parametrize("little_endian", [True, False])
@pytest.mark.parametrize(
    ("place", "shape"),
    [
        (Place(2**32 - 1), (41,)),
        (Place(1, (9, 7), (3, 0)), (4, 7)),
        (Place(2, (9, 7), (3, 2)), (4, 3)),
        (Place(3, (5, 9, 7), (1, 2, 1)), (3, 4, 5)),
        (Place(4, (9, 7), (1, 3)), (6, 1)),
        (Place(5, (2**40,), (2**32 - 21,)), (50,)),
        (Place(6, (2**40,), (2**33 - 21,)), (50,)),
        (Place(7, (2**40, 5), (2**33 - 21, 1)), (20, 3)),
        (Place(8, (2**40,), (7 * 2**33 + 5,)), (11,)),
    ],
)
def test_the_random_bits_are_those_of_the_formula_whatever_the_pieces(monkeypatch, place, shape, little_endian) -> None:
    monkeypatch.setattr(rounding, "_LITTLE_ENDIAN", little_endian and rounding._LITTLE_ENDIAN)
    box = place.box(shape)
    indices = [
        box.first + sum(i * step for i, step in zip(at, box.steps, strict=True))
        for at in itertools.product(*map(range, box.sizes))
    ]
    random = RandomBits(place, shape, 2**32 + 3, Scratch())
    drawn = [bits for piece in torch.empty(len(indices)).split(9) for bits in random.of(piece).tolist()]
    assert drawn == bits_of(indices, key(place.seed, 3))


def test_the_random_bits_of_a_row_are_those_of_the_formula() -> None:
    seeds, firsts = [0, 2**32 - 1, 2**31, 7], [0, 5, 2**32 + 1, 2**33 - 8]
    runs = [range(first, first + 7) for first in firsts]
    rows = RowBits(seeds, runs, 4, Scratch()).draw(9).view(4, 8).tolist()
    for row, run, seed in zip(rows, runs, seeds, strict=True):
        assert row[run.start % 2 :][:7] == bits_of(run, key(seed, 9))


@st.composite
def tilings(draw):
    """A shape, and boxes that tile it: for each dimension some cuts, two of which may be the same."""
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 5, 31, 32, 33, 70]), min_size=1, max_size=3)))
    edges = [sorted([0, size, *draw(st.lists(st.integers(0, size), max_size=2))]) for size in shape]
    return shape, list(itertools.product(*map(itertools.pairwise, edges)))


@given(
    tilings(),
    st.sampled_from([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([0.3, 1.0, 1e-3]),
    st.integers(0, 2**32 - 1),
    st.sampled_from([6, 18]),
)
@example(((40, 70), [((0, 40), (0, 33)), ((0, 40), (33, 70))]), torch.bfloat16, torch.float32, 0.3, 1, 18)
@settings(deadline=None)
def test_updating_shards_that_tile_a_tensor_equals_updating_the_whole(
    kernel, tiling, dtype, online_dtype, weight, seed, job
):
    shape, boxes = tiling
    generator = torch.Generator().manual_seed(seed)
    whole, online = torch.randn(shape, generator=generator).to(dtype), torch.randn(shape, generator=generator)
    online = online.to(online_dtype)
    online.view(-1)[seed % online.numel()] = float("nan")
    cuts = [tuple(slice(*edges) for edges in box) for box in boxes]
    shards = [whole[cut].contiguous() for cut in cuts]
    shards[-1] = shards[-1].t().contiguous().t() if len(shape) == 2 else shards[-1]  # the layout in memory is no matter
    kernels.lerp_([whole], [online], weight, [Place(seed)], 3, by=KERNELS[kernel])
    where = [Place(seed, shape, tuple(begin for begin, _ in box)) for box in boxes]
    with mock.patch.object(c, "_JOB", 1 << job):
        kernels.lerp_(shards, [online[cut].contiguous() for cut in cuts], weight, where, 3, by=KERNELS[kernel])
    for cut, shard in zip(cuts, shards, strict=True):
        assert torch.equal(shard, whole[cut])


def test_a_shard_of_a_tensor_of_more_than_2_to_the_33_elements_has_the_same_bits_from_both_kernels() -> None:
    # Where the counter of the random bits overflows 32 bits.
    for offset, rows in (((2**33 - 40,), 100), ((2**34 - 500_000,), 1_000_000), ((5 * 2**33 + 7,), 50)):
        averages = [torch.ones(rows, dtype=torch.bfloat16) for _ in KERNELS]
        for average, kernel in zip(averages, KERNELS.values(), strict=True):
            kernels.lerp_([average], [average + 0.5], 1e-3, [Place(9, (2**40,), offset)], by=kernel)
        assert all(torch.equal(average, averages[0]) for average in averages)


def pairs() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    def one(seed):
        return [t for dtype in (torch.float32, torch.bfloat16) for t in tensors(dtype, seed) if t.numel() < 1000] + [
            torch.arange(seed, seed + 2500),
            torch.tensor([seed > 0, False]),
        ]

    left, right = one(0), one(1)
    right[2] = right[2].contiguous()  # the other is not
    for shape in ((70, 40), (2, 3, 1100)):
        left.append(torch.arange(math.prod(shape)).view(shape))
        right.append(-torch.arange(math.prod(shape)).view(shape[::-1]).permute(*reversed(range(len(shape)))))
    return left, right


def same(some, others) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.fixture
def exchange_of(kernel, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(c, "_SWAP", 1 << 10)  # enough of them for all threads
    monkeypatch.setattr(c, "_JOB", 1 << 12)
    for module in (exchange, pieces):
        monkeypatch.setattr(module, "SCRATCH_ELEMENTS", 1000)
    return EXCHANGES[kernel]


def test_an_exchange_swaps_all_values_and_swaps_them_back(exchange_of) -> None:
    left, right = pairs()
    old_left, old_right = [t.clone() for t in left], [t.clone() for t in right]
    exchange = exchange_of(left, right)
    for _ in range(2):
        exchange.forward()
        assert same(left, old_right)
        assert same(right, old_left)
        exchange.back()
        assert same(left, old_left)
        assert same(right, old_right)


class Stop(BaseException):
    """An interrupt."""


class Stopping:
    """Raises ``Stop`` at one line of the kernels and again so many lines later, as an interrupt might."""

    def __init__(self, *lines: int) -> None:
        self.lines, self.seen = set(lines), 0

    def __enter__(self) -> "Stopping":
        self.before = sys.gettrace()
        sys.settrace(self.enter)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)

    def enter(self, frame, event, argument):
        return self.line if frame.f_code.co_filename in (c.__file__, exchange.__file__, registry.__file__) else None

    def line(self, frame, event, argument):
        if event == "line":
            self.seen += 1
            if self.seen in self.lines:
                raise Stop
        return self.line


@pytest.mark.slow
def test_an_exchange_that_is_interrupted_anywhere_is_undone_even_if_that_is_interrupted_too(exchange_of) -> None:
    left, right = pairs()
    old_left, old_right = [t.clone() for t in left], [t.clone() for t in right]
    with Stopping() as all_of_it:
        exchange = exchange_of(left, right)
        made = all_of_it.seen
        exchange.forward()
    exchange.back()
    lines = all_of_it.seen - made
    assert lines > 5
    for first in range(1, lines + 1, max(1, lines // 60)):
        for second in (1, 2, 5, 9, lines // 2, lines - 3):
            exchange = exchange_of(left, right)
            with Stopping(first, first + second):
                with pytest.raises(Stop):
                    exchange.forward()
                with suppress(Stop):
                    exchange.back()
            exchange.back()
            assert same(left, old_left)
            assert same(right, old_right)


def test_an_exchange_that_is_interrupted_may_be_completed(exchange_of) -> None:
    left, right = pairs()
    old_left, old_right = [t.clone() for t in left], [t.clone() for t in right]
    for first in range(1, 40, 3):
        exchange = exchange_of(left, right)
        with Stopping(first), suppress(Stop):
            exchange.forward()
        exchange.forward()
        assert same(left, old_right)
        exchange.back()
        assert same(left, old_left)
        assert same(right, old_right)


def test_an_exchange_needs_no_more_than_its_scratch() -> None:
    left = [torch.zeros(10 * SCRATCH_ELEMENTS), torch.zeros(1, 4, SCRATCH_ELEMENTS + 2)]
    right = [torch.ones(10 * SCRATCH_ELEMENTS), torch.ones(SCRATCH_ELEMENTS + 2, 4, 1).permute(2, 1, 0)]
    exchange = foreach.Exchange(list(map(Pair, left, right)))
    assert sum(s.numel() for s in exchange._scratches.values()) <= SCRATCH_ELEMENTS
    with Allocations() as found:
        exchange.forward()
    assert found.calls > 0
    assert found.total <= 64  # the sums by which a change is seen


@needs_c
def test_an_exchange_in_c_lists_no_more_pieces_the_larger_its_tensors_are(monkeypatch) -> None:
    monkeypatch.setattr(c, "_SWAP", 64)
    monkeypatch.setattr(c, "_MOST", 10)
    for size in (10, 100, 1000, 10_000):
        left, right = [torch.zeros(size), torch.zeros(3)], [torch.ones(size), torch.ones(3)]
        exchange = c.Exchange(list(map(Pair, left, right)))
        assert len(exchange._jobs.items) <= 10 + len(left)
        exchange.forward()
        assert all(bool(tensor.all()) for tensor in left)


def test_a_backward_pass_through_weights_that_were_swapped_is_an_error(exchange_of) -> None:
    weight, inputs = torch.ones(3), torch.ones(3, requires_grad=True)
    loss = (weight * inputs).sum()
    exchange_of([weight], [torch.zeros(3)]).forward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_pieces_of_a_large_tensor_are_rounded_by_different_random_bits(lerp_) -> None:
    average = torch.ones(2 * SCRATCH_ELEMENTS, dtype=torch.bfloat16)
    lerp_([average], [average + 0.5], 0.001, [Place(7)])
    first, second = average.chunk(2)
    assert not torch.equal(first, second)


class Allocations(TorchDispatchMode):
    """Counts the bytes of memory that operations allocate."""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.largest = self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        old = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        self.calls += 1
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in old:
                self.total += tensor.nbytes
                self.largest = max(self.largest, tensor.nbytes)
        return made


def allocations(kernel, averages, online, where=None) -> Allocations:
    where = where or places(averages)
    update = KERNELS[kernel](averages, online, where, torch.zeros((), dtype=torch.int64))
    with torch.no_grad():
        update(0.1, 1)
        with Allocations() as found:
            update(0.1, 2)
    return found


def large_and_small(dtype) -> list[torch.Tensor]:
    return [torch.ones(size, dtype=dtype) for size in (3 * SCRATCH_ELEMENTS, 64, 64)]


@needs_c
@pytest.mark.parametrize("online_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_in_c_calls_no_operation_of_torch(dtype, online_dtype) -> None:
    if (dtype, online_dtype) in c._PAIRS:
        assert allocations("c", large_and_small(dtype), large_and_small(online_dtype)).calls == 0


@pytest.mark.parametrize("online_dtype", [torch.float32, torch.bfloat16])
def test_an_update_in_torch_allocates_flags_only(online_dtype) -> None:
    averages, online = (
        [*large_and_small(dtype), torch.ones(30, 14, dtype=dtype)[:, ::2], torch.ones(30, 14, dtype=dtype).t()]
        for dtype in (torch.float32, online_dtype)
    )
    found = allocations("torch", averages, online)
    assert found.calls > 0
    assert found.total < 1000


@pytest.mark.parametrize("bad", [1.0, float("nan")])
@pytest.mark.parametrize("online_dtype", DTYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_update_in_torch_of_16_bit_averages_allocates_flags_only(dtype, online_dtype, bad) -> None:
    averages = [
        *large_and_small(dtype),
        *(torch.ones(3, dtype=dtype) for _ in range(100)),
        torch.ones((), dtype=dtype),
        torch.ones(300, 1400, dtype=dtype).t(),
        torch.ones(300, 1400, dtype=dtype)[:, ::2],
        torch.ones(30, 14, dtype=dtype)[:, ::2],
        torch.ones(400, 700, dtype=dtype),  # columns of a whole
    ]
    online = [torch.full_like(average, 2, dtype=online_dtype) for average in averages]
    for tensor in (online[0], online[1], online[-2], online[-1]):
        tensor.view(-1)[5] = bad
    where = [*places(averages)[:-1], Place(3, (400, 1000), (0, 300))]
    found = allocations("torch", averages, online, where)
    assert found.calls > 0
    assert found.total < 100


_LAST = torch.channels_last
SMALL = [  # a shape, how average and weights are laid out, and what the average is a shard of
    *((size, None, None) for size in ((), *((n,) for n in (*range(40), 1023, 1024, 1025)), (9, 1, 3))),
    *(((2, 3, 4, 5), layouts, None) for layouts in ((_LAST, _LAST), (_LAST, torch.contiguous_format))),
    ((6, 4), "holes", None),
    ((30,), None, ((50,), (3,))),
    ((9,), None, ((2**40,), (2**33 - 5,))),
    ((9,), None, ((2**40,), (2**33 - 9,))),
    ((9, 1, 3), None, ((20, 1, 3), (5, 0, 0))),
    ((9, 5), None, ((9, 9), (0, 4))),
]


def small_pairs(dtype, online_dtype, scale) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def one(shape, dtype, layout) -> torch.Tensor:
        most = min(scale, torch.finfo(dtype).max)
        values = (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1) * most
        if layout == "holes":
            return values.to(dtype).repeat_interleave(2, -1)[..., ::2]
        return values.to(dtype).to(memory_format=layout or torch.preserve_format)

    layouts = [layout if isinstance(layout, tuple) else (layout, layout) for _, layout, _ in SMALL]
    return (
        [one(shape, dtype, of) for (shape, *_), (of, _) in zip(SMALL, layouts, strict=True)],
        [one(shape, online_dtype, of) for (shape, *_), (_, of) in zip(SMALL, layouts, strict=True)],
    )


@pytest.mark.slow
@pytest.mark.parametrize("bad", [None, float("nan"), float("inf")])
@pytest.mark.parametrize("online_dtype", DTYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_16_bit_tensors_are_moved_together_as_each_alone_is_in_torch_and_in_c(
    monkeypatch, dtype, online_dtype, bad
) -> None:
    where = [Place(seed, *(shard or ())) for seed, (_, _, shard) in enumerate(SMALL)]
    largest = torch.finfo(dtype).max
    for scale in (1.0, 1e-7, 0.4 * largest, 1.003 * largest):
        averages, online = small_pairs(dtype, online_dtype, scale)
        if bad is not None:
            online[12][3], online[30][:], averages[13][0], averages[-1][3, 2] = bad, -bad, bad, -bad
            averages[14].view(torch.int16)[:2] = torch.tensor([0x7FFF, -5])  # nan too
        runs = []
        for name, small in (("torch", 1024), ("torch", 0), ("c", 0)):
            if name not in KERNELS:
                continue
            monkeypatch.setattr(foreach, "_SMALL", small)
            moved, run = [a.clone() for a in averages], []
            for number, weight in enumerate((0.3, 0.9, 1.0)):
                count = int(kernels.lerp_(moved, online, weight, where, number, by=KERNELS[name]))
                assert count == (0 if bad is None else 2)
                run.append([t.contiguous().view(torch.int16).tolist() for t in moved])
            runs.append(run)
        assert all(run == runs[0] for run in runs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_small_16_bit_tensors_take_few_operations_whatever_was_in_the_scratch(dtype) -> None:
    averages = [torch.full((2000,), float("nan"), dtype=dtype)]
    averages += [torch.ones(i % 3 + 1, dtype=dtype) for i in range(1000)]
    assert allocations("torch", averages, [2 * average for average in averages]).calls < 300


def test_a_group_of_which_nothing_moves_as_it_should_is_moved_alone() -> None:
    averages = [torch.ones(6, dtype=torch.bfloat16) for _ in range(3)]
    online = [torch.full((6,), float("nan")) for _ in averages]
    assert int(kernels.lerp_(averages, online, 0.5, places(averages), by=KERNELS["torch"])) == 3
    assert all(torch.equal(average, torch.ones_like(average)) for average in averages)


def test_a_large_tensor_that_is_not_dense_is_rounded_as_a_dense_one() -> None:
    for shape in ((3, 500, 900), (2, 2 * SCRATCH_ELEMENTS + 2)):
        average, online = (torch.rand(shape).bfloat16()[..., ::2] for _ in range(2))
        dense = average.contiguous()
        kernels.lerp_([average, dense], [online, online.contiguous()], 0.3, [Place(1)] * 2, by=KERNELS["torch"])
        assert torch.equal(average, dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_of_tensors_with_different_layouts_allocates_at_most_pieces(kernel, dtype) -> None:
    average, online = torch.ones(8, SCRATCH_ELEMENTS, dtype=dtype), torch.ones(SCRATCH_ELEMENTS, 8).t()
    for bad in (1.0, math.nan):
        online[3, 5] = bad
        with Allocations() as found:
            kernels.lerp_([average], [online], 0.1, [Place(1)], by=KERNELS[kernel])
        assert found.largest <= 8 * SCRATCH_ELEMENTS


@pytest.mark.parametrize("online_dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_many_small_tensors_are_moved_as_each_alone_would_be(online_dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    dtype = torch.promote_types(online_dtype, torch.float32)
    online = [torch.randn(i % 7, i % 3 + 1, generator=generator).to(online_dtype) for i in range(600)]
    one, other = ([torch.ones(x.shape, dtype=dtype) for x in online] for _ in range(2))
    assert int(kernels.lerp_(one, online, 0.3, places(one))) == 0
    for average, tensor in zip(other, online, strict=True):
        kernels.lerp_([average], [tensor], 0.3, [Place(0)])
    assert same(one, other)
    online[577][0, 0] = float("nan")
    assert int(kernels.lerp_(one, online, 0.3, places(one))) == 1

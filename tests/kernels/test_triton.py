"""The kernel in Triton: interpreted on the CPU, compiled without a GPU, and run on one where there is one."""

import ctypes
import importlib.util
import os
import re
import subprocess
import sys
from functools import cache, partial
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from polyak import kernels
from polyak.averaging.weights import Shadow
from polyak.errors import KernelError
from polyak.kernels import Pair, Place, foreach, registry

triton = pytest.importorskip("triton", reason="Triton is not installed")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
PAIRS = list(product(DTYPES, DTYPES))
BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}
_needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def on_gpu(test):
    return pytest.mark.gpu(_needs_gpu(test))


def _copy_of_the_module():
    where = importlib.util.find_spec("polyak.kernels").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("kernel_in_triton", f"{where}/triton.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def _interpreted():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        return _copy_of_the_module()


@cache
def _exact_fma():
    libm, exact = ctypes.CDLL(None), {}
    for dtype, function, c_type in ((np.float32, libm.fmaf, ctypes.c_float), (np.float64, libm.fma, ctypes.c_double)):
        function.argtypes, function.restype = [c_type] * 3, c_type
        exact[np.dtype(dtype)] = np.vectorize(function, otypes=[dtype])
    return exact


@pytest.fixture
def interpreted(monkeypatch):
    """A copy of the kernel that Triton interprets on the CPU, in small blocks. The real one is not touched."""
    import triton.language as tl
    from triton.runtime import interpreter

    real_convert = interpreter._convert_float

    def convert(bits, before, after, rounding):
        if (before, after) == (tl.bfloat16, tl.float32):
            return bits.astype(np.uint32) << 16
        return real_convert(bits, before, after, rounding)

    def fma(self, x, y, z):
        del self
        return interpreter.TensorHandle(_exact_fma()[z.data.dtype](x.data, y.data, z.data), z.dtype.scalar)

    # Put right: the interpreter mistakes subnormal numbers, and in some versions rounds twice.
    monkeypatch.setattr(interpreter, "_convert_float", convert)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", fma)
    # Triton's own `max` is compiled if Triton was imported before.
    monkeypatch.setattr(tl, "max", lambda x: tl.reduce(x, None, tl.standard._elementwise_max))
    module = _interpreted()
    monkeypatch.setattr(module, "BLOCK", 64)
    monkeypatch.setattr(module, "PART", 32)
    with np.errstate(all="ignore"):
        yield module


def in_torch(averages, online, weight, places, num_updates=0):
    """Do what ``kernels.lerp_`` does, in torch."""
    with kernels.only("torch"):
        return kernels.lerp_(averages, online, weight, places, num_updates)


def by(module):
    """Return what stands for ``kernels.lerp``: Triton for the pairs that it accepts, torch for the others."""

    def lerp(averages, online, places, left_out):
        pairs = list(map(Pair, averages, online, places))
        accepted, others = ([pair for pair in pairs if module.accepts(pair) is wanted] for wanted in (True, False))
        parts = [module.lerp(accepted, left_out), foreach.lerp(others, left_out)]
        return registry._Updates([(part, left_out) for part in parts], left_out)

    return lerp


@pytest.fixture
def lerp_(interpreted):
    return partial(kernels.lerp_, by=by(interpreted))


def tensors(dtype, seed, *, device="cpu", shapes=((3,), (7, 19), (), (0,), (128,))):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).to(device) for s in shapes]


def places(tensors):
    return [Place(77 * number) for number in range(len(tensors))]


def same_bits(some, others) -> bool:
    """Return whether all is the same, signs of zeros included. A nan is a nan."""
    return all(
        bool(((a.view(BITS[a.itemsize]) == b.view(BITS[b.itemsize])) | (a.isnan() & b.isnan())).all())
        for a, b in zip(some, others, strict=True)
    )


@pytest.mark.parametrize(("dtype", "online_dtype"), PAIRS)
def test_a_lerp_is_that_of_float64_and_bit_for_bit_that_of_torch(lerp_, dtype, online_dtype) -> None:
    for weight in (0.3, 0.9, 1.0):
        ours, theirs, online = tensors(dtype, 0), tensors(dtype, 0), tensors(online_dtype, 1)
        sizes = [a.double().abs() + x.double().abs() for a, x in zip(ours, online, strict=True)]
        want = [a.double() + weight * (x.double() - a.double()) for a, x in zip(ours, online, strict=True)]
        assert int(lerp_(ours, online, weight, places(ours), 5)) == 0
        in_torch(theirs, online, weight, places(ours), 5)
        assert same_bits(ours, theirs)
        for got, true, size in zip(ours, want, sizes, strict=True):
            unit = torch.finfo(dtype).eps * size + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
            assert ((got.double() - true).abs() <= unit).all()


@pytest.mark.parametrize("scale", [1e-38, 1e-6, 1e38])
@pytest.mark.parametrize(("dtype", "online_dtype"), [pair for pair in PAIRS if torch.float64 not in pair])
def test_very_large_and_very_small_values_come_out_as_torch_has_them(lerp_, dtype, online_dtype, scale) -> None:
    ours, theirs, online = ([t * scale for t in tensors(d, i)] for d, i in ((dtype, 0), (dtype, 0), (online_dtype, 1)))
    counts = [int(run(a, online, 0.5, places(a), 5)) for run, a in ((lerp_, ours), (in_torch, theirs))]
    assert counts[0] == counts[1]
    assert same_bits(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_averages_with_nan_or_inf_have_the_bits_that_torch_gives(lerp_, dtype) -> None:
    bad = [float("nan"), float("inf"), -float("inf"), -0.0]
    for weight in (0.0, 0.3, 0.9, 1 - 2**-25, 1.0):
        ours, theirs = (torch.tensor(bad * 33, dtype=dtype) for _ in range(2))
        online = torch.tensor(bad + [1.0] * 128, dtype=dtype)
        assert int(lerp_([ours], [online], weight, [Place(1)])) == 1
        in_torch([theirs], [online], weight, [Place(1)])
        assert same_bits([ours], [theirs])


def test_nan_or_inf_in_the_weights_leaves_the_average_unchanged_and_counts_its_tensor_once_an_update(
    interpreted,
) -> None:
    averages, online = [torch.ones(150), torch.ones(3), torch.ones(64)], [torch.full((n,), 2.0) for n in (150, 3, 64)]
    for place, bad in ((0, float("nan")), (99, float("inf")), (149, -float("inf"))):
        online[0][place] = bad
    online[2][5] = float("nan")
    left_out = torch.zeros((), dtype=torch.int64)
    lerp = by(interpreted)(averages, online, places(averages), left_out)
    lerp(0.5, 1)
    assert int(left_out) == 2
    for average, tensor in zip(averages, online, strict=True):
        assert torch.equal(average, torch.where(tensor.isfinite(), 1.5, 1.0))
    lerp(0.5, 1)
    assert int(left_out) == 4
    online[0].fill_(2.0)
    lerp(0.5, 2)
    assert int(left_out) == 5


@pytest.mark.parametrize("cut", [(5, 40), (8, 19), (0, 64)])
def test_a_tensor_at_any_address_has_the_bits_that_torch_gives(lerp_, cut) -> None:
    ours, theirs, online = (torch.linspace(0, end, 200).bfloat16()[slice(*cut)] for end in (3, 3, 5))
    lerp_([ours], [online], 0.3, [Place(3)])
    in_torch([theirs], [online], 0.3, [Place(3)])
    assert same_bits([ours], [theirs])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("shape", "dim", "sizes"),
    [((200,), 0, (64, 96, 40)), ((200,), 0, (31, 169)), ((6, 40), 1, (33, 7)), ((3, 4, 20), 1, (1, 3))],
)
def test_updating_shards_that_tile_a_tensor_equals_updating_the_whole(lerp_, dtype, shape, dim, sizes) -> None:
    (whole,), (online,) = tensors(dtype, 0, shapes=[shape]), tensors(torch.float32, 1, shapes=[shape])
    shards = [part.contiguous() for part in whole.split(sizes, dim)]
    begins = [sum(sizes[:i]) for i in range(len(sizes))]
    where = [Place(9, shape, (*[0] * dim, begin, *[0] * (len(shape) - dim - 1))) for begin in begins]
    lerp_([whole], [online], 0.3, [Place(9)], 3)
    lerp_(shards, [part.contiguous() for part in online.split(sizes, dim)], 0.3, where, 3)
    assert same_bits([torch.cat(shards, dim)], [whole])


@pytest.mark.parametrize("offset", [2**33 - 96, 2**33 - 37, 5 * 2**33 + 64])
def test_a_shard_beyond_2_to_the_33_elements_is_rounded_as_torch_does(lerp_, offset) -> None:
    ours, theirs = torch.ones(192, dtype=torch.bfloat16), torch.ones(192, dtype=torch.bfloat16)
    for run, average in ((lerp_, ours), (in_torch, theirs)):
        run([average], [average + 0.5], 1e-3, [Place(9, (2**40,), (offset,))])
    assert same_bits([ours], [theirs])


def test_triton_accepts_dense_pairs_that_are_laid_out_in_the_same_way_and_torch_moves_the_others(interpreted) -> None:
    def made():
        return [
            torch.ones(6, 8)[:, ::2],
            torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last),
            torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last),
            torch.ones(4, 6).t(),
            torch.ones(3, dtype=torch.complex64),
            torch.ones(5),
        ]

    averages, online = made(), [2 * t for t in made()]
    online[1] = online[1].contiguous()  # laid out otherwise
    left_out = torch.zeros((), dtype=torch.int64)
    pairs = map(Pair, averages, online, places(averages))
    assert [interpreted.accepts(pair) for pair in pairs] == [False, False, True, True, False, True]
    by(interpreted)(averages, online, places(averages), left_out)(0.5, 1)
    assert all(torch.equal(a, torch.full_like(a, 1.5)) for a in averages)


def test_a_launch_takes_the_weight_and_the_number_that_were_staged_last(interpreted) -> None:
    staged, called = torch.ones(130, dtype=torch.bfloat16), torch.ones(130, dtype=torch.bfloat16)
    online, left_out = torch.full((130,), 2.0), torch.zeros((), dtype=torch.int64)
    ours = interpreted.lerp([Pair(staged, online, Place(1))], left_out)
    theirs = interpreted.lerp([Pair(called, online, Place(1))], left_out)
    for weight, num_updates in ((0.01, 1), (0.02, 2**32 + 2), (0.75, 3)):
        ours.stage(weight, num_updates)
        ours.launch()
        theirs(weight, num_updates)
        assert same_bits([staged], [called])
    ours.stage(0.01, 4)
    before = staged.clone()
    theirs(0.01, 5)
    ours.launch()
    assert not same_bits([staged], [called])
    assert not same_bits([staged], [before])


def test_the_default_device_is_no_matter(interpreted) -> None:
    average, online, left_out = torch.ones(70), torch.full((70,), 2.0), torch.zeros((), dtype=torch.int64)
    with torch.device("meta"):
        interpreted.lerp([Pair(average, online, Place(0))], left_out)(0.5, 1)
    assert torch.equal(average, torch.full((70,), 1.5))


def test_a_backward_pass_through_an_average_that_has_moved_is_an_error(lerp_) -> None:
    average, inputs = torch.ones(3), torch.ones(3, requires_grad=True)
    loss = (average * inputs).sum()
    lerp_([average], [torch.zeros(3)], 0.5, [Place(0)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class _Driver:
    """Of a GPU that is not there, as far as compiling asks."""

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@pytest.mark.parametrize(
    ("dtype", "online_dtype", "reads", "writes"),
    [
        (torch.float32, torch.float32, {"v4.b32"}, "v4.b32"),
        (torch.float32, torch.bfloat16, {"v4.b32", "v2.b32"}, "v4.b32"),
        (torch.bfloat16, torch.bfloat16, {"v4.b32"}, "v4.b32"),
    ],
)
def test_it_compiles_for_a_gpu_and_moves_whole_blocks_in_the_widest_instructions(
    monkeypatch, tmp_path, dtype, online_dtype, reads, writes
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    module, compiled = _copy_of_the_module(), []
    kernel = module._lerp
    monkeypatch.setattr(triton.runtime.driver, "_active", _Driver(), raising=False)

    class Compile:
        def __getitem__(self, grid):
            return lambda *args, **options: compiled.append(kernel.warmup(*args, grid=grid, **options))

    monkeypatch.setattr(module, "_lerp", Compile())
    kernels.lerp_([torch.ones(10, dtype=dtype)], [torch.ones(10, dtype=online_dtype)], 0.5, [Place(0)], by=by(module))
    ptx = compiled[0].asm["ptx"]
    assert reads <= {found for found in re.findall(r"ld\.global\.(\S+)", ptx) if found.startswith("v")}
    assert f"st.global.{writes}" in ptx
    assert "ftz" not in ptx  # small numbers count
    assert set(re.findall(r"\bfma\.\S+", ptx)) == {"fma.rn.f32"}


def test_triton_is_not_imported_where_only_the_cpu_is_used_even_if_it_is_asked_for() -> None:
    program = """
import sys, torch
from polyak.kernels import serving_cpu
from polyak.averaging.weights import Shadow
Shadow(torch.nn.Linear(2, 2)).update_(0.5)
assert "triton" not in sys.modules
assert serving_cpu()[-1] == "torch"
"""
    environment = {**os.environ, "POLYAK_KERNEL": "triton"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], env=environment, check=True, timeout=120)


class Recording:
    """A kernel that accepts tensors of up to three elements, and notes what it is given."""

    def __init__(self, reason=None) -> None:
        self.reason, self.given = reason, []

    def why_not(self, device):
        return self.reason

    def accepts(self, pair):
        return pair.left.numel() <= 3

    def lerp(self, pairs, left_out):
        self.given.append([(pair.left.device.type, pair.place.seed) for pair in pairs])
        return lambda weight, num_updates: left_out.add_(1)


@pytest.fixture
def listed(monkeypatch):
    """Return a function that lists kernels in front of torch's: for each a name, the object and types of devices."""

    def list_them(named=None, **lines):
        found = {name: kernel for name, (kernel, _) in lines.items()} | {"torch": foreach}
        listed = {name: registry._Line(name, devices) for name, (_, devices) in lines.items()}
        monkeypatch.setattr(registry, "_LIST", listed | {"torch": registry._LIST["torch"]})
        monkeypatch.setattr(registry, "_kernel", found.__getitem__)
        monkeypatch.setattr(registry, "_first", named)
        registry._serving.cache_clear()

    yield list_them
    registry._serving.cache_clear()


def test_each_pair_goes_to_the_first_kernel_of_its_device_that_accepts_it(listed) -> None:
    first, second = Recording(), Recording()
    listed(first=(first, ("meta",)), second=(second, None))
    averages = [torch.ones(size, device=device) for device, size in (("cpu", 2), ("meta", 2), ("cpu", 4), ("cpu", 3))]
    left_out = torch.zeros((), dtype=torch.int64)
    online = [2 * average for average in averages]
    kernels.lerp(averages, online, places(averages), left_out)
    assert first.given == [[("meta", 77)]]
    assert second.given == [[("cpu", 0), ("cpu", 231)]]
    kernels.lerp(averages[2:], online[2:], places(averages[2:]), left_out)(0.5, 1)
    assert torch.equal(averages[2], torch.full((4,), 1.5))
    assert int(left_out) == 1


def test_a_kernel_that_cannot_serve_a_gpu_leaves_it_to_the_next_with_a_warning_unless_it_is_named(listed) -> None:
    broken = Recording("0 active drivers")
    listed(broken=(broken, ("cuda",)))
    with pytest.warns(UserWarning, match="0 active drivers"):
        assert list(registry._serving("cuda")) == ["torch"]
    assert list(registry._serving("cpu")) == ["torch"]
    listed("broken", broken=(broken, ("cuda",)))
    with pytest.raises(KernelError, match="0 active drivers"):
        registry._serving("cuda")
    listed("torch", broken=(broken, ("cuda",)))
    assert list(registry._serving("cuda")) == ["torch"]


def test_triton_says_why_it_cannot_serve_where_there_is_no_gpu(monkeypatch) -> None:
    from polyak.kernels import triton as module

    class NoDriver:
        def get_current_target(self):
            raise RuntimeError("0 active drivers")

    monkeypatch.setattr(triton.runtime.driver, "_active", NoDriver(), raising=False)
    assert module.why_not(torch.device("cuda")) == "RuntimeError: 0 active drivers"
    monkeypatch.setattr(triton.runtime.driver, "_active", _Driver(), raising=False)
    assert module.why_not(torch.device("cuda")) is None


# On a GPU.

SHAPES = [(3,), (700, 401), (), (0,), (1 << 20,), (33, 7, 5)]


def _on_the_device(dtype, online_dtype, *, shapes=SHAPES):
    averages, online = tensors(dtype, 0, shapes=shapes), tensors(online_dtype, 1, shapes=shapes)
    left_out = torch.zeros((), dtype=torch.int64, device="cuda")
    gpu = [t.cuda() for t in averages], [t.cuda() for t in online]
    return averages, online, gpu, kernels.lerp(*gpu, places(averages), left_out), left_out


@on_gpu
@pytest.mark.parametrize(("dtype", "online_dtype"), PAIRS)
def test_a_gpu_gives_the_bits_of_the_cpu(dtype, online_dtype) -> None:
    averages, online, gpu, lerp, left_out = _on_the_device(dtype, online_dtype)
    for tensor in (online[1], gpu[1][1]):
        tensor[5, 6] = float("nan")
    assert type(lerp).__module__.endswith("kernels.triton")
    for number, weight in enumerate((1e-4, 0.3, 0.9, 1.0)):
        lerp(weight, number)
        assert int(kernels.lerp_(averages, online, weight, places(averages), number)) == 1
        assert same_bits([t.cpu() for t in gpu[0]], averages)
    assert int(left_out) == 4


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_moves_a_tensor_at_any_address(dtype) -> None:
    averages, online = tensors(dtype, 0, shapes=[(9000,)]), tensors(torch.float32, 1, shapes=[(9000,)])
    on_device = [[t.cuda() for t in side] for side in (averages, online)]
    for begin in (0, 1, 4, 8):
        kernels.lerp_([on_device[0][0][begin:]], [on_device[1][0][begin:]], 0.3, [Place(1)], begin)
        kernels.lerp_([averages[0][begin:]], [online[0][begin:]], 0.3, [Place(1)], begin)
    assert same_bits([on_device[0][0].cpu()], averages)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_graph_replays_with_a_decay_that_changes(dtype) -> None:
    averages, online, gpu, lerp, _ = _on_the_device(dtype, torch.float32)
    inner = lerp
    inner(0.5, 0)
    kernels.lerp_(averages, online, 0.5, places(averages), 0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        inner.launch()
    for number, weight in enumerate((0.25, 0.01, 0.75), 1):
        inner.stage(weight, number)
        graph.replay()
        kernels.lerp_(averages, online, weight, places(averages), number)
    assert same_bits([t.cpu() for t in gpu[0]], averages)


@on_gpu
def test_a_weight_is_not_staged_within_a_graph() -> None:
    *_, lerp, left_out = _on_the_device(torch.float32, torch.float32)
    lerp(0.5, 0)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        left_out.add_(1)  # an empty graph is warned of
        with pytest.raises(RuntimeError, match="must be staged outside of a CUDA graph"):
            lerp(0.5, 1)


@on_gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_waits_for_nothing_and_allocates_nothing(dtype) -> None:
    *_, gpu, lerp, _ = _on_the_device(dtype, torch.bfloat16)
    lerp(0.5, 0)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(1, 20):
            lerp(1 / (number + 1), number)
        after = torch.cuda.memory_stats()["allocation.all.allocated"]
        kernels.lerp_(*gpu, 0.5, places(gpu[0]))  # a new one does not wait either
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert after == before


@on_gpu
def test_an_update_runs_on_the_current_stream() -> None:
    averages, online, gpu, lerp, _ = _on_the_device(torch.float32, torch.float32)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # what is not on this stream would come too early
        for tensor in gpu[1]:
            tensor.mul_(2)
        for number in range(1, 4):
            lerp(1 / (number + 1), number)
    torch.cuda.current_stream().wait_stream(stream)
    for number in range(1, 4):
        kernels.lerp_(averages, [2 * t for t in online], 1 / (number + 1), places(averages), number)
    assert same_bits([t.cpu() for t in gpu[0]], averages)


@on_gpu
@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "online_dtype"), [(a, x) for a, x in PAIRS if a.itemsize + x.itemsize <= 8])
def test_a_hundred_million_parameters_come_out_as_torch_has_them(dtype, online_dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(100_000_003,), (1 << 20,), (17,)]
    ours = [torch.randn(s, generator=generator, device="cuda").to(dtype) for s in shapes]
    online = [torch.randn(s, generator=generator, device="cuda").to(online_dtype) for s in shapes]
    theirs = [t.clone() for t in ours]
    counts = [
        int(run(averages, online, 0.3, places(ours), 7))
        for averages, run in ((ours, kernels.lerp_), (theirs, in_torch))
    ]
    assert counts == [0, 0]
    assert same_bits(ours, theirs)


@on_gpu
def test_a_model_on_two_devices_is_averaged_on_both() -> None:
    def made(device):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 5).to(device), nn.Linear(5, 5))

    both, cpu = made("cuda"), made("cpu")
    shadows = Shadow(both), Shadow(cpu)
    for model, shadow in zip((both, cpu), shadows, strict=True):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
            model[0].bias[0] = model[1].bias[0] = float("nan")
        shadow.update_(0.25)
    assert shadows[0].num_quarantined == shadows[1].num_quarantined == 2
    for name, average in shadows[1].averages.items():
        assert same_bits([shadows[0].averages[name].cpu()], [average])

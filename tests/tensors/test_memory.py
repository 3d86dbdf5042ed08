"""Tensors that share memory, that move, or have none of their own: averaged and swapped once, or refused by name."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from polyak import EMA, attach, kernels
from polyak.averaging.weights import Shadow
from polyak.errors import MemoryLayoutError
from polyak.kernels import checksums
from polyak.tensors.memory import Place, compact, owners

BASE = torch.arange(36.0).view(6, 6)
VIEWS = ["transposed", "rows", "columns", "expanded"]


@pytest.fixture(params=kernels.serving_cpu(), autouse=True)
def kernel(request) -> Iterator[str]:
    with kernels.only(request.param):
        yield request.param


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ([BASE, BASE], [0, 0]),
        ([BASE, BASE.t()], [0, 0]),
        ([BASE[1:3], BASE], [1, 1]),
        ([BASE[:, 1:3], BASE[:, 3:]], [0, 1]),  # they interleave, and share no byte
        ([BASE[:, :3], BASE[2:4, 1:3], BASE[:, 3:]], [0, 0, 2]),
        ([BASE[::2], BASE[1::2]], [0, 1]),
        ([BASE, BASE.view(torch.int32)], [0, 0]),
        ([BASE, BASE[0].expand(5, 6)], [0, 0]),
        ([BASE, torch.empty(0), torch.empty(2, device="meta"), torch.eye(2).to_sparse()], [0, 1, 2, 3]),
        ([BASE, BASE.clone()], [0, 1]),
        ([BASE.view(torch.bfloat16)[0], BASE[0]], [0, 0]),
    ],
)
def test_memory_that_tensors_share_has_one_owner(tensors, expected) -> None:
    assert owners(tensors, [f"t{i}" for i in range(len(tensors))], [0] * len(tensors)) == expected


def test_a_parameter_owns_memory_before_a_buffer_over_the_same_bytes() -> None:
    assert owners([BASE, BASE], ["buffer", "parameter"], [1, 0]) == [1, 1]


def test_tensors_that_overlap_in_part_are_refused_by_name() -> None:
    with pytest.raises(MemoryLayoutError, match="'second' and 'first' overlap only in part"):
        owners([BASE[:3], BASE[2:]], ["first", "second"], [0, 0])
    with pytest.raises(MemoryLayoutError, match="overlap only in part"):
        owners([BASE[:, :3], BASE[:, 2:]], ["first", "second"], [0, 0])


@pytest.mark.parametrize(
    "view", [lambda t: t.t(), lambda t: t[1:3], lambda t: t[:, ::2], lambda t: t[2].expand(3, 6)], ids=VIEWS
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_a_place_gives_the_same_view_of_another_tensor(view, dtype) -> None:
    owner = BASE.to(dtype)
    place = Place.of(owner, view(owner))
    for twin in (torch.rand(6, 6), torch.rand(6, 6).t(), torch.rand(6, 12)[:, ::2]):
        assert torch.equal(place.view(twin), view(twin))
    assert Place.of(owner, owner.view(torch.uint8)) is None


def test_a_place_conjugates_and_negates_as_its_view_does() -> None:
    owner, twin = torch.randn(3, dtype=torch.complex64), torch.randn(3, dtype=torch.complex64)
    assert torch.equal(Place.of(owner, owner.conj()).view(twin), twin.conj())
    real, other = torch.randn(3), torch.randn(3)
    assert torch.equal(Place.of(real, torch._neg_view(real)).view(other), -other)


def test_a_compact_view_has_each_element_once() -> None:
    assert compact(BASE[:1].expand(4, 6)).shape == (1, 6)
    assert compact(BASE) is BASE


@pytest.mark.parametrize(
    "tensor",
    [
        BASE,
        BASE.t(),
        BASE[:, 1:4],
        BASE.flatten()[1:],
        BASE.to(torch.bfloat16).flatten()[3:],
        BASE.to(torch.complex128).conj(),
        BASE.to(torch.float8_e4m3fn),
        BASE > 3,
        torch.empty(0),
        torch.tensor(2.5),
    ],
    ids=lambda t: f"{t.dtype} {tuple(t.shape)} {t.stride()}",
)
def test_checksums_see_any_change(tensor) -> None:
    tensor = tensor.clone(memory_format=torch.preserve_format)
    before = checksums([tensor, BASE])
    assert checksums([tensor, BASE]) == before
    for index in range(0, tensor.numel(), 7):
        place = tuple(int(i) for i in torch.unravel_index(torch.tensor(index), tensor.shape)) or ...
        old = tensor[place].clone()
        tensor[place] = 0 if bool(old != 0) else 1
        assert checksums([tensor, BASE])[0] != before[0]
        tensor[place] = old
    assert checksums([tensor, BASE]) == before


# Models


class Net(nn.Module):
    """Two layers, of which a function makes the second one share memory with the first."""

    def __init__(self, share: Callable[["Net"], object], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = (nn.Linear(4, 4, bias=False, dtype=dtype) for _ in range(2))
        share(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x))


def set_data(of: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Net], object]:
    return lambda net: setattr(net.b.weight, "data", of(net.a.weight.data))


def halves_of_one_storage(net: Net) -> None:
    both = torch.randn(4, 8, dtype=net.a.weight.dtype)
    net.a.weight.data, net.b.weight.data = both[:, :4], both[:, 4:]


SHARE = {
    "b.data = a.data": set_data(lambda a: a),
    "b.data = a.data.t()": set_data(lambda a: a.t()),
    "b.data = a.data.flip of strides": set_data(lambda a: a.view(2, 2, 4).transpose(0, 1).reshape(4, 4)),
    "Parameter(a)": lambda net: setattr(net.b, "weight", nn.Parameter(net.a.weight)),
    "one object": lambda net: setattr(net.b, "weight", net.a.weight),
    "a buffer views rows of a": lambda net: net.register_buffer("rows", net.a.weight.data[1:3]),
    "a buffer views a column of a": lambda net: net.register_buffer("column", net.a.weight.data[:, 1]),
    "a buffer is a": lambda net: net.register_buffer("copy", net.a.weight.data),
    "a cache views a": lambda net: net.register_buffer("cache", net.a.weight.data[:2], persistent=False),
    "a frozen parameter views a": lambda net: net.register_parameter(
        "frozen", nn.Parameter(net.a.weight.data[:2], requires_grad=False)
    ),
    "an integer buffer reads the bits of a": lambda net: net.register_buffer(
        "bits", net.a.weight.data.view(torch.uint8)
    ),
    "columns of one storage interleave": halves_of_one_storage,
    "a buffer expands a row of a": lambda net: net.register_buffer("grid", net.a.weight.data[0].expand(3, 4)),
    "an expanded buffer": lambda net: net.register_buffer("grid", torch.randn(4).expand(3, 4)),
    "an expanded cache": lambda net: net.register_buffer("grid", torch.randn(4).expand(3, 4), persistent=False),
    "an expanded running statistic": lambda net: net.register_buffer("running_mean", torch.ones(()).expand(4)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("share", SHARE)
def test_shared_memory_is_averaged_and_swapped_once(share, dtype) -> None:
    net = Net(SHARE[share], dtype)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    ema, want = attach(EMA(smoothing=0.5), net, optimizer), dict[str, torch.Tensor]()
    for _ in range(6):
        optimizer.zero_grad()
        (net(torch.randn(8, 4, dtype=dtype)) - 3).square().mean().backward()
        optimizer.step()
        for name, parameter in net.named_parameters(remove_duplicate=False):
            now = parameter.detach().double()
            want[name] = 0.5 * want[name] + 0.5 * now if name in want else now.clone()
    before = {name: tensor.clone() for name, tensor in net.state_dict(keep_vars=True).items()}
    other_bits = share == "an integer buffer reads the bits of a"
    module = None if other_bits else ema.algorithm.ema_model
    for _ in range(2):
        with ema.applied():
            for name, parameter in net.named_parameters(remove_duplicate=False):
                assert torch.allclose(parameter.double(), want[name], atol=1e-6 if dtype == torch.float32 else 3e-2)
        assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict(keep_vars=True).items())
    if module is not None:
        for name, parameter in module.named_parameters(remove_duplicate=False):
            assert torch.allclose(parameter.double(), want[name], atol=1e-5)
    optimizer.step()


def test_an_alias_of_other_bits_has_no_module_of_its_own() -> None:
    shadow = Shadow(Net(lambda net: net.register_buffer("bits", net.a.weight.data.view(torch.uint8))))
    with pytest.raises(MemoryLayoutError, match=r"'bits' reads the memory of 'a.weight' .* use applied\(\)"):
        shadow.averaged_model()


@pytest.mark.parametrize(
    ("tensor", "what"),
    [
        (lambda: TwoTensor(torch.randn(4, 4), torch.randn(4, 4)), "'b.weight' is a TwoTensor"),
        (lambda: torch.randn(7).unfold(0, 4, 1), "some of 'b.weight' do"),
        (lambda: torch.zeros(4, 4).to(torch.float8_e4m3fn), "'b.weight' has torch.float8_e4m3fn"),
    ],
)
def test_what_cannot_be_averaged_is_refused_by_name_when_averaging_begins(tensor, what) -> None:
    net = Net(lambda net: setattr(net.b, "weight", nn.Parameter(tensor())))
    with pytest.raises(MemoryLayoutError, match=what):
        Shadow(net)
    net.b.weight.requires_grad_(requires_grad=False)
    shadow = Shadow(net)
    shadow.update_(0.5)
    with shadow.swapped("the test"):
        assert "b.weight" not in shadow.averages


@pytest.mark.parametrize(
    "make", [torch.conj, lambda t: t.conj().imag, lambda t: t.conj().real], ids=["conj", "imag", "real"]
)
def test_a_conjugate_or_negative_parameter_is_averaged_by_value(make) -> None:
    model = nn.ParameterList([nn.Parameter(make(torch.randn(3, 3, dtype=torch.complex64)))])
    shadow, first = Shadow(model), model[0].detach().clone().resolve_conj().resolve_neg()
    with torch.no_grad():
        model[0].add_(1)
    second = model[0].detach().clone().resolve_conj().resolve_neg()
    shadow.update_(0.25)
    with shadow.swapped("the test"):
        assert torch.allclose(model[0].resolve_conj().resolve_neg(), first + 0.25 * (second - first))
    assert torch.equal(model[0].resolve_conj().resolve_neg(), second)


# Memory that moves


def in_a_queue(tensor: torch.Tensor) -> None:
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    queue.put(tensor)


def swap_storage(tensor: torch.Tensor) -> None:
    tensor.data = tensor.data.clone()


MOVES = {
    "share_memory_": lambda t: t.share_memory_(),
    "in a queue": in_a_queue,
    "data = clone": swap_storage,
    "storage grows": lambda t: t.untyped_storage().resize_(4096),
    "set_": lambda t: t.set_(t.clone()),
}


@pytest.mark.parametrize(
    "where", ["model", "average", "state", "module", "model while swapped", "average while swapped"]
)
@pytest.mark.parametrize("move", MOVES)
def test_an_average_stays_right_when_memory_moves(move, where) -> None:
    if where == "average while swapped" and move in {"data = clone", "set_"}:
        pytest.skip("nobody is given the tensor itself, and an alias of it moves alone")
    torch.manual_seed(0)
    model = nn.Linear(8, 8, bias=False)
    shadow, want = Shadow(model), model.weight.detach().double()
    taken = {
        "state": lambda: shadow.state_dict()["averages"]["weight"],
        "module": lambda: shadow.averaged_model().weight,
    }
    for step in range(6):
        with torch.no_grad():
            model.weight.add_(torch.randn(8, 8))
        shadow.update_(0.5)
        want = want + 0.5 * (model.weight.detach().double() - want)
        before = model.weight.detach().clone()
        if step == 2 and not where.endswith("swapped"):
            tensor = {"model": lambda: model.weight, "average": lambda: shadow.averages["weight"], **taken}[where]()
            with torch.no_grad():
                MOVES[move](tensor)
        with shadow.swapped("the test"):
            assert torch.allclose(model.weight.double(), want, atol=1e-6)
            if step == 3 and where.endswith("swapped"):
                with torch.no_grad():
                    MOVES[move](model.weight if where.startswith("model") else shadow.averages["weight"])
                assert torch.allclose(shadow.averaged_tensors()["weight"].double(), want, atol=1e-6)
        assert torch.equal(model.weight, before)
        assert torch.allclose(shadow.averaged_tensors()["weight"].double(), want, atol=1e-6)


def test_an_average_whose_memory_was_taken_is_refused_by_name() -> None:
    model = nn.Linear(8, 8)
    shadow = Shadow(model)
    shadow.state_dict()["averages"]["weight"].untyped_storage().resize_(8)
    with pytest.raises(MemoryLayoutError, match="that of 'weight' has shrunk to 8 bytes"):
        shadow.update_(0.5)


def test_a_tie_that_is_made_or_broken_while_averaging_is_followed() -> None:
    net = Net(SHARE["b.data = a.data.t()"])
    shadow = Shadow(net)
    with torch.no_grad():
        net.a.weight.add_(1)
    shadow.update_(0.5)
    average = shadow.averages["a.weight"].clone()
    net.to(torch.float64)  # each parameter gets memory of its own
    with torch.no_grad():
        net.a.weight.add_(2)
    shadow.update_(0.0)
    assert torch.equal(shadow.averages["b.weight"], average.t().double())
    net.b.weight.data = net.a.weight.data
    shadow.update_(0.0)
    assert set(shadow.averages) == {"a.weight"}


def test_a_model_that_holds_its_own_average_is_averaged_without_it() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"net": nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))})
    shadow = Shadow(model)
    model["teacher"] = shadow.averaged_model()["net"]
    with torch.no_grad():
        model["net"][0].weight.add_(1)
        model["net"][1].running_mean.add_(1)
    shadow.update_(0.5)
    assert not any(name.startswith("teacher") for name in shadow.averages)
    teacher = {name: tensor.clone() for name, tensor in model["teacher"].state_dict().items()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with shadow.swapped("the test"):
        assert all(torch.equal(t, teacher[name]) for name, t in model["teacher"].state_dict().items())
        assert torch.equal(model["net"][0].weight, teacher["0.weight"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_tensor_that_somebody_holds_stays_the_average_while_it_is_in_the_model() -> None:
    model = nn.Linear(3, 3)
    shadow = Shadow(model)
    with torch.no_grad():
        model.weight.add_(1)
    average = shadow.averages["weight"].clone()
    for held in (shadow.averaged_model(), shadow.state_dict()["averages"]):
        tensor = held.weight if isinstance(held, nn.Module) else held["weight"]
        with shadow.swapped("the test"):
            assert torch.equal(tensor, average)
        assert torch.equal(shadow.averages["weight"], average)
    del held, tensor
    assert not shadow._swapper.is_exposed()


def test_a_default_device_does_not_move_the_average() -> None:
    model = nn.Linear(3, 3)
    with torch.device("meta"):
        shadow = Shadow(model)
        model.weight.data.add_(1)
        shadow.update_(0.5)
        with shadow.swapped("the test"):
            pass
    assert shadow.num_quarantined == 0

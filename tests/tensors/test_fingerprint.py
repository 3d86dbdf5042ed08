import gc

import pytest
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from polyak import kernels
from polyak.tensors import fingerprint, fingerprint_c, optimizers
from polyak.tensors.fingerprint import Fingerprint
from tests.tensors.test_slots import Net


def rename(held, old, new) -> None:
    held[new] = held.pop(old)


def move_the_last_to_the_next(held, following) -> None:
    """Leave all tensors the same, and their order."""
    items = [held.popitem(), *following.items()]
    following.clear()
    following.update(items)


@pytest.fixture(params=["c", "python"])
def language(request, monkeypatch):
    """Take fingerprints in C or in Python. In C there is none of lazily built tensors, which have no address."""
    if request.param == "c" and not fingerprint_c.AVAILABLE:
        pytest.skip("no kernel in C, or a torch without its stable C interface")

    def in_c(dicts, tensors):
        taken = fingerprint_c.take(dicts, tensors)
        assert (taken is None) == any(map(is_lazy, tensors))
        return taken or fingerprint.take_in_python(dicts, tensors)

    monkeypatch.setattr(fingerprint, "take", in_c if request.param == "c" else fingerprint.take_in_python)
    return request.param


@pytest.mark.usefixtures("language")
@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.frozen.requires_grad_(True),
        lambda model: setattr(model.head, "weight", nn.Parameter(torch.zeros(3, 4))),
        lambda model: setattr(model, "extra", nn.Linear(1, 1)),
        lambda model: model.head.register_buffer("more", torch.zeros(1)),
        lambda model: delattr(model, "frozen"),
        lambda model: model.to(torch.float64),
        lambda model: torch.utils.swap_tensors(model.head.weight, nn.Parameter(torch.zeros(3, 4))),
        lambda model: setattr(model.head.weight, "data", model.head.weight.data.clone()),
        lambda model: setattr(model.head.weight, "data", model.head.weight.data[:1]),
        lambda model: setattr(model.head.weight, "data", model.head.weight.data.view(4, 3)),
        lambda model: setattr(model.module.weight, "data", model.module.weight.data.t()),
        lambda model: setattr(model.flags, "data", model.flags.data.view(torch.uint8)),
        lambda model: setattr(model.head.weight, "data", model.head.weight.data.view(-1)),
        lambda model: setattr(model.flags, "data", model.flags.data.clone()),
        lambda model: rename(model._parameters, "frozen", "cold"),
        lambda model: rename(model.head._parameters, "bias", "shift"),
        lambda model: setattr(model.head, "bias", None),
        lambda model: setattr(model, "_buffers", dict(model._buffers)),
        lambda model: delattr(model.tied, "bias"),  # the last of all
        lambda model: move_the_last_to_the_next(model._parameters, model._buffers),
        lambda model: model.head.weight.untyped_storage().resize_(0),
    ],
)
def test_a_fingerprint_no_longer_holds_when_a_tensor_is_added_replaced_moved_or_made_trainable(change) -> None:
    model = Net()
    taken = Fingerprint(model)
    assert taken.holds()
    with torch.no_grad():
        model.head.weight.add_(1)
    assert taken.holds()
    change(model)
    assert not taken.holds()
    assert Fingerprint(model).holds()


@pytest.mark.usefixtures("language")
@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: setattr(tensor, "data", tensor.data.clone()),
        lambda tensor: setattr(tensor, "data", tensor.data.view(torch.int32)),
        lambda tensor: setattr(tensor, "data", tensor.data.view(4, 3)),
        lambda tensor: setattr(tensor, "data", tensor.data.as_strided((3, 4), (1, 3))),
        lambda tensor: setattr(tensor, "data", tensor.data[:2]),
        lambda tensor: tensor.untyped_storage().resize_(0),
        lambda tensor: tensor.untyped_storage().resize_(1000),
        lambda tensor: tensor.share_memory_(),
        lambda tensor: torch.utils.swap_tensors(tensor, torch.zeros(3, 4)),
        lambda tensor: tensor.resize_(2, 2),
    ],
)
def test_a_fingerprint_no_longer_holds_when_an_average_has_another_address_dtype_layout_or_storage(change) -> None:
    averages = [torch.zeros(2), torch.zeros(3, 4), torch.zeros(0)]
    taken = Fingerprint(nn.Linear(2, 2), averages)
    averages[1].fill_(1)
    assert taken.holds()
    change(averages[1])
    assert not taken.holds()
    assert not taken.holds()


@pytest.mark.usefixtures("language")
def test_a_fingerprint_no_longer_holds_when_a_storage_shrinks_whatever_address_the_allocator_gives() -> None:
    tensor = torch.zeros(1000)
    check = fingerprint.take([], [tensor])
    for size in range(3999, 3900, -1):  # every second time it may give the first address back
        tensor.untyped_storage().resize_(size)
        assert not check()


@pytest.mark.usefixtures("language")
def test_a_fingerprint_of_what_was_freed_since_says_so_and_reads_none_of_it() -> None:
    model, averages = nn.ModuleList(nn.Linear(3, 3) for _ in range(300)), [torch.zeros(3) for _ in range(300)]
    taken = Fingerprint(model, averages)
    for layer in model:
        layer.weight = nn.Parameter(torch.ones(3, 3))
        layer.bias.data = torch.ones(3)
    for average in averages:
        average.data = torch.ones(3)
    gc.collect()
    assert not taken.holds()
    replaced = Fingerprint(model, averages)
    del model[10:], averages[10:], layer, average
    gc.collect()
    again = [nn.Linear(3, 3) for _ in range(300)]
    assert not replaced.holds()
    assert not taken.holds()
    del again


@pytest.mark.usefixtures("language")
def test_a_fingerprint_no_longer_holds_when_a_lazy_module_was_built() -> None:
    model = nn.Sequential(nn.LazyLinear(2))
    taken = Fingerprint(model)
    assert taken.holds()
    model(torch.zeros(1, 3))
    assert not taken.holds()


@pytest.mark.usefixtures("language")
@pytest.mark.parametrize("make", [torch.Tensor.to_sparse, torch.Tensor.to_mkldnn])
def test_a_fingerprint_no_longer_holds_when_a_tensor_without_an_address_is_replaced(make) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("edges", make(torch.eye(2)))
    taken = Fingerprint(model)
    assert taken.holds()
    model.edges = make(torch.eye(2))
    assert not taken.holds()


@pytest.mark.usefixtures("language")
def test_a_fingerprint_of_tensors_on_the_meta_device_no_longer_holds_when_they_have_memory() -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    taken = Fingerprint(model)
    assert taken.holds()
    model.to_empty(device="cpu")
    assert not taken.holds()


@pytest.mark.usefixtures("language")
def test_a_fingerprint_of_an_empty_tensor_sees_another_device() -> None:
    tensor = torch.zeros(0)
    check = fingerprint.take([], [tensor])
    assert check()
    torch.utils.swap_tensors(tensor, torch.zeros(0, device="meta"))
    assert not check()


@pytest.mark.usefixtures("language")
def test_a_fingerprint_holds_of_tensors_in_dicts_and_of_others() -> None:
    held, others = {"a": torch.zeros(2), "b": None, "c": 3}, [torch.zeros(2), torch.zeros(3, 4)]
    check = fingerprint.take([held], [held["a"], *others, others[0]])
    assert check()
    others[1].data = others[1].data.clone()
    assert not check()
    assert fingerprint.take([held], [held["a"], *others])()


@pytest.mark.skipif(not fingerprint_c.AVAILABLE, reason="no kernel in C, or a torch without its stable C interface")
def test_a_fingerprint_is_taken_in_c_only_where_the_c_kernel_serves(monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(fingerprint_c, "take", lambda dicts, tensors: calls.append(len(tensors)))
    for name in ("torch", "c"):
        with kernels.only(name):
            Fingerprint(nn.Linear(2, 2))
    assert calls == [2]


def test_a_fingerprint_of_a_frozen_parameter_that_an_optimizer_moves_says_so_each_time() -> None:
    optimizers.watch()
    model = nn.Linear(2, 2).requires_grad_(requires_grad=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    taken = Fingerprint(model)
    model.requires_grad_(requires_grad=True)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    model.requires_grad_(requires_grad=False)
    assert not taken.holds()
    assert not taken.holds()

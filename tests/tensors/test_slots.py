import pytest
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from polyak import MismatchError, Policy, default_policy
from polyak.kernels import look
from polyak.tensors import optimizers
from polyak.tensors import slots as select
from polyak.tensors.slots import Inventory, all_slots, check_match, named_tensors, slots, unwrap


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 3)
        self.module = nn.Linear(2, 2)  # a child that happens to be called so
        self.tied = nn.Linear(3, 4)
        self.tied.weight = self.body[0].weight
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("cache", torch.ones(2), persistent=False)
        self.register_buffer("flags", torch.tensor([True, False]))


def test_each_tensor_has_the_policy_that_the_rules_give_it() -> None:
    policies = {slot.name: default_policy(slot) for slot in slots(Net())}
    left = {name for name, policy in policies.items() if policy is Policy.LEAVE}
    copied = {name for name, policy in policies.items() if policy is Policy.COPY}
    assert left == {"frozen", "cache"}
    assert copied == {"flags", "body.1.num_batches_tracked"}
    assert "body.1.running_var" in policies


def test_tied_tensors_come_once_and_under_all_names_if_asked() -> None:
    names = [slot.name for slot in slots(Net())]
    assert "tied.weight" not in names
    assert "tied.weight" in named_tensors(Net())
    assert len({slot.name for slot in all_slots(Net())}) == len(names) + 1


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        torch.compile,
        lambda model: torch.compile(nn.DataParallel(model)),
        lambda model: nn.DataParallel(torch.compile(model)),
    ],
    ids=["DataParallel", "compile", "compile(DataParallel)", "DataParallel(compile)"],
)
def test_names_are_those_of_the_model_without_its_wrappers(wrap) -> None:
    model = Net()
    wrapped = wrap(model)
    assert [slot.name for slot in slots(wrapped)] == [slot.name for slot in slots(model)]
    assert "module.weight" in named_tensors(wrapped)
    assert unwrap(wrapped) is model


def test_a_wrapped_part_of_a_model_keeps_its_names() -> None:
    model = Net()
    names = [slot.name for slot in slots(model)]
    model.body = torch.compile(model.body)
    assert [slot.name for slot in slots(model)] == names


def rename(held, old, new) -> None:
    held[new] = held.pop(old)


def move_the_last_to_the_next(held, following) -> None:
    """Leave all tensors the same, and their order."""
    items = [held.popitem(), *following.items()]
    following.clear()
    following.update(items)


@pytest.fixture(params=["c", "python"])
def looks(request, monkeypatch):
    if request.param == "c" and not look.HAS_C:
        pytest.skip("no kernel in C, or a torch without its stable C interface")

    def in_c(dicts, tensors):
        lazy = any(map(is_lazy, tensors))
        found = look.unchanged_in_c(dicts, tensors)
        assert (found is None) == lazy
        return found or look.unchanged_in_python(dicts, tensors)

    monkeypatch.setattr(select, "unchanged", in_c if request.param == "c" else look.unchanged_in_python)


@pytest.mark.usefixtures("looks")
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
    ],
)
def test_an_inventory_no_longer_holds_when_a_tensor_is_added_replaced_moved_or_made_trainable(change) -> None:
    model = Net()
    inventory = Inventory(model)
    assert inventory.holds()
    with torch.no_grad():
        model.head.weight.add_(1)
    assert inventory.holds()
    change(model)
    assert not inventory.holds()
    assert Inventory(model).holds()


@pytest.mark.usefixtures("looks")
def test_an_inventory_no_longer_holds_when_a_lazy_module_was_built() -> None:
    model = nn.Sequential(nn.LazyLinear(2))
    inventory = Inventory(model)
    assert inventory.holds()
    model(torch.zeros(1, 3))
    assert not inventory.holds()


@pytest.mark.skipif(not look.HAS_C, reason="no kernel in C, or a torch without its stable C interface")
def test_tensors_without_an_address_are_not_looked_at_in_c() -> None:
    for tensor in (torch.eye(2).to_sparse(), torch.ones(2, 2).to_mkldnn(), nn.LazyLinear(2).weight):
        assert look.unchanged_in_c([], [torch.ones(1), tensor]) is None


@pytest.mark.usefixtures("looks")
def test_an_inventory_sees_another_sparse_tensor() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("edges", torch.eye(2).to_sparse())
    inventory = Inventory(model)
    assert inventory.holds()
    model.edges = torch.eye(2).to_sparse()
    assert not inventory.holds()


@pytest.mark.usefixtures("looks")
def test_an_inventory_of_tensors_that_are_nowhere_yet_sees_when_they_are() -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    inventory = Inventory(model)
    assert inventory.holds()
    model.to_empty(device="cpu")
    assert not inventory.holds()


@pytest.mark.usefixtures("looks")
def test_tensors_that_are_in_no_module_are_looked_at_as_well() -> None:
    held, loose = {"a": torch.zeros(2), "b": None, "c": 3}, [torch.zeros(2), torch.zeros(3, 4)]
    unchanged = select.unchanged([held], [held["a"], *loose, loose[0]])
    assert unchanged()
    loose[1].data = loose[1].data.clone()
    assert not unchanged()
    assert select.unchanged([held], [held["a"], *loose])()


def test_a_mismatch_lists_every_difference() -> None:
    some = {"a": torch.zeros(1), "b": torch.zeros(2), "c": torch.zeros(3)}
    others = {"b": torch.zeros(2), "c": torch.zeros(4), "d": torch.zeros(1)}
    with pytest.raises(MismatchError) as caught:
        check_match("the two must agree", some, others)
    assert caught.value.missing == ["a"]
    assert caught.value.unexpected == ["d"]
    assert caught.value.misshaped == {"c": ((3,), (4,))}
    assert str(caught.value).splitlines() == [
        "the two must agree",
        "  missing: a",
        "  unexpected: d",
        "  c: expected shape (3,), got (4,)",
    ]


def test_an_inventory_of_a_frozen_parameter_that_an_optimizer_moves_says_so_each_time() -> None:
    optimizers.watch()
    model = nn.Linear(2, 2).requires_grad_(requires_grad=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inventory = Inventory(model)
    model.requires_grad_(requires_grad=True)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    model.requires_grad_(requires_grad=False)
    assert not inventory.holds()
    assert not inventory.holds()

import pytest
import torch
from torch import nn

from polyak import MismatchError, Policy, default_policy
from polyak.tensors.slots import all_slots, check_match, named_tensors, slots, unwrap


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

import copy
import math

import pytest
import torch
from torch import nn

from polyak import EMA, ArgumentError, LoanError, MismatchError, ProfileError, attach, compute_ema


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def moved(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.add_(3)
    return other


@pytest.mark.parametrize("smoothing", [0.0, 0.25, 0.99, 1.0])
def test_it_is_the_formula_in_place_for_parameters_and_floating_buffers(smoothing) -> None:
    model = moved(net())
    ema_model = net()
    before = {name: t.double().clone() for name, t in ema_model.state_dict().items()}
    pointers = [t.data_ptr() for t in ema_model.state_dict().values()]
    assert compute_ema(model, ema_model, smoothing=smoothing) is None
    for name, got in ema_model.state_dict().items():
        if got.is_floating_point():
            want = smoothing * before[name] + (1 - smoothing) * model.state_dict()[name].double()
            torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-7)
    assert pointers == [t.data_ptr() for t in ema_model.state_dict().values()]


def test_integer_and_bool_buffers_are_copied() -> None:
    model, ema_model = net(), net()
    for one in (model, ema_model):
        one.register_buffer("flag", torch.tensor(one is model))
    model[1].num_batches_tracked.fill_(60)
    compute_ema(model, ema_model)
    assert ema_model[1].num_batches_tracked == 60
    assert bool(ema_model.flag)


def test_sparse_tensors_are_left() -> None:
    model, ema_model = nn.Linear(2, 2), nn.Linear(2, 2)
    for module, factor in ((model, 1), (ema_model, 3)):
        module.register_buffer("edges", factor * torch.eye(2).to_sparse())
    middle = (model.weight + ema_model.weight) / 2
    compute_ema(model, ema_model, smoothing=0.5)
    torch.testing.assert_close(ema_model.weight.detach(), middle.detach())
    assert torch.equal(ema_model.edges.to_dense(), 3 * torch.eye(2))


def test_the_order_of_the_modules_does_not_count_only_their_names() -> None:
    model, ema_model = nn.ModuleDict(), nn.ModuleDict()
    for name in ("a", "b"):
        model[name] = nn.Linear(1, 1)
    for name in ("b", "a"):
        ema_model[name] = nn.Linear(1, 1)
    compute_ema(model, ema_model, smoothing=0.0)
    assert torch.equal(model["a"].weight, ema_model["a"].weight)
    assert torch.equal(model["b"].weight, ema_model["b"].weight)


def test_tied_tensors_are_averaged_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    ema_model = copy.deepcopy(model)
    nn.init.ones_(model[0].weight)
    nn.init.zeros_(ema_model[0].weight)
    compute_ema(model, ema_model, smoothing=0.9)
    torch.testing.assert_close(ema_model[0].weight, torch.full((2, 2), 0.1))


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["DataParallel", "compile"])
def test_a_wrapped_model_is_matched_by_the_names_inside(wrap) -> None:
    model, ema_model = net(), net()
    compute_ema(wrap(model), ema_model, smoothing=0.0)
    assert torch.equal(model[0].weight, ema_model[0].weight)
    nn.init.ones_(model[0].weight)
    compute_ema(model, wrap(ema_model), smoothing=0.0)
    assert torch.equal(model[0].weight, ema_model[0].weight)


def test_other_names_or_shapes_are_one_error_that_lists_them_and_nothing_moves() -> None:
    model = nn.ModuleDict({"a": nn.Linear(1, 4, bias=False), "b": nn.Linear(1, 1, bias=False)})
    ema_model = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "c": nn.Linear(1, 1, bias=False)})
    before = copy.deepcopy(ema_model.state_dict())
    with pytest.raises(MismatchError) as caught:
        compute_ema(model, ema_model)
    assert caught.value.missing == ["b.weight"]
    assert caught.value.unexpected == ["c.weight"]
    assert caught.value.misshaped == {"a.weight": ((4, 1), (4, 4))}
    assert all(torch.equal(before[name], t) for name, t in ema_model.state_dict().items())


@pytest.mark.parametrize("smoothing", [-0.1, 1.1, math.nan, math.inf])
def test_smoothing_outside_its_range_is_an_error(smoothing) -> None:
    with pytest.raises(ProfileError, match="smoothing must be in"):
        compute_ema(net(), net(), smoothing=smoothing)


def test_a_nan_leaves_its_place_in_the_average_as_it_was() -> None:
    model, ema_model = net(), net()
    before = ema_model[0].weight.clone()
    want = (before + model[0].weight) / 2
    want[0, 0] = before[0, 0]
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    compute_ema(model, ema_model, smoothing=0.5)
    torch.testing.assert_close(ema_model[0].weight, want)
    assert ema_model[0].weight[0, 0] == before[0, 0]


def test_a_half_precision_model_has_its_average_in_float32() -> None:
    model, ema_model = net().to(torch.bfloat16), net()
    want = 0.75 * ema_model[0].weight.double() + 0.25 * model[0].weight.double()
    compute_ema(model, ema_model, smoothing=0.75)
    torch.testing.assert_close(ema_model[0].weight.double(), want, rtol=1e-6, atol=1e-7)


def test_even_a_bfloat16_average_moves_as_far_as_it_should() -> None:
    torch.manual_seed(0)
    model, ema_model = nn.Linear(100, 100).to(torch.bfloat16), nn.Linear(100, 100).to(torch.bfloat16)
    nn.init.constant_(model.weight, 1.5)
    nn.init.constant_(ema_model.weight, 1.0)
    for _ in range(200):
        compute_ema(model, ema_model, smoothing=0.999)
    want = 1.5 - 0.5 * 0.999**200
    assert ema_model.weight.double().mean().item() == pytest.approx(want, abs=0.002)


def test_it_agrees_with_torch_where_torch_is_right() -> None:
    model = net()
    ours, theirs = (
        copy.deepcopy(model),
        torch.optim.swa_utils.AveragedModel(model, avg_fn=lambda a, x, _: 0.9 * a + 0.1 * x),
    )
    theirs.update_parameters(model)  # the first copies
    for _ in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        compute_ema(model, ours, smoothing=0.9)
        theirs.update_parameters(model)
    for a, b in zip(ours.parameters(), theirs.module.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_an_average_in_the_models_own_memory_is_refused_by_name() -> None:
    model = nn.Linear(2, 1)
    shallow = copy.copy(model)
    for same in (model, shallow):
        with pytest.raises(ArgumentError, match="must have its own memory.*'weight'.*copy.deepcopy"):
            compute_ema(model, same)
    teacher = copy.deepcopy(model)
    model.bias.requires_grad_(requires_grad=False)
    teacher.bias = model.bias  # a frozen part may be shared
    compute_ema(model, teacher)


def test_an_average_does_not_move_towards_averaged_weights() -> None:
    model = nn.Linear(2, 1)
    optimizer, teacher = torch.optim.SGD(model.parameters(), lr=0.1), copy.deepcopy(model)
    ema = attach(EMA(smoothing=0.5), model, optimizer)
    for _ in range(2):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    with ema.applied(), pytest.raises(LoanError, match="must not take in averaged weights"):
        compute_ema(model, teacher)


def test_a_teacher_computes_with_its_new_weights_also_inside_one_block_of_autocast() -> None:
    model, inputs = nn.Linear(4, 2), torch.ones(3, 4)
    teacher = copy.deepcopy(model)
    nn.init.ones_(model.weight)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = teacher(inputs)
        compute_ema(model, teacher, smoothing=0.5)
        after = teacher(inputs)
    assert not torch.equal(before, after)


class Pair(nn.Module):
    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)
        if tied:
            self.b.weight = self.a.weight


def test_two_weights_are_not_averaged_into_one() -> None:
    with pytest.raises(ArgumentError, match=r"must have one value \(got two for 'a.weight' and 'b.weight'"):
        compute_ema(Pair(tied=False), Pair(tied=True))
    compute_ema(Pair(tied=True), Pair(tied=False))
    same = Pair(tied=False)
    same.b.load_state_dict(same.a.state_dict())
    compute_ema(same, Pair(tied=True))


def test_an_average_of_two_weights_is_not_copied_into_one() -> None:
    model, ema = Pair(tied=False), EMA(smoothing=0.5)
    attached = attach(ema, model, None)
    attached.step()
    with pytest.raises(ArgumentError, match=r"tied tensors of the model to fill must have one value"):
        ema.get_ema_model(Pair(tied=True))
    attached.detach()


def test_a_module_that_is_registered_twice_is_averaged_once_under_each_of_its_names() -> None:
    layer, other = nn.Linear(1, 1), nn.Linear(1, 1)
    model, ema_model = nn.ModuleList([layer] * 3), nn.ModuleList([other] * 3)
    want = (other.weight + layer.weight) / 2
    compute_ema(model, ema_model, smoothing=0.5)
    torch.testing.assert_close(other.weight, want)

import copy
import gc
import math
import sys
import weakref
from pathlib import Path

import pytest
import torch
from forking import forks, in_a_fork
from torch import nn

from polyak import LoanError, MismatchError, Policy, QuarantineWarning, default_policy, kernels
from polyak.averaging.swap import swap_of
from polyak.averaging.weights import Shadow


def net(dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).to(dtype)


def shift(model: nn.Module, by: float = 1.0) -> None:
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(by if tensor.is_floating_point() else 1)


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(some, others) -> bool:
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


@pytest.mark.parametrize(
    ("model_dtype", "asked", "expected"),
    [
        (torch.float32, None, torch.float32),
        (torch.bfloat16, None, torch.float32),
        (torch.float16, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float64, torch.float64),
    ],
)
def test_the_average_has_32_bits_unless_asked_otherwise(model_dtype, asked, expected) -> None:
    shadow = Shadow(net(model_dtype), dtype=asked)
    assert shadow.averages["0.weight"].dtype == expected
    assert shadow.averages["1.num_batches_tracked"].dtype == torch.int64


def test_a_dtype_that_cannot_hold_an_average_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dtype must be .* \(got torch.int8\)"):
        Shadow(net(), dtype=torch.int8)


def test_the_average_is_its_own_and_begins_with_the_weights() -> None:
    model = net()
    shadow = Shadow(model)
    assert equal(shadow.averages, values(model))
    before = values(model)
    shift(model)
    assert equal(shadow.averages, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_swap_puts_the_average_in_the_model_and_restores_each_bit(dtype) -> None:
    model = net(dtype)
    shadow = Shadow(model)
    first = values(model)
    shift(model, 0.1)
    training = values(model)
    pointers = [p.data_ptr() for p in model.parameters()]
    with shadow.swapped("a test") as held:
        assert held is model
        assert equal(values(model), first)
        assert shadow.owner == "a test"
        assert equal(shadow.averaged_tensors(), {n: t.to(shadow.averages[n].dtype) for n, t in first.items()})
    assert equal(values(model), training)
    assert equal({n: t.to(dtype) if t.is_floating_point() else t for n, t in shadow.averages.items()}, first)
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert shadow.owner is None
    assert swap_of(model) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_training_weights_come_back_after_an_exception_of_any_kind(dtype) -> None:
    model = net(dtype)
    shadow = Shadow(model)
    shift(model)
    training = values(model)
    for kind in (RuntimeError, KeyboardInterrupt, SystemExit):
        with pytest.raises(kind), shadow.swapped("a test"):
            raise kind
        assert equal(values(model), training)


def test_while_swapped_in_there_is_no_second_swap_no_update_no_step_and_no_loading() -> None:
    model = net()
    shadow, other = Shadow(model), Shadow(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    shift(model)
    training = values(model)
    state = shadow.state_dict()
    with shadow.swapped("the first"):
        averaged = values(model)
        for refused in (
            lambda: shadow.swap_in("again"),
            lambda: other.swap_in("another"),
            lambda: shadow.update_(0.5),
            lambda: other.update_(0.5),
            optimizer.step,
            lambda: shadow.load_state_dict(state),
        ):
            with pytest.raises(LoanError, match="the first"):
                refused()
        with pytest.raises(LoanError, match="the first"), other.swapped("another"):
            pass
        assert equal(values(model), averaged)
    assert equal(values(model), training)
    optimizer.step()
    assert not equal(values(model), training)
    with pytest.raises(LoanError, match="must be in the model before"):
        shadow.restore()


def test_a_step_of_another_model_works_while_an_average_is_swapped_in() -> None:
    model, other = net(), net()
    optimizer = torch.optim.SGD(other.parameters(), lr=1.0)
    other[0].weight.grad = torch.ones_like(other[0].weight)
    before = values(other)
    with Shadow(model).swapped("a test"):
        optimizer.step()
    assert not equal(values(other), before)


def test_a_tensor_that_is_moved_or_replaced_during_a_swap_still_gets_its_training_weights() -> None:
    model = net()
    shadow = Shadow(model)
    shift(model)
    training = values(model)
    with shadow.swapped("a test"):
        model[0].weight.data = model[0].weight.data.clone()
        model[1].running_mean = torch.zeros(4)
    assert equal(values(model), training)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_swap_after_the_model_has_moved_finds_its_tensors(dtype) -> None:
    model = net(dtype)
    shadow = Shadow(model)
    for move in (lambda: model.to(torch.float64), lambda: model.to(dtype), lambda: setattr(model[0], "extra", None)):
        shift(model)
        shadow.update_(0.25)
        with shadow.swapped("the test"):
            pass
        old = [parameter.data for parameter in model.parameters()]  # kept, so that the new ones are elsewhere
        move()
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        training = values(model)
        with shadow.swapped("the test"):
            want = {name: tensor.to(training[name].dtype) for name, tensor in shadow.averaged_tensors().items()}
            assert equal(values(model), {name: want.get(name, tensor) for name, tensor in training.items()})
            assert not equal(values(model), training)
        assert equal(values(model), training)
        del old


def test_a_swap_that_has_ended_keeps_no_memory_of_the_model() -> None:
    for name in kernels.serving_cpu():
        model = net()
        shadow = Shadow(model)
        with kernels.only(name), shadow.swapped("the test"):
            pass
        own = model[0].weight
        tensors = [found for found in gc.get_objects() if type(found) is torch.Tensor]
        places = [found.data_ptr() for found in tensors if found.layout == torch.strided and found.numel() == 12]
        assert own.data_ptr() not in places


def kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports the most that a process had")
@pytest.mark.parametrize("kernel", kernels.serving_cpu())
@forks
def test_a_swap_between_tensors_of_one_dtype_takes_less_than_16_mib_of_memory(kernel) -> None:
    def swap() -> None:
        model = nn.ParameterList([torch.ones(2304, 4096), torch.ones(2304, 4096)])
        shadow = Shadow(model)
        # Now laid out otherwise than its average. The old one goes first, so that no peak is there before the swap's.
        model[1].data = torch.empty(0)
        model[1].data = torch.ones(4096, 2304).t()
        assert sum(p.nbytes for p in model.parameters()) == 72 << 20
        before = kib("VmRSS")
        for _ in range(2):
            with kernels.only(kernel), shadow.swapped("a test"):
                pass
        assert kib("VmHWM") - before < 16 * 1024

    assert in_a_fork(swap) == ""


def test_out_of_memory_at_the_beginning_of_a_swap_changes_nothing(monkeypatch) -> None:
    model = net(torch.bfloat16)
    shadow = Shadow(model)
    shift(model)
    training = values(model)

    def no_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.Tensor, "to", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        shadow.swap_in("a test")
    monkeypatch.undo()
    assert equal(values(model), training)
    assert swap_of(model) is None


def during_a_swap(shadow: Shadow) -> torch.Tensor:
    with shadow.swapped(owner="the test"):
        shadow.averaged_tensors()
    return shadow._movement.listing.averages["0.weight"]  # as what was just returned


WAYS_TO_AN_AVERAGE = {
    "averages": lambda shadow: shadow.averages["0.weight"],
    "kinds": lambda shadow: shadow.kinds()["0.weight"][0],
    "state_dict": lambda shadow: shadow.state_dict()["averages"]["0.weight"],
    "averaged_model": lambda shadow: shadow.averaged_model().get_parameter("0.weight"),
    "averaged_tensors, during a swap": during_a_swap,
}


@pytest.mark.parametrize("way", WAYS_TO_AN_AVERAGE)
def test_a_backward_pass_that_needs_an_average_as_it_was_is_refused(way) -> None:
    shadow = Shadow(model := net())
    shift(model)
    shadow.update_(0.5)
    average = WAYS_TO_AN_AVERAGE[way](shadow).detach()  # with the same counter
    x = torch.ones(2, average.shape[1], requires_grad=True)
    x.mm(average.t()).sum().backward()
    loss = x.mm(average.t()).sum()
    shadow.update_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_integer_buffers_are_copied_and_frozen_parameters_left() -> None:
    model = net()
    model[0].bias.requires_grad_(False)
    shadow = Shadow(model)
    assert "0.bias" not in shadow.averages
    model[1].num_batches_tracked.fill_(60)
    shadow.update_(0.01)
    assert shadow.averages["1.num_batches_tracked"] == 60


def test_a_parameter_that_becomes_trainable_joins_and_one_that_is_frozen_stays() -> None:
    model = net()
    model[0].bias.requires_grad_(False)
    shadow = Shadow(model)
    shift(model)
    model[0].bias.requires_grad_(True)
    model[2].bias.requires_grad_(False)
    joined = model[0].bias.detach().clone()
    shadow.update_(0.5)
    assert torch.equal(shadow.averages["0.bias"], joined)
    before = shadow.averages["2.bias"].clone()
    shadow.update_(0.5)
    assert not torch.equal(shadow.averages["2.bias"], before)


def test_a_tensor_that_is_gone_or_has_another_shape_is_an_error() -> None:
    model = net()
    shadow = Shadow(model)
    model[0].weight.data = torch.zeros(1, 3)
    with pytest.raises(MismatchError, match=r"0.weight: expected shape \(4, 3\), got \(1, 3\)"):
        shadow.update_(0.5)
    model = net()
    shadow = Shadow(model)
    del model[2]
    with pytest.raises(MismatchError, match=r"missing: 2.bias, 2.weight"):
        shadow.update_(0.5)


def test_a_tensor_with_a_new_layout_at_the_same_address_is_noticed() -> None:
    model = nn.Linear(3, 3, bias=False)
    shadow = Shadow(model)
    shadow.update_(0.5)
    model.weight.data = model.weight.data.t()
    shadow.update_(1.0)
    assert torch.equal(shadow.averages["weight"], model.weight)
    model.weight.data = model.weight.data.t().view(9, 1)
    with pytest.raises(MismatchError, match=r"expected shape \(3, 3\), got \(9, 1\)"):
        shadow.update_(0.5)


def test_another_dtype_at_the_same_address_is_seen() -> None:
    model = nn.Linear(3, 3, bias=False)
    shadow = Shadow(model)
    shadow.update_(0.5)
    nn.init.ones_(model.weight)
    model.weight.data = model.weight.data.view(torch.bfloat16).flatten()[:9].view(3, 3)
    shadow.update_(1.0)
    assert torch.equal(shadow.averages["weight"], model.weight.float())


@pytest.mark.parametrize("updates_before", [0, 1, 2])
@pytest.mark.parametrize("model_changes", [False, True])
@pytest.mark.parametrize("average_moves", [False, True])
def test_an_average_that_somebody_has_is_updated_where_it_is_now(updates_before, model_changes, average_moves) -> None:
    model = nn.Linear(3, 3, bias=False)
    shadow = Shadow(model)
    for _ in range(updates_before):
        shadow.update_(0.5)
    if model_changes:  # before anybody has the average: what is noted at that moment is not that of the last update
        model.weight.data = torch.full((3, 3), 2.0)
    given = shadow.averages["weight"]
    if average_moves:
        given.data = torch.zeros(3, 3)
    shadow.update_(1.0)
    assert torch.equal(given, model.weight)


def test_the_policy_can_be_another() -> None:
    def only_the_head(slot) -> Policy:
        return default_policy(slot) if slot.name.startswith("2.") else Policy.LEAVE

    assert set(Shadow(net(), policy=only_the_head).averages) == {"2.weight", "2.bias"}


def test_no_average_or_copy_takes_part_in_gradients() -> None:
    model = net()
    shadow = Shadow(model, policy=lambda slot: Policy.COPY if slot.name.endswith("bias") else default_policy(slot))
    with torch.enable_grad():
        shadow.update_(0.5)
        shadow.update_(0.5)
    assert not any(average.requires_grad or average.grad_fn for average in shadow.averages.values())


def test_a_buffer_with_infinities_is_a_mask_and_is_copied() -> None:
    model = net()
    model.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    shadow = Shadow(model)
    shadow.update_(0.5)
    assert shadow.num_quarantined == 0
    assert torch.equal(shadow.averages["mask"], model.mask)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
def test_a_sparse_tensor_is_left() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("edges", torch.eye(2).to_sparse())
    model.register_buffer("more_edges", torch.eye(2).to_sparse_csr(), persistent=False)
    shadow = Shadow(model)
    shadow.update_(0.5)
    assert set(shadow.averages) == {"weight", "bias"}
    with shadow.swapped("a test"):
        assert torch.equal(model.edges.to_dense(), torch.eye(2))
    with pytest.raises(ValueError, match=r"\(got <Policy.COPY: 'copy'> for 'edges', one of torch.sparse_coo"):
        Shadow(model, policy=lambda _: Policy.COPY)


def test_non_finite_weights_are_kept_out_counted_and_reported() -> None:
    model = net()
    shadow = Shadow(model)
    before = shadow.averages["0.weight"].clone()
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    shadow.update_(0.5)
    shadow.update_(0.5)
    assert torch.equal(shadow.averages["0.weight"], before)
    assert shadow.num_quarantined == 2
    with pytest.warns(QuarantineWarning, match="2 tensors with NaN or inf"):
        assert shadow.warn_of_quarantine() == 2
    assert shadow.warn_of_quarantine(since=2) == 2


def test_the_averaged_model_is_over_the_averages_themselves_and_a_frozen_parameter_is_shared() -> None:
    model = net()
    model[0].bias.requires_grad_(False)
    shadow = Shadow(model)
    teacher = shadow.averaged_model()
    assert teacher is not shadow.averaged_model()
    assert not teacher.training
    assert teacher[0].weight.data_ptr() == shadow.averages["0.weight"].data_ptr()
    assert teacher[1].running_mean.data_ptr() == shadow.averages["1.running_mean"].data_ptr()
    assert teacher[0].bias.data_ptr() == model[0].bias.data_ptr()
    assert not any(p.requires_grad for p in teacher.parameters())
    shift(model)
    shadow.update_(1.0)
    model.eval()
    inputs = torch.randn(5, 3)
    assert torch.equal(teacher(inputs), model(inputs))
    assert model[0].weight.requires_grad


def test_a_tied_model_has_a_tied_average() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    teacher = Shadow(model).averaged_model()
    assert teacher[0].weight is teacher[1].weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_while_swapped_in_both_models_can_be_read(dtype) -> None:
    model = net(dtype)
    shadow = Shadow(model)
    first = values(model)
    shift(model, 0.25)
    training = values(model)
    assert shadow.training_model() is model
    with shadow.swapped("a test"):
        assert shadow.averaged_model() is model
        assert equal(values(shadow.training_model()), training)
        assert equal(values(model), first)


def test_copying_to_another_model_needs_the_same_names_and_brings_frozen_weights_along() -> None:
    model = net()
    model[0].bias.requires_grad_(False)
    shadow = Shadow(model)
    first = values(model)
    shift(model)
    other = net()
    shift(other, 7.0)
    shadow.copy_to(nn.DataParallel(other))
    assert equal(values(other), first | {"0.bias": model[0].bias.detach()})
    shadow.copy_to(other, training=True)
    assert equal(values(other), values(model))
    with shadow.swapped("a test"):
        training = net()
        shadow.copy_to(training, training=True)
    assert equal(values(training), values(model))
    with pytest.raises(MismatchError, match="unexpected: 3.weight"):
        shadow.copy_to(nn.Sequential(*net(), nn.Linear(1, 1, bias=False)))


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_resumes_also_if_it_was_taken_during_a_swap(tmp_path, swapped, dtype) -> None:
    model = net(dtype)
    shadow = Shadow(model)
    shift(model, 0.25)
    shadow.update_(0.5)
    if swapped:
        shadow.swap_in("a test")
    torch.save({"model": model.state_dict(), "shadow": shadow.state_dict()}, tmp_path / "state.pt")
    if swapped:
        shadow.restore()
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    other = net(dtype)
    other.load_state_dict(saved["model"])
    resumed = Shadow(nn.DataParallel(other))
    resumed.load_state_dict(saved["shadow"])
    assert equal(values(other), values(model))
    assert equal(resumed.averages, shadow.averages)
    for one, its_model in ((shadow, model), (resumed, other)):
        shift(its_model, 0.125)
        one.update_(0.3)
    assert equal(resumed.averages, shadow.averages)
    assert resumed.num_updates == shadow.num_updates == 2


def test_a_bfloat16_average_resumes_bit_for_bit_and_rounds_by_its_own_count() -> None:
    def run(shadow, model, steps) -> None:
        for step in steps:
            with torch.no_grad():
                model[0].weight.copy_(torch.sin(torch.arange(12.0) + step).view(4, 3))
            shadow.update_(0.01)

    model = net()
    shadow = Shadow(model, dtype=torch.bfloat16)
    run(shadow, model, range(5))
    state = copy.deepcopy(shadow.state_dict())
    run(shadow, model, range(5, 50))
    torch.manual_seed(123)  # no generator of torch's is drawn from
    other = net()
    resumed = Shadow(other, dtype=torch.bfloat16)
    resumed.load_state_dict(state)
    run(resumed, other, range(5, 50))
    assert equal(resumed.averages, shadow.averages)


def test_a_state_that_does_not_fit_lists_both_sides_and_changes_nothing() -> None:
    shadow = Shadow(net())
    state = Shadow(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))).state_dict()
    before = copy.deepcopy(shadow.averages)
    with pytest.raises(MismatchError) as caught:
        shadow.load_state_dict(state)
    assert caught.value.missing == ["1.num_batches_tracked", "1.running_mean", "1.running_var", "2.bias", "2.weight"]
    assert caught.value.misshaped == {"1.weight": ((4,), (2, 4)), "1.bias": ((4,), (2,))}
    assert equal(shadow.averages, before)


def test_an_average_goes_with_its_model_and_is_freed_with_it() -> None:
    model = net()
    shadow = Shadow(model)
    model.to(torch.float64)
    shadow.update_(0.5)
    with shadow.swapped("a test"):
        pass
    assert model[0].weight.dtype == torch.float64
    alive = weakref.ref(model)
    del model, shadow
    gc.collect()
    assert alive() is None


def test_a_parameter_joins_at_an_update_and_not_at_an_evaluation_or_a_state() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    shadow = Shadow(model)
    model.append(nn.Linear(2, 2))
    with shadow.swapped("the test"):
        pass
    assert set(shadow.state_dict()["averages"]) == {"0.weight", "0.bias"}
    nn.init.ones_(model[1].weight)
    shadow.update_(0.0)
    assert torch.equal(shadow.averages["1.weight"], torch.ones(2, 2))

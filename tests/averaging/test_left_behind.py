"""Changes that an evaluation leaves in a model, and changes of a model between swaps, besides the weights."""

import warnings

import pytest
import torch
from torch import nn

from polyak import EMA, LoanError, PlanWarning, attach
from polyak.errors import MemoryLayoutError


def at_work(model: nn.Module, steps: int = 3):
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    attached = attach(EMA(smoothing=0.9), model, optimizer)
    train(model, optimizer, steps)
    return optimizer, attached


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 4, dtype=dtype)).square().mean().backward()
        optimizer.step()


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def equal(some, others) -> bool:
    return some.keys() == others.keys() and all(
        torch.equal(some[n], others[n]) and some[n].dtype == others[n].dtype for n in some
    )


class Lora(nn.Module):
    """As loralib's layers: the adapter is merged into the frozen weight where evaluation begins."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4), requires_grad=False)
        self.down, self.up = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(3, 2))
        self.merged = False

    def train(self, mode: bool = True) -> nn.Module:
        if self.merged == mode:
            self.weight.data += (-1 if mode else 1) * self.up @ self.down
            self.merged = not mode
        return super().train(mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight if self.merged else self.weight + self.up @ self.down).t()


@pytest.mark.parametrize("ask", ["applied", "ema_model"])
def test_merged_adapters_are_refused_by_name_before_an_average_is_swapped_in(ask) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Lora())
    _, attached = at_work(model)
    model.eval()
    with pytest.raises(LoanError, match="those of '1' are: call train"):
        attached.applied().__enter__() if ask == "applied" else attached.algorithm.ema_model
    model.train()
    with attached.applied():
        pass


def test_a_merged_adapter_of_peft_is_refused_by_name() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
    _, attached = at_work(model)
    model.merge_adapter()
    with pytest.raises(LoanError, match=r"base_model\.model\.0"), attached.applied():
        pass
    model.unmerge_adapter()
    with pytest.raises(LoanError, match="its module was replaced"), attached.applied():
        model.merge_and_unload()


def test_a_module_called_merged_without_frozen_weights_is_no_adapter() -> None:
    model = nn.Linear(4, 4)
    model.merged = True
    _, attached = at_work(model)
    with attached.applied():
        pass


@pytest.mark.parametrize("how", ["backward", "zero_grad"])
def test_gradients_of_an_evaluation_are_no_part_of_the_training(how) -> None:
    model = nn.Linear(4, 4)
    optimizer, attached = at_work(model)
    optimizer.zero_grad()
    if how == "zero_grad":
        model(torch.ones(8, 4)).sum().backward()
    before = model.weight.grad
    with attached.applied():
        model.zero_grad()
        if how == "backward":
            model(torch.ones(8, 4)).sum().backward()
    assert model.weight.grad is before


def test_gradients_that_an_evaluation_has_added_to_are_named() -> None:
    model = nn.Linear(4, 4)
    _, attached = at_work(model)
    with pytest.warns(PlanWarning, match=r"gradients must not change.*'weight', 'bias'"), attached.applied():
        model(torch.ones(8, 4)).sum().backward()


def test_an_evaluation_that_does_not_touch_gradients_says_nothing_of_them() -> None:
    model = nn.Linear(4, 4)
    optimizer, attached = at_work(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "the average that is .* is mostly its first weights")
        with attached.applied():
            torch.autograd.grad(model(torch.ones(8, 4, requires_grad=True)).sum(), list(model.parameters()))
        train(model, optimizer)


@pytest.mark.parametrize("value", [torch.zeros(5, dtype=torch.float64), torch.zeros(2, dtype=torch.float64), None])
def test_a_buffer_that_an_evaluation_replaces_is_the_one_from_before_afterwards(value) -> None:
    model = nn.Linear(4, 4)
    model.register_buffer("state", torch.ones(2))
    optimizer, attached = at_work(model)
    before, buffer = values(model), model.state
    with attached.applied():
        model.state = value
    assert equal(values(model), before)
    assert model.state is buffer
    train(model, optimizer)


def test_a_cache_of_keys_is_kept_and_a_larger_one_is_named_with_the_remedy(monkeypatch) -> None:
    model = nn.Linear(4, 4)
    model.register_buffer("keys", torch.zeros(1 << 19), persistent=False)
    _, attached = at_work(model)
    with attached.applied():
        model.keys[:4] = 1.0
    assert not model.keys.any()
    monkeypatch.setattr("polyak.averaging.buffers._KEPT_BYTES", 1 << 20)
    with pytest.raises(LoanError, match="'keys' did.*let a policy copy such a buffer"), attached.applied():
        model.keys[:4] = 1.0


def test_a_module_that_was_replaced_while_the_average_was_in_the_model_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    _, attached = at_work(model)
    before = values(model)
    with pytest.raises(LoanError, match=r"'0\.weight' could not be \(its module was replaced"), attached.applied():
        model[0] = nn.Linear(4, 4)
    assert torch.equal(model[1].weight, before["1.weight"])


def test_a_model_on_the_meta_device_does_not_take_its_average_along() -> None:
    model = nn.Linear(4, 4)
    _, attached = at_work(model)
    before = {n: t.clone() for n, t in attached.algorithm.state_dict()["ema_model"].items()}
    model.to("meta")
    for ask in (attached.applied().__enter__, lambda: attached.algorithm.ema_model):
        with pytest.raises(MemoryLayoutError, match="'weight' is on the meta device"):
            ask()
    assert equal(attached.algorithm.state_dict()["ema_model"], before)


def test_training_weights_that_have_nowhere_to_be_restored_to_are_named() -> None:
    model = nn.Linear(4, 4)
    _, attached = at_work(model)
    with pytest.raises(LoanError, match="'weight' could not be .it is on the meta device"), attached.applied():
        model.to("meta")


def test_torch_can_swap_the_tensors_of_a_model_that_was_trained_and_averaged() -> None:
    model = nn.Linear(4, 4)
    optimizer, attached = at_work(model)
    with attached.applied():
        pass
    optimizer.zero_grad()
    before = values(model)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double().float()
        with attached.applied():
            model.double().float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert equal(values(model), before)
    train(model, optimizer)


def test_a_float64_model_and_one_that_mixes_it_with_float32_are_averaged_from_attach_on() -> None:
    both = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).double())
    both[1].register_forward_pre_hook(lambda module, inputs: (inputs[0].double(),))
    for model in (nn.Linear(4, 4).double(), both):
        optimizer, attached = at_work(model, steps=1)
        want = {n: p.detach().double().clone() for n, p in model.named_parameters()}
        for _ in range(4):
            train(model, optimizer)
            want = {n: 0.9 * want[n] + 0.1 * p.detach().double().clone() for n, p in model.named_parameters()}
        with attached.applied():
            for name, parameter in model.named_parameters():
                torch.testing.assert_close(parameter.double(), want[name], rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, and warns while it traces
@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, torch.randn(8, 4))])
def test_a_scripted_model_is_averaged_and_swapped_by_value(make) -> None:
    model = make(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    optimizer, attached = at_work(model, steps=1)
    want = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    for _ in range(4):
        train(model, optimizer)
        want = {n: 0.9 * want[n] + 0.1 * p.detach().double().clone() for n, p in model.named_parameters()}
    before = values(model)
    with attached.applied():
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.double(), want[name], rtol=1e-6, atol=1e-6)
    assert equal(values(model), before)


def test_a_model_made_in_inference_mode_is_averaged_and_swapped() -> None:
    with torch.inference_mode():
        model = nn.Linear(4, 4)
    attached = attach(EMA(smoothing=0.9), model, None)
    attached.step()
    first = values(model)
    with torch.inference_mode():
        model.weight += 1.0
    attached.step()
    before = values(model)
    with attached.applied():
        torch.testing.assert_close(model.weight.detach(), first["weight"] + 0.1)
    assert equal(values(model), before)


def test_a_compiled_step_on_averaged_weights_is_refused() -> None:
    model = nn.Linear(4, 4)
    optimizer, attached = at_work(model)
    step = torch.compile(optimizer.step, backend="eager")
    with pytest.raises(LoanError, match="must not run on averaged weights"), attached.applied():
        step()


def test_a_model_that_has_taken_the_average_itself_is_refused_by_name() -> None:
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = attach(EMA(smoothing=0.5), model, optimizer)
    for _ in range(2):
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
    model.load_state_dict(ema.model.state_dict(), assign=True)
    with pytest.raises(MemoryLayoutError, match="'weight' is the average itself.*leave out assign"):
        ema.average.get_ema_model(model)

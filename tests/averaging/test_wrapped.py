"""Weights of torchao: averaged through the tensor with their values in high precision, or refused by name."""

import importlib.util
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import wrappers
from safetensors.torch import load_file
from torch import nn
from wrappers import Halved, float8, float8_all_gather, net, plain_net, quantized, train, values

from polyak import EMA, Record, Recorder, Uniform, attach, kernels
from polyak.errors import MemoryLayoutError
from polyak.tensors.slots import Policy

TORCHAO = importlib.util.find_spec("torchao") is not None
needs_torchao = pytest.mark.skipif(not TORCHAO, reason="needs torchao")
pytestmark = pytest.mark.filterwarnings("ignore") if TORCHAO else []


@pytest.fixture(params=kernels.serving_cpu(), autouse=True)
def kernel(request) -> Iterator[str]:
    with kernels.only(request.param):
        yield request.param


MAKERS = [
    pytest.param(net, id="a wrapper"),
    pytest.param(float8, id="float8", marks=needs_torchao),
    pytest.param(float8_all_gather, id="float8, fp8 all-gather", marks=needs_torchao),
    pytest.param(quantized("Int8MixedPrecisionTrainingConfig"), id="int8 mixed precision", marks=needs_torchao),
    pytest.param(quantized("bitnet_training"), id="BitNet", marks=needs_torchao),
]


def averaged(make: Any, steps: int = 6) -> tuple[nn.Module, Any, Any, dict[str, torch.Tensor]]:
    """Return a model, its optimizer, its attached average, and that average in float64."""
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ema, reference, decay = attach(EMA("3ba"), model, optimizer), dict[str, torch.Tensor](), 0.5 ** (1 / 3)

    def after() -> None:
        for name, now in values(model).items():
            before = reference.get(name)
            reference[name] = now.double() if before is None else decay * before + (1 - decay) * now.double()

    train(model, optimizer, steps, after)
    return model, optimizer, ema, reference


@pytest.mark.parametrize("make", MAKERS)
def test_a_wrapped_weight_is_averaged_swapped_and_restored_by_its_values(make) -> None:
    model, optimizer, ema, reference = averaged(make)
    kinds, before = [type(p) for p in model.parameters()], values(model)
    with ema.applied():
        found = values(model)
        assert [type(p) for p in model.parameters()] == kinds
        out = model(torch.ones(2, 16)).detach()
    for name, one in reference.items():
        assert (found[name].double() - one).norm() < 1e-6 * one.norm()
        assert not torch.equal(found[name], before[name])
    assert all(torch.equal(one, before[name]) for name, one in values(model).items())
    assert torch.equal(ema.model(torch.ones(2, 16)), out)
    assert [type(p) for p in ema.model.parameters()] == kinds
    train(model, optimizer, 3)
    alone = make()
    optimizer = torch.optim.AdamW(alone.parameters(), lr=1e-2)
    train(alone, optimizer, 6)
    train(alone, optimizer, 3)
    assert all(torch.equal(one, values(alone)[name]) for name, one in values(model).items())


@pytest.mark.parametrize("make", MAKERS)
def test_the_average_of_wrapped_weights_is_saved_exported_and_recorded_as_plain_tensors(make, tmp_path) -> None:
    _, _, ema, reference = averaged(make)
    torch.save(ema.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = make()
    second = attach(EMA("3ba"), other, torch.optim.AdamW(other.parameters(), lr=1e-2))
    second.load_state_dict(state)
    ema.save(tmp_path / "averaged.safetensors")
    saved, resumed = load_file(tmp_path / "averaged.safetensors"), dict[str, torch.Tensor]()
    second.publish(lambda name, tensor: resumed.__setitem__(name, tensor.clone()))
    for name, one in reference.items():
        assert type(saved[name]) is torch.Tensor
        assert (saved[name].double() - one).norm() < 1e-6 * one.norm()
        assert type(resumed[name]) is torch.Tensor
        assert torch.equal(resumed[name], saved[name])
    plain_net().load_state_dict(saved)


def test_a_record_has_the_values_of_wrapped_weights(tmp_path) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    steps = list[dict[str, torch.Tensor]]()
    with attach(Recorder(tmp_path / "run", interval="1ba", per_level=None, dtype=torch.float32), model, optimizer):
        train(model, optimizer, 4, lambda: steps.append(values(model)))
    averaged = Record(tmp_path / "run").average(Uniform())
    for name in steps[0]:
        mean = torch.stack([one[name].double() for one in steps]).mean(0)
        assert (averaged[name].double() - mean).norm() < 1e-6 * mean.norm()


def test_scales_that_were_computed_in_advance_are_those_of_the_weights_that_are_in_the_model() -> None:
    model, _, ema, _ = averaged(net)
    scale = torch.tensor(2.0)
    model[0].weight._scale = scale
    with ema.applied():
        assert model[0].weight._scale is None
    assert model[0].weight._scale is scale
    with pytest.raises(RuntimeError), ema.applied():
        raise RuntimeError
    assert model[0].weight._scale is scale


def test_an_inner_tensor_that_was_replaced_is_averaged_from_then_on() -> None:
    model, optimizer, ema, _ = averaged(net)
    model[0].weight._data = torch.full((32, 16), 5.0)
    for _ in range(200):
        ema.average._average.shadow.update_(0.1)
    with ema.applied():
        assert torch.allclose(values(model)["0.weight"], torch.full((32, 16), 5.0), rtol=1e-4)
    del optimizer


def test_a_wrapper_of_another_library_is_refused_by_name() -> None:
    kind = types.new_class("Foreign", (Halved,))
    kind.__module__ = "elsewhere"
    model = plain_net()
    model[0].weight = nn.Parameter(kind(model[0].weight.detach()))
    with pytest.raises(MemoryLayoutError, match="'0.weight' is a Foreign, which keeps its values in inner tensors"):
        averaged(lambda: model, 1)


@needs_torchao
@pytest.mark.parametrize("kind", ["Float8", "MXFP8"])
def test_weights_of_grouped_products_in_low_precision_are_averaged_by_their_values(kind) -> None:
    from torchao.prototype.moe_training import config, tensor

    make, settings = getattr(tensor, f"{kind}TrainingWeightWrapperTensor"), getattr(config, f"{kind}TrainingOpConfig")()
    first, second = torch.randn(2, 4, 4), torch.randn(2, 4, 4)
    model = nn.ParameterList([nn.Parameter(make(first.clone(), settings))])
    ema = attach(EMA(decay=0.5), model, None)
    ema.step()
    with torch.no_grad():
        model[0].copy_(second)
    ema.step()
    with ema.applied():
        assert type(model[0]) is make
        assert torch.allclose(values(model)["0"], (first + second) / 2, atol=1e-6)
    assert torch.equal(values(model)["0"], second)


@needs_torchao
def test_weights_that_are_kept_in_int8_are_refused_by_name() -> None:
    model = quantized("int8_weight_only_quantized_training")()
    with pytest.raises(MemoryLayoutError, match="'0.weight' is a Int8QuantizedTrainingLinearWeight"):
        attach(EMA("3ba"), model, None).step()
    left_out = EMA("3ba", policy=lambda slot: Policy.LEAVE if slot.attribute == "weight" else Policy.AVERAGE)
    ema = attach(left_out, model, None)
    for _ in range(3):
        ema.step()
    with ema.applied():
        assert model(torch.ones(2, 16)).isfinite().all()


# FSDP2


@pytest.mark.slow
def test_wrapped_weights_that_fsdp2_shards_are_averaged_by_their_shards(ranks, tmp_path) -> None:
    for one in ranks.run(2, wrappers.under_fsdp, str(tmp_path), net):
        assert one["error"] < 1e-6
        assert one["same"]
        assert one["kinds"] == {"Tensor"}
        assert one["saved"]


@needs_torchao
@pytest.mark.slow
@pytest.mark.parametrize("precomputed", [False, True])
def test_float8_weights_with_an_fp8_all_gather_are_averaged_by_their_shards(ranks, tmp_path, precomputed) -> None:
    from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

    precompute = precompute_float8_dynamic_scale_for_fsdp if precomputed else None
    for one in ranks.run(2, wrappers.under_fsdp, str(tmp_path), float8_all_gather, precompute):
        assert one["error"] < 1e-6
        assert one["same"]
        assert one["saved"]
        assert one["scales restored"]
        assert one["inside"] == [True, True]

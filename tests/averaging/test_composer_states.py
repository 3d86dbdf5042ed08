"""The states that MosaicML Composer's EMA saved load: of releases up to 0.12, and of those since."""

import copy
from typing import Any

import loops
import pytest
import torch
from torch import Tensor, nn

from polyak import EMA, CheckpointError, MismatchError, attach


class Classifier(nn.Module):
    """With batch norm, a tied and a frozen layer, and a cache that no state dict has."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.Linear(6, 6))
        self.layers[2].weight = self.layers[0].weight
        self.layers[3].requires_grad_(False)
        self.register_buffer("cache", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class ComposerClassifier(nn.Module):
    """As Composer's of that name, it calls what it wraps ``module``."""

    def __init__(self) -> None:
        super().__init__()
        self.module = Classifier()

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


MODELS = {"a model": Classifier, "a ComposerClassifier": ComposerClassifier}


def filled(build: type[nn.Module], value: float) -> nn.Module:
    """Return a model with one value everywhere, its counter too, but for the frozen layer."""
    model = build()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "layers.3" not in name:
                tensor.fill_(value)
            else:
                tensor.fill_(-1.0)
    return model


def early(average: nn.Module, training: nn.Module, *, active: bool, prefix: str) -> dict[str, Any]:
    """As ``state_dict`` of Composer 0.12.1 makes it: two state dicts, tied tensors under each name."""

    def state(model: nn.Module) -> dict[str, Tensor]:
        return {prefix + name: tensor.clone() for name, tensor in model.state_dict().items()}

    return {
        "repr": "EMA()",
        "ema_model": state(average),
        "training_model": state(training),
        "ema_weights_active": active,
        "ema_started": True,
    }


def late(average: nn.Module, training: nn.Module, *, active: bool, prefix: str) -> dict[str, Any]:
    """As the head of Composer makes it: trainable parameters and all buffers of what is not in the model."""
    held = training if active else average
    return {
        "repr": "EMA()",
        "ema_model": {
            "named_parameters_dict": {
                prefix + name: p.detach().clone() for name, p in held.named_parameters() if p.requires_grad
            },
            "named_buffers_dict": {prefix + name: b.clone() for name, b in held.named_buffers()},
        },
        "ema_weights_active": active,
        "ema_started": True,
    }


FORMS = {"0.12.1": early, "head": late}


def cut(average: nn.Module) -> nn.Module:
    """Composer averages the counter of batches as it does weights, so its average has a wrong one."""
    for name, buffer in average.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.fill_(1)
    return average


@pytest.mark.parametrize("when", ["before it has met its model", "after"])
@pytest.mark.parametrize("active", [False, True], ids=["training weights in the model", "average in the model"])
@pytest.mark.parametrize("prefix", ["", "module."], ids=["bare", "DDP"])
@pytest.mark.parametrize("build", MODELS.values(), ids=list(MODELS))
@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
def test_a_state_of_composer_gives_its_average_and_its_training_weights(form, build, prefix, active, when):
    average, training = cut(filled(build, 2.0)), filled(build, 60.0)
    state = form(average, training, active=active, prefix=prefix)
    saved = copy.deepcopy(state)
    # Composer's checkpoint has in the model what was in it when it was saved.
    model = copy.deepcopy(average if active else training)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.0)
    ema = EMA("4ba")
    if when == "after":
        attached = attach(ema, model, optimizer)
        ema.load_state_dict(state)
    else:
        ema.load_state_dict(state)
        attached = attach(ema, model, optimizer)
    assert loops.differences(state, saved) == []  # what was given is not changed
    assert ema.ema_started
    assert not ema.ema_weights_active
    assert loops.differences(dict(training.state_dict()), dict(model.state_dict())) == []
    want = dict(average.state_dict())
    # A counter of batches is no average.
    want |= {name: tensor for name, tensor in training.state_dict().items() if name.endswith("num_batches_tracked")}
    assert loops.differences(want, dict(ema.ema_model.state_dict())) == []

    # It resumes from there immediately, and in the form of polyak.
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    assert ema.num_updates == 1
    kept = 0.5**0.25
    name = next(name for name, _ in model.named_parameters())
    assert ema.ema_model.get_parameter(name).flatten()[0].item() == pytest.approx(kept * 2 + (1 - kept) * 60)
    assert "polyak" in ema.state_dict()
    with attached.applied():
        pass
    assert loops.differences(dict(training.state_dict()), dict(model.state_dict())) == []


@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
def test_a_state_of_composer_from_before_averaging_began_begins_it_here(form):
    model = filled(Classifier, 3.0)
    state = form(filled(Classifier, 1.0), filled(Classifier, 2.0), active=False, prefix="") | {"ema_started": False}
    ema = EMA("4ba")
    attach(ema, model, torch.optim.SGD(model.parameters(), lr=0.1))
    before = loops.bits(model)
    ema.load_state_dict(state)
    assert not ema.ema_started
    assert loops.differences(before, loops.bits(model)) == []


@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
def test_a_state_of_composer_of_another_model_is_refused_with_both_sides(form):
    model = loops.perceptron()
    ema = EMA("4ba")
    attach(ema, model, torch.optim.SGD(model.parameters(), lr=0.1))
    before = loops.bits(model)
    with pytest.raises(MismatchError, match=r"(?s)missing.*0\.bias.*unexpected.*layers\.0\.bias"):
        ema.load_state_dict(form(filled(Classifier, 1.0), filled(Classifier, 2.0), active=True, prefix=""))
    assert not ema.ema_started
    assert loops.differences(before, loops.bits(model)) == []


def test_a_state_that_is_no_state_of_an_ema_is_refused():
    with pytest.raises(CheckpointError, match="'weight'"):
        EMA().load_state_dict({"weight": torch.ones(1)})


def test_a_run_resumes_from_a_state_of_composer_under_the_trainer(tmp_path):
    training, average = loops.perceptron(0), loops.perceptron(1)
    ema = EMA("4ba")
    ema.load_state_dict(late(average, training, active=True, prefix="module."))
    trainer = loops.train(tmp_path, ema=ema, model=copy.deepcopy(average))
    assert loops.differences(loops.bits(training), loops.bits(trainer.state.model)) == []
    assert loops.differences(loops.bits(average), loops.averaged(ema)) == []
    trainer.fit()
    assert ema.num_updates == 18
    never = loops.train(tmp_path / "never", model=training)
    never.fit()
    assert loops.differences(loops.bits(never.state.model), loops.bits(trainer.state.model)) == []

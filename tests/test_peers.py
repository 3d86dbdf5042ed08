"""Faults in the averages of other libraries that polyak does not have.

Where the library is installed, the test first shows its fault. If that half fails, the library is repaired, and
the half can be deleted.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import ema_pytorch
import loops
import pytest
import torch
import torch_ema
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.optim.swa_utils import update_bn as torchs_update_bn
from torch.utils.data import DataLoader

from polyak import (
    EMA,
    Attached,
    MismatchError,
    PlanWarning,
    PowerFunction,
    QuarantineWarning,
    Record,
    Recorder,
    Smoothing,
    Warmup,
    attach,
    compute_ema,
    update_bn,
)
from polyak.algorithm import Algorithm

# Warnings of other libraries are ignored; an unexpected warning of polyak is an error.
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error::polyak.errors.PlanWarning"),
    pytest.mark.filterwarnings("error::polyak.errors.QuarantineWarning"),
    pytest.mark.filterwarnings("ignore:training has waited:polyak.errors.PlanWarning"),  # disks differ
    # As in all tests: these average a few batches.
    pytest.mark.filterwarnings("ignore:the average that is .* is mostly its first weights:polyak.errors.PlanWarning"),
    pytest.mark.filterwarnings("ignore:raw weights are .* averaging has not begun:polyak.errors.PlanWarning"),
]


class Weight(nn.Module):
    """A parameter that only the test changes."""

    def __init__(self, value: float = 0.0, shape: tuple[int, ...] = (1,), dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full(shape, value, dtype=dtype))

    @torch.no_grad()
    def set_to(self, value: float) -> None:
        self.weight.fill_(value)


class Tied(Weight):
    """A model with two names for its parameter."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__(value)
        self.again = nn.Module()
        self.again.weight = self.weight


def followed(algorithm: Algorithm, model: Weight, values: Iterable[float], state: Any = None) -> Attached:
    """Let an algorithm follow a parameter that has each of these values in turn, one a step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    attached = attach(algorithm, model, optimizer)
    if state is not None:
        attached.load_state_dict(state)
    for value in values:
        model.set_to(value)
        model.weight.grad = torch.zeros_like(model.weight)
        optimizer.step()
    return attached


def average_of(ema: EMA) -> float:
    return loops.averaged(ema)["weight"].mean().item()


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, n: int, accumulate: int = 1) -> None:
    for i in range(n * accumulate):
        inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(i))
        model(inputs).square().mean().backward()
        if (i + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()


# Lightning's EMAWeightAveraging


def lightning_run(folder: Path, callback: Any, *, raises: bool = False) -> nn.Module:
    """Train for two epochs of six steps, validating at the end of each; return the net."""
    import lightning.pytorch as lightning  # takes seconds

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = loops.perceptron()

        def training_step(self, batch: Any) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch: Any) -> None:
            if raises:
                raise OSError("as planned")

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.5)

    module = Module()
    trainer = lightning.Trainer(
        max_epochs=2, callbacks=[callback], logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, accelerator="cpu", default_root_dir=folder, num_sanity_val_steps=0,
    )  # fmt: skip
    train, val = (DataLoader(loops.dataset(n), batch_size=loops.BATCH) for n in (6, 1))
    if raises:
        with pytest.raises(OSError, match="as planned"):
            trainer.fit(module, train, val)
    else:
        trainer.fit(module, train, val)
    return module.net


@pytest.fixture(scope="module")
def trained() -> dict[int, dict[str, Tensor]]:
    """The training weights of that run after so many of its steps."""
    net = loops.perceptron()
    optimizer, weights = torch.optim.SGD(net.parameters(), lr=0.5), {0: loops.bits(net)}
    loader = DataLoader(loops.dataset(6), batch_size=loops.BATCH)
    for step, (inputs, targets) in enumerate([*loader, *loader], start=1):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), targets).backward()
        optimizer.step()
        weights[step] = loops.bits(net)
    return weights


def test_a_start_that_lies_beyond_the_run_leaves_the_training_weights_and_warns(tmp_path, trained):
    from lightning.pytorch.callbacks import EMAWeightAveraging

    from polyak.hosts.lightning import Averaging

    theirs = lightning_run(tmp_path, EMAWeightAveraging(decay=0.5, update_starting_at_step=100))
    assert loops.differences(trained[0], loops.bits(theirs)) == []  # a run of nothing
    with pytest.warns(PlanWarning, match="100ba.*12ba"):
        ours = lightning_run(tmp_path, Averaging(EMA("2ba", ema_start="100ba")))
    assert loops.differences(trained[12], loops.bits(ours)) == []


def test_a_start_in_epochs_delays_the_average(tmp_path):
    from lightning.pytorch.callbacks import EMAWeightAveraging

    from polyak.hosts.lightning import Averaging

    theirs = EMAWeightAveraging(decay=0.5, update_starting_at_epoch=1)
    assert all(theirs.should_update(step_idx=step) for step in range(1, 6))  # in the first epoch
    ema = EMA("2ba", ema_start="1ep")
    lightning_run(tmp_path, Averaging(ema))
    assert ema.num_updates == 6  # begun with the sixth step's weights


def test_an_exception_in_validation_leaves_the_training_weights(tmp_path, trained):
    from lightning.pytorch.callbacks import EMAWeightAveraging

    from polyak.hosts.lightning import Averaging

    theirs = lightning_run(tmp_path, EMAWeightAveraging(decay=0.5), raises=True)
    assert loops.differences(trained[6], loops.bits(theirs))
    ours = lightning_run(tmp_path, Averaging(EMA("2ba")), raises=True)
    assert loops.differences(trained[6], loops.bits(ours)) == []


# ema-pytorch's PostHocEMA


@pytest.mark.parametrize("interval", [10, 100])
def test_an_average_chosen_afterwards_is_right_whatever_the_interval(tmp_path, interval):
    ramp = [t / 1000 for t in range(1, 1001)]
    model, folder = Weight(), str(tmp_path / "theirs")
    options = {"checkpoint_every_num_steps": 100, "checkpoint_folder": folder, "checkpoint_dtype": torch.float32}
    theirs = ema_pytorch.PostHocEMA(model, sigma_rels=(0.05, 0.28), update_every=interval, **options)
    for value in ramp:
        model.set_to(value)
        theirs.update()
    assert theirs.synthesize_ema_model(sigma_rel=0.15).ema_model.weight.item() < 0.3  # 0.82 is right

    with followed(Recorder(tmp_path / "ours", f"{interval}ba"), Weight(), ramp):
        pass
    # The record stores which averages its files hold: users need not remember a gamma.
    record = Record(tmp_path / "ours")
    for profile in (PowerFunction(sigma_rel=0.15), PowerFunction(sigma_rel=0.25)):
        ideal = (profile.exponent + 1) / (profile.exponent + 2)
        assert record.average(profile)["weight"].item() == pytest.approx(ideal, abs=0.001)


# TRL's BEMACallback


def test_a_run_shorter_than_the_start_of_averaging_saves_its_training_weights_and_warns(tmp_path):
    with pytest.warns(PlanWarning, match="400ba.*18ba"):
        trainer = loops.train(tmp_path, ema=EMA("2ba", ema_start="400ba"))
        trainer.fit()
    trainer.save_checkpoint(tmp_path / "end.pt")
    saved = torch.load(tmp_path / "end.pt", weights_only=True)
    assert loops.differences(loops.bits(trainer.state.model), saved["model"]) == []
    assert loops.differences(loops.bits(loops.perceptron()), saved["model"])
    assert saved["model_holds"].startswith("training")


def test_a_short_run_with_an_average_saves_neither_the_first_weights_nor_the_last(tmp_path):
    trainer = loops.train(tmp_path, ema=EMA("2ba"), max_duration="6ba")
    trainer.fit()
    trainer.save_checkpoint(tmp_path / "end.pt")
    saved = torch.load(tmp_path / "end.pt", weights_only=True)["model"]
    assert len(loops.differences(loops.bits(loops.perceptron()), saved)) == len(saved)
    assert len(loops.differences(loops.bits(trainer.state.model), saved)) == len(saved)


def test_frozen_parameters_are_left_as_they_are():
    model = loops.perceptron()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ema = EMA("2ba")
    attached = attach(ema, model, optimizer)
    frozen = loops.bits(model[0])
    steps(model, optimizer, 5)
    with attached.applied():
        assert loops.differences(frozen, loops.bits(model[0])) == []
    assert loops.differences(frozen, loops.bits(ema.ema_model[0])) == []
    assert set(ema.state_dict()["ema_model"]) == {"2.weight", "2.bias"}


def test_a_resumed_average_continues_from_its_saved_value():
    values = [float(v) for v in range(1, 9)]
    whole, half, resumed = (EMA("3ba") for _ in range(3))
    followed(whole, Weight(), values)
    state = copy.deepcopy(followed(half, Weight(), values[:5]).state_dict())
    followed(resumed, Weight(5.0), values[5:], state)
    assert loops.differences(whole.state_dict(), resumed.state_dict()) == []


# Keras


def test_prediction_leaves_the_training_weights(tmp_path):
    trainer = loops.train(tmp_path, ema=EMA("2ba"), saves=None)
    trainer.fit()
    training = loops.bits(trainer.state.model)
    trainer.predict([torch.zeros(2, 6)])
    assert loops.differences(training, loops.bits(trainer.state.model)) == []


# Keras, mmengine, Ignite


def test_micro_batches_do_not_count():
    model = loops.perceptron()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = EMA("2ba")
    attach(ema, model, optimizer)
    steps(model, optimizer, 2, accumulate=4)
    assert ema.state_dict()["updated_at"]["batch"] == 2
    assert ema.num_updates == 1  # it begins with the weights after the first step


def test_ignites_iterations_do_not_count_where_they_are_parts_of_a_step():
    from ignite.engine import Events, create_supervised_trainer
    from ignite.handlers import EMAHandler

    from polyak.hosts.ignite import Averaging

    model, ema, counted = loops.perceptron(), EMA("1ba"), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = create_supervised_trainer(model, optimizer, nn.functional.cross_entropy, gradient_accumulation_steps=4)
    theirs = EMAHandler(model)
    theirs._update_ema_model = lambda engine, name: counted.append(engine.state.iteration)
    theirs.attach(trainer, event=Events.ITERATION_COMPLETED)
    Averaging(ema, trainer, model, optimizer, gradient_accumulation_steps=4)
    trainer.run(DataLoader(loops.dataset(8), batch_size=loops.BATCH), max_epochs=1)
    assert len(counted) == 8
    assert ema.state_dict()["updated_at"]["batch"] == 2
    assert ema.num_updates == 1


# Ignite


def test_the_buffers_of_the_average_are_not_those_of_the_model():
    from ignite.engine import Engine
    from ignite.handlers import EMAHandler

    model = loops.noisy_perceptron()
    theirs = EMAHandler(model)
    engine = Engine(lambda engine, batch: None)
    theirs.attach(engine)
    engine.run([0])
    assert theirs.ema_model[1].running_mean.data_ptr() == model[1].running_mean.data_ptr()

    ema, optimizer = EMA("4ba"), torch.optim.SGD(model.parameters(), lr=0.1)
    attach(ema, model, optimizer)
    steps(model, optimizer, 3)
    kept = loops.averaged(ema)
    for buffer in model.buffers():
        buffer.fill_(77)
    assert loops.differences(kept, loops.averaged(ema)) == []


# Ignite, timm


def test_a_warm_up_needs_no_name_and_no_step_argument():
    from ignite.engine import Engine
    from ignite.handlers import EMAHandler

    engine = Engine(lambda engine, batch: None)
    EMAHandler(Weight(), momentum=0.1, momentum_warmup=0.5, warmup_iters=2).attach(engine, name="of_mine")
    engine.run([0])
    assert engine.state.of_mine == 0.1  # not 0.5

    ema = EMA(profile=Warmup(Smoothing(0.9)))
    values = [3.0, 5.0, 2.0, 7.0]
    followed(ema, Weight(), values)
    want, *later = values
    for n, value in enumerate(later):
        kept = (1 + n) / (10 + n)
        want = kept * want + (1 - kept) * value
    assert average_of(ema) == pytest.approx(want, rel=1e-6)


# timm, ultralytics, mmengine


@pytest.mark.parametrize("by", ["EMA", "compute_ema"])
def test_tied_weights_are_averaged_once(by):
    if by == "EMA":
        ema = EMA(smoothing=0.9)
        followed(ema, Tied(), [0.0, 1.0])
        average = loops.averaged(ema)["weight"]
    else:
        tied = Tied()
        compute_ema(Tied(1.0), tied, smoothing=0.9)
        average = tied.weight
    assert average.item() == pytest.approx(0.1)  # twice would be 0.19


# mmengine


@pytest.mark.parametrize("build", [loops.perceptron, loops.noisy_perceptron], ids=["parameters", "and buffers"])
def test_an_average_follows_a_model_that_is_moved_after_it_was_attached(build):
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = EMA(smoothing=0.0)  # the average is the weights
    attach(ema, model, optimizer)
    for _ in range(2):
        steps(model, optimizer, 2)
        assert loops.differences(loops.bits(model), loops.averaged(ema)) == []
        model._apply(torch.clone)  # as `cuda()` does: other memory, and other tensors for buffers
    steps(model, optimizer, 2)
    assert loops.differences(loops.bits(model), loops.averaged(ema)) == []


# torch's swa_utils


def test_a_float32_average_follows_a_bfloat16_model():
    theirs = AveragedModel(Weight(1.0, dtype=torch.bfloat16), multi_avg_fn=get_ema_multi_avg_fn(0.99)).float()
    theirs.update_parameters(Weight(1.0, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="dtype"):
        theirs.update_parameters(Weight(2.0, dtype=torch.bfloat16))
    ema = EMA(smoothing=0.99)
    followed(ema, Weight(dtype=torch.bfloat16), [1.0, 2.0])
    assert loops.averaged(ema)["weight"].dtype == torch.float32
    assert average_of(ema) == pytest.approx(1.01)


def breaks_off() -> Iterator[Tensor]:
    yield torch.ones(4, 6)
    raise OSError("as planned")


def test_failed_recomputing_of_statistics_restores_them():
    theirs, ours = (nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)) for _ in range(2))
    with pytest.raises(OSError, match="as planned"):
        torchs_update_bn(breaks_off(), theirs)
    assert theirs[1].momentum is None
    before = loops.bits(ours)
    with pytest.raises(OSError, match="as planned"):
        update_bn(ours, breaks_off())
    assert ours[1].momentum == 0.1
    assert loops.differences(before, loops.bits(ours)) == []


def test_fewer_parameters_are_an_error():
    whole, part = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))
    theirs = AveragedModel(whole)
    for _ in range(2):
        theirs.update_parameters(part)
    for one, other in ((whole, part), (part, whole)):
        before = loops.bits(other)
        with pytest.raises(MismatchError, match=r"1\.bias"):
            compute_ema(one, other)
        assert loops.differences(before, loops.bits(other)) == []


# torch-ema


def test_shapes_that_would_broadcast_are_an_error():
    theirs = torch_ema.ExponentialMovingAverage([nn.Parameter(torch.zeros(4, 4))], decay=0.5)
    theirs.update([nn.Parameter(torch.ones(1, 4))])
    assert theirs.shadow_params[0].min() > 0
    average = Weight(shape=(4, 4))
    with pytest.raises(MismatchError, match=r"\(1, 4\)"):
        compute_ema(Weight(1.0, shape=(1, 4)), average, 0.5)
    assert not average.weight.any()


# diffusers' EMAModel


def test_a_warm_up_is_used_only_if_it_is_asked_for():
    from diffusers.training_utils import EMAModel

    assert EMAModel(Weight().parameters(), decay=0.9999, use_ema_warmup=False).get_decay(2) < 0.5
    ema = EMA(smoothing=0.75)
    followed(ema, Weight(), [0.0, 4.0])
    assert average_of(ema) == 1.0


def test_a_truncated_state_is_an_error():
    from diffusers.training_utils import EMAModel

    model = nn.Linear(2, 2)
    theirs = EMAModel(model.parameters())
    state = theirs.state_dict()
    theirs.load_state_dict(state | {"shadow_params": state["shadow_params"][:1]})
    theirs.copy_to(model.parameters())

    ema, optimizer = EMA("2ba"), torch.optim.SGD(model.parameters(), lr=0.1)
    attached = attach(ema, model, optimizer)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state, before = copy.deepcopy(attached.state_dict()), loops.averaged(ema)
    del state["algorithms"][0][1]["ema_model"]["bias"]
    with pytest.raises(MismatchError, match="bias"):
        attached.load_state_dict(state)
    assert loops.differences(before, loops.averaged(ema)) == []


# OneTrainer, ai-toolkit


def test_on_the_cpu_the_saved_training_weights_are_no_alias_of_the_model():
    model, ema = Weight(), EMA("1ba")
    attached = followed(ema, model, [1.0, 3.0])
    with attached.applied():
        assert model.weight.item() == 2.0
        aside = attached.state_dict()["algorithms"][0][1]["training_model"]["weight"]
        assert aside.item() == 3.0
        assert aside.data_ptr() != model.weight.data_ptr()
    assert model.weight.item() == 3.0


def test_the_average_is_in_the_state_that_is_saved(tmp_path):
    ema = EMA("1ba")
    attached = followed(ema, Weight(), [1.0, 3.0])
    torch.save(attached.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    assert saved["algorithms"][0][1]["ema_model"]["weight"].item() == average_of(ema) == 2.0


# All of them

Update = Callable[[], None]


def of_torch(model: nn.Module) -> tuple[nn.Module, Update]:
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    return average.module, lambda: average.update_parameters(model)


def of_ema_pytorch(model: nn.Module) -> tuple[nn.Module, Update]:
    average = ema_pytorch.EMA(model, beta=0.5, update_after_step=0, update_every=1)
    return average.ema_model, average.update


def of_torch_ema(model: nn.Module) -> tuple[nn.Module, Update]:
    average = torch_ema.ExponentialMovingAverage(model.parameters(), decay=0.5)
    shown = Weight()
    shown.weight = nn.Parameter(average.shadow_params[0])
    return shown, average.update


def of_diffusers(model: nn.Module) -> tuple[nn.Module, Update]:
    from diffusers.training_utils import EMAModel

    average, shown = EMAModel(model.parameters()), Weight()
    shown.weight = nn.Parameter(average.shadow_params[0])
    return shown, lambda: average.step(model.parameters())


def of_ignite(model: nn.Module) -> tuple[nn.Module, Update]:
    from ignite.engine import Engine
    from ignite.handlers import EMAHandler

    handler = EMAHandler(model, momentum=0.5)
    engine = Engine(lambda engine, batch: None)
    handler.attach(engine, warn_if_exists=False)
    return handler.ema_model, lambda: engine.run([0])


@pytest.mark.parametrize(
    "of_theirs", [of_torch, of_ema_pytorch, of_torch_ema, of_diffusers, of_ignite], ids=loops.label
)
def test_one_step_with_nan_changes_nothing(of_theirs):
    values = [1.0, 1.0, math.nan, 3.0, 3.0]
    model = Weight(1.0)
    theirs, update = of_theirs(model)
    for value in values:
        model.set_to(value)
        update()
    assert theirs.weight.isnan().all()
    ema = EMA("1ba")
    attached = followed(ema, Weight(), values)
    assert average_of(ema) == 2.5
    with pytest.warns(QuarantineWarning, match="1 tensors"), attached.applied():
        pass

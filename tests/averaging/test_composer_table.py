"""What MosaicML Composer's EMA gets wrong, and what ours does instead. The numbers are the rows of that table."""

import copy
import math
import re
import sys
import warnings
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import loops
import numpy as np
import pytest
import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import polyak
from polyak import (
    EMA,
    Attached,
    Event,
    LoanError,
    MismatchError,
    PlanWarning,
    ProfileError,
    QuarantineWarning,
    TimeError,
    Trainer,
    attach,
    compute_ema,
)
from polyak.kernels import c, exchange, pieces
from polyak.profiles import HalfLife


def steps(model: nn.Module, optimizer: Optimizer, n: int, *, seed: int = 0) -> None:
    """Train for ``n`` steps on data that follow from ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    for _ in range(n):
        optimizer.zero_grad()
        model(torch.randn(4, 6, generator=generator).to(dtype)).square().mean().backward()
        optimizer.step()


def averaging(model: nn.Module, ema: EMA | None = None, *, n: int = 5, **options: Any) -> tuple[EMA, Attached, Any]:
    """Return an EMA that has followed ``n`` steps, what attaches it, and the optimizer."""
    ema = EMA("4ba") if ema is None else ema
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    attached = attach(ema, model, optimizer, **options)
    steps(model, optimizer, n)
    return ema, attached, optimizer


class Constant(nn.Module):
    """Parameters that only the test moves."""

    def __init__(self, *values: Tensor) -> None:
        super().__init__()
        self.values = nn.ParameterList(values)


def drive(ema: EMA, model: nn.Module, weights: list[Callable[[], None]], **options: Any) -> Attached:
    """Let an EMA follow weights that are set by hand, one change a step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    attached = attach(ema, model, optimizer, **options)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for change in weights:
        with torch.no_grad():
            change()
        optimizer.step()
    return attached


# Row 1


@pytest.mark.parametrize("half_life", ["1ep", "0.5ep"])
def test_saving_on_the_last_batch_of_an_epoch_changes_neither_training_nor_average(half_life, tmp_path):
    never, recorder, ema = loops.Recorder(), loops.Recorder(), EMA(half_life)
    loops.train(tmp_path / "never", saves=None, callbacks=(never,)).fit()
    loops.train(tmp_path / "averaged", ema=ema, saves=f"{loops.EPOCH}ba", callbacks=(recorder,)).fit()
    assert loops.differences(never.weights, recorder.weights) == []
    at_epochs = [never.weights[batch] for batch in (6, 12, 18)]
    kept = 0.5 ** (1 / float(ema.half_life))
    for name, average in loops.averaged(ema).items():
        want = at_epochs[0][name].double()
        for weights in at_epochs[1:]:
            want = kept * want + (1 - kept) * weights[name].double()
        torch.testing.assert_close(average.double(), want, rtol=1e-6, atol=1e-7)


# Row 2


@pytest.fixture(scope="module")
def one_process():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": DistributedDataParallel,
    "compile": torch.compile,
}


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("saved_by", ["the wrapped", "the bare"])
def test_a_state_saved_under_a_wrapper_loads_without_it_and_back(saved_by, wrapper):
    def wrapped(model: nn.Module) -> nn.Module:
        # Compiled, but run as it is: only the names matter here.
        return WRAPPERS[wrapper](model, backend="eager") if wrapper == "compile" else WRAPPERS[wrapper](model)

    first, second = (wrapped, lambda model: model)[:: 1 if saved_by == "the wrapped" else -1]
    model = loops.perceptron()
    never_stopped, attached, optimizer = averaging(first(model), n=5)
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict(), attached.state_dict()))
    assert set(state[2]["algorithms"][0][1]["ema_model"]) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    steps(model, optimizer, 3, seed=1)

    again = loops.perceptron(seed=3)
    ema, attached, optimizer = averaging(second(again), n=0)
    for target, part in zip((again, optimizer, attached), state, strict=True):
        target.load_state_dict(part)
    assert ema.ema_started
    steps(again, optimizer, 3, seed=1)
    assert ema.num_updates == 7
    assert loops.differences(loops.bits(model), loops.bits(again)) == []
    assert loops.differences(loops.averaged(never_stopped), loops.averaged(ema)) == []


def test_a_state_with_other_names_is_refused_with_both_sides():
    _, attached, _ = averaging(loops.perceptron())
    state = attached.state_dict()
    averages = state["algorithms"][0][1]["ema_model"]
    averages["stranger.weight"] = averages.pop("0.weight")
    averages["2.bias"] = torch.zeros(5)
    model = loops.perceptron(seed=2)
    before = loops.bits(model)
    other, again, _ = averaging(model, n=0)
    with pytest.raises(MismatchError, match=r"(?s)0\.weight.*stranger\.weight.*2\.bias.*\(3,\).*\(5,\)") as caught:
        again.load_state_dict(state)
    assert (caught.value.missing, caught.value.unexpected) == (["0.weight"], ["stranger.weight"])
    assert not other.ema_started
    assert loops.differences(before, loops.bits(model)) == []


# Row 3 is in tests/hosts/test_composer.py: there sharded models are refused, since Composer saves one shard.


# Row 4


def test_a_trainer_refuses_two_averages_before_it_touches_the_weights(tmp_path):
    model = loops.perceptron()
    before = loops.bits(model)
    with pytest.raises(ValueError, match=r"(?s)there can be one.*EMA.*EMA"):
        Trainer(model, loss=nn.functional.cross_entropy, algorithms=[EMA("4ba"), EMA("8ba")])
    assert loops.differences(before, loops.bits(model)) == []
    trainer = loops.train(tmp_path, ema=EMA("4ba"), model=model)
    trainer.fit()


def test_two_attached_averages_are_swapped_in_one_after_the_other_and_never_together():
    model = loops.perceptron()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fast, slow = EMA("1ba"), EMA("20ba")
    first, second = attach(fast, model, optimizer), attach(slow, model, optimizer)
    for _ in range(3):
        steps(model, optimizer, 4)
        training, averages = loops.bits(model), (loops.averaged(fast), loops.averaged(slow))
        for attached, average in zip((first, second), averages, strict=True):
            with attached.applied():
                assert loops.differences(average, loops.bits(model)) == []
            assert loops.differences(training, loops.bits(model)) == []
        with first.applied():
            with pytest.raises(LoanError, match=r"one average at a time.*1, 'ba'"), second.applied():
                pass
            with pytest.raises(LoanError, match="1, 'ba'"):
                optimizer.step()
            assert loops.differences(averages[0], loops.bits(model)) == []
        assert loops.differences(training, loops.bits(model)) == []
        assert loops.differences(averages, (loops.averaged(fast), loops.averaged(slow))) == []
    assert fast.num_updates == slow.num_updates == 11


# Row 5


@pytest.mark.parametrize("saves", [None, "1ba", "5ba", "1ep", loops.often], ids=loops.label)
@pytest.mark.parametrize("max_duration", ["2ep", "8ba"])
def test_fit_predict_eval_and_saving_leave_training_weights(max_duration, saves, tmp_path):
    never = loops.train(tmp_path / "never", saves=None, max_duration=max_duration)
    never.fit()
    training = loops.bits(never.state.model)
    trainer = loops.train(tmp_path / "averaged", ema=EMA("4ba"), saves=saves, max_duration=max_duration)
    for act in (
        trainer.fit,
        trainer.eval,
        lambda: trainer.predict([torch.zeros(2, 6)]),
        lambda: trainer.save_checkpoint(tmp_path / "x.pt"),
        lambda: trainer.predict([torch.zeros(2, 6)]),
    ):
        act()
        assert loops.differences(training, loops.bits(trainer.state.model)) == []
    with pytest.warns(PlanWarning, match="nothing to train"):
        trainer.fit()
    assert loops.differences(training, loops.bits(trainer.state.model)) == []


# Row 6


class Broken(loops.Accuracy):
    """A metric that fails on the second batch."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self._error = error

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        super().update(outputs, targets)
        if self.seen > len(targets):
            raise self._error


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt("broken")], ids=repr)
@pytest.mark.parametrize("where", ["metric", "eval_start", "eval_end", "save_start", "save_end", "predict_start"])
def test_an_exception_while_the_average_is_swapped_in_leaves_training_weights(where, error, tmp_path):
    recorder, ema = loops.Recorder(), EMA("4ba")
    metrics = {"broken": Broken(error)} if where == "metric" else {}
    broken = [] if where == "metric" else [loops.Raises(Event(where), error, batch=5)]
    trainer = loops.train(tmp_path, ema=ema, metrics=metrics, callbacks=(recorder, *broken))
    with pytest.raises(type(error), match="broken"):
        trainer.fit()
        trainer.predict([torch.zeros(2, 6)])
    last = recorder.weights[max(recorder.weights)]
    assert loops.differences(last, loops.bits(trainer.state.model)) == []
    assert not ema.ema_weights_active
    assert all(module.training for module in trainer.state.model.modules())


class Injected(BaseException):
    """An error that nobody expects."""


def writes(function: Any) -> bool:
    """Return whether an operation writes to a tensor or makes one, which a view does not."""
    schema = function._schema
    return schema.is_mutable or not any(one.alias_info for one in schema.returns)


class FailingOps(TorchDispatchMode):
    """Fails in the n-th operation that writes to a tensor or makes one: after it, or half-way through a copy."""

    def __init__(self, n: int, how: str, error: BaseException) -> None:
        super().__init__()
        self.left = n
        self._how, self._error = how, error

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        self.left -= writes(function)
        if self.left != 0 or not writes(function):
            return function(*args, **kwargs)
        if self._how == "after":
            function(*args, **kwargs)
        elif self._how == "half-way" and "copy_" in str(function):
            for target in args[0] if isinstance(args[0], list) else [args[0]]:
                target.view(-1)[: (target.numel() + 1) // 2].fill_(-77)
        raise self._error


def wide(dtype: torch.dtype) -> nn.Module:
    """A model whose exchange takes several small buckets, with a buffer of each kind; in bf16, half of it mixed."""
    model = nn.Sequential(nn.Linear(6, 500), nn.BatchNorm1d(500), nn.Linear(500, 2)).to(dtype)
    model[1].float()
    return model


class ByRow(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.inner:
            x = layer(x.to(layer.weight.dtype))
        return x


def average_of_wide(dtype: torch.dtype) -> tuple[nn.Module, EMA, Attached, Optimizer]:
    torch.set_num_threads(1)
    model = ByRow(loops.seeded(lambda: wide(dtype)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ema = EMA("4ba")
    attached = attach(ema, model, optimizer)
    steps(model, optimizer, 3)
    return model, ema, attached, optimizer


@contextmanager
def asked_for(ema: EMA, model: nn.Module):
    """The swap that a person asks for, which no event ends."""
    ema.get_ema_model(model)
    yield
    ema.get_training_model(model)


@contextmanager
def in_small_pieces():
    """Let the kernels exchange a KiB at a time."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (exchange, pieces):
            patch.setattr(module, "SCRATCH_ELEMENTS", 1000)
        patch.setattr(c, "_SWAP", 1 << 10)
        yield


@pytest.mark.slow
@pytest.mark.parametrize("lender", ["applied", "get_ema_model"])
@pytest.mark.parametrize("how", ["after", "half-way"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_error_in_any_operation_of_a_swap_leaves_training_weights_and_average(dtype, how, lender):
    model, ema, attached, optimizer = average_of_wide(dtype)
    training, average = loops.bits(model), loops.averaged(ema)
    assert any(not torch.equal(training[name], average[name].to(training[name].dtype)) for name in training)
    with in_small_pieces():
        for n in range(1, 10_000):
            error = KeyboardInterrupt() if n % 2 else torch.OutOfMemoryError("injected")
            mode = FailingOps(n, how, error)
            with suppress(type(error)), mode, attached.applied() if lender == "applied" else asked_for(ema, model):
                pass
            for held, want in ((model, training), (ema.ema_model, average)):
                for name, tensor in loops.bits(held).items():
                    assert torch.equal(tensor, want[name]), (n, name)
            assert not ema.ema_weights_active
            if mode.left > 0:
                break
    assert n > 3  # the exchange itself may be no operation of torch's
    steps(model, optimizer, 1)
    assert ema.num_updates == 3


@contextmanager
def interrupted_at_line(n: int, files: tuple[str, ...]):
    """Raise at the n-th line that runs in these files; yield a list that then has that line."""
    count, lines = 0, []

    def trace(frame: FrameType, kind: str, argument: object) -> Any:
        del argument
        nonlocal count
        if not frame.f_code.co_filename.endswith(files):
            return None
        if kind == "line":
            count += 1
            if count == n:
                code = frame.f_code
                lines.append(f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_name}")
                raise Injected
        return trace

    outer = sys.gettrace()
    sys.settrace(trace)
    try:
        yield lines
    finally:
        sys.settrace(outer)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_interrupt_at_any_line_of_a_swap_leaves_training_weights(dtype):
    torch.set_num_threads(1)
    of_average = ("ema", "online", "actions", "weights", "swapper", "states")
    of_kernels = ("kernels/exchange.py", "kernels/c.py", "kernels/registry.py")
    files = (*(f"averaging/{name}.py" for name in of_average), *of_kernels)
    model = nn.Linear(6, 3).to(dtype)
    ema = EMA("4ba")
    data = [(torch.ones(2, 6, dtype=dtype), torch.tensor([0, 1]))]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    trainer = Trainer(
        model,
        data,
        "5ba",
        data,
        algorithms=[ema],
        optimizers=optimizer,
        loss=nn.functional.cross_entropy,
        progress_bar=False,
    )
    trainer.fit()
    training, average = loops.bits(model), loops.averaged(ema)
    wrong = []
    for n in range(1, 10_000):
        try:
            with interrupted_at_line(n, files) as lines:
                trainer.eval()
        except Injected:
            pass
        now = loops.bits(model), loops.averaged(ema)
        if loops.differences((training, average), now) or ema.ema_weights_active:
            wrong += lines
            # As good as new for the next line.
            if ema.ema_weights_active:
                ema.get_training_model(model)
            ema._average.restore_at = None
            assert loops.differences((training, average), (loops.bits(model), loops.averaged(ema))) == [], wrong
        if not lines:
            break
    assert n > 50
    assert "\n".join(wrong) == ""


def test_a_model_moved_while_it_holds_the_average_gets_its_training_weights():
    model = loops.noisy_perceptron()
    ema, attached, _ = averaging(model)
    training, average = loops.bits(model), loops.averaged(ema)
    with attached.applied():
        for parameter in model.parameters():  # as `Module.to` does
            parameter.data = parameter.data.clone()
        model[1].running_mean = model[1].running_mean.clone()
    assert loops.differences(training, loops.bits(model)) == []
    assert loops.differences(average, loops.averaged(ema)) == []


# Row 7


def fit(max_duration: str, ema: EMA, *, epoch: int = 10, **options: Any) -> Trainer:
    model = loops.perceptron()
    trainer = Trainer(
        model,
        DataLoader(loops.dataset(epoch), batch_size=loops.BATCH),
        max_duration,
        algorithms=[ema],
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        loss=nn.functional.cross_entropy,
        progress_bar=False,
        **options,
    )
    trainer.fit()
    return trainer


def test_a_start_at_half_of_a_run_of_one_epoch_is_at_half_of_it():
    ema = EMA("1ba", ema_start="0.5dur")
    fit("1ep", ema)
    assert ema.num_updates == 5
    assert ema.state_dict()["origin"]["batch"] == 5


def test_a_start_where_the_run_ends_warns_with_both_moments():
    ema = EMA("1ba", ema_start="1ep")
    with pytest.warns(PlanWarning, match=r"10ba .*ema_start='1ep'.*10ba"):
        fit("1ep", ema)


def test_a_half_life_in_epochs_longer_than_the_run_warns_that_averaging_never_starts():
    ema = EMA("1ep")
    with (
        pytest.warns(PlanWarning, match=r"never starts: its first update is at 20ba .*ends at 15ba"),
        pytest.warns(PlanWarning, match=r"averaging never started: .*15ba, 0ep"),
    ):
        fit("15ba", ema, epoch=20)
    assert not ema.ema_started


def test_a_half_life_in_epochs_with_updates_in_batches_averages_within_one_epoch():
    ema = EMA("0.2ep", update_interval="1ba")
    fit("15ba", ema, epoch=20)
    assert ema.num_updates == 14


# Row 8


@pytest.mark.parametrize(
    "arguments",
    [
        {"half_life": None, "smoothing": 0.99},
        {"smoothing": 0.99},
        {"half_life": None, "smoothing": 0.99, "update_interval": "3ba"},
        {"half_life": None, "smoothing": 0.9, "update_interval": "1ep"},
        {"smoothing": 0},
        {"smoothing": 1},
    ],
    ids=loops.label,
)
def test_smoothing_works_without_a_half_life(arguments):
    ema = EMA(**arguments)
    assert ema.half_life is None
    assert ema.smoothing == arguments["smoothing"]
    assert ema.update_interval == polyak.Time.from_input(arguments.get("update_interval", "1ba"))
    model = Constant(torch.tensor([3.0]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    attached = attach(ema, model, optimizer, steps_per_epoch=2)
    model.values[0].grad = torch.zeros(1)
    for _ in range(12):
        optimizer.step()
        model.values[0].detach().fill_(2.0)  # after the first batch
    n = ema.num_updates
    assert n > 0
    # The average begins with the weights after its first event, 3 where that is the first batch's.
    begin = 2.0 if arguments.get("update_interval") == "1ep" else 3.0
    want = 2 + (begin - 2) * arguments["smoothing"] ** n
    assert ema.ema_model.values[0].item() == pytest.approx(want)
    attached.detach()


@pytest.mark.parametrize(
    ("half_life", "like"), [("0ba", 5), ("infba", 0), ("0ep", 5), ("infep", 1), ("0sp", 5), ("inftok", 0)]
)
def test_half_life_zero_is_the_weights_and_an_infinite_one_never_moves(half_life, like):
    model, ema, seen = loops.noisy_perceptron(), EMA(half_life), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(ema, model, optimizer, steps_per_epoch=2, samples_per_step=4, tokens_per_step=9)
    for i in range(6):
        steps(model, optimizer, 1, seed=i)
        seen.append(loops.bits(model))
    averages = {name: tensor for name, tensor in loops.averaged(ema).items() if tensor.is_floating_point()}
    assert loops.differences({name: seen[like][name] for name in averages}, averages) == []
    assert loops.differences(seen[0], seen[5])


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"half_life": "-10ba"}, TimeError, "-10ba"),
        ({"half_life": "5"}, TimeError, "'5'"),
        ({"half_life": ""}, TimeError, "''"),
        ({"half_life": "nanba"}, TimeError, "nanba"),
        ({"smoothing": 1.5}, ProfileError, r"\[0, 1\].*1\.5"),
        ({"smoothing": -0.5}, ProfileError, r"\[0, 1\].*-0\.5"),
        ({"smoothing": math.nan}, ProfileError, r"\[0, 1\].*nan"),
        ({"half_life": None}, ProfileError, "exactly one"),
        ({"half_life": "1000ba", "smoothing": 0.9}, ProfileError, "exactly one"),
        ({"half_life": "1ep", "update_interval": "0ep"}, TimeError, "update_interval must be above 0"),
        ({"half_life": "1ep", "update_interval": "1.5ep"}, TimeError, "whole number"),
        ({"ema_start": "-1ep"}, TimeError, "-1ep"),
    ],
    ids=loops.label,
)
def test_arguments_that_make_no_sense_are_a_value_error(arguments, error, words):
    with pytest.raises(error, match=words) as caught:
        EMA(**arguments)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("smoothing", [1.5, -0.5, math.nan, math.inf])
def test_compute_ema_refuses_smoothing_outside_zero_to_one_and_changes_nothing(smoothing):
    model, average = loops.perceptron(0), loops.perceptron(1)
    before = loops.bits(average)
    with pytest.raises(ProfileError, match=r"\[0, 1\]"):
        compute_ema(model, average, smoothing)
    assert loops.differences(before, loops.bits(average)) == []


# Row 9


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("small", torch.tensor([7], dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mask.logical_not_()
            self.small += 1
        return self.layer(x)


def test_integer_and_bool_buffers_of_the_average_are_those_of_the_last_update():
    model = Counting()
    ema, attached, _ = averaging(model, EMA("1000ba"), n=61)
    online = loops.bits(model)
    model(torch.zeros(4, 6))  # counted by the model, and no update
    average = loops.averaged(ema)
    assert average["layer.1.num_batches_tracked"].item() == 61
    assert average["small"].item() == 68
    for name in ("layer.1.num_batches_tracked", "mask", "small"):
        assert loops.differences(online[name], average[name]) == []
    assert not torch.equal(online["layer.1.running_mean"], average["layer.1.running_mean"])
    with attached.applied():
        assert model.layer[1].num_batches_tracked.item() == 61


def test_compute_ema_copies_integer_and_bool_buffers():
    model, average = Counting(), Counting()
    model.small.fill_(100)
    model.mask.copy_(torch.tensor([False, True]))
    compute_ema(model, average, smoothing=0.99)
    assert average.small.item() == 100
    assert average.mask.tolist() == [False, True]


# Row 10


def normal(n: int, *, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).bfloat16()


def test_the_average_of_a_bfloat16_model_follows_float64_by_default():
    begin = normal(1000)
    end = (begin.float() + 0.0525).bfloat16()
    model = Constant(begin.clone())
    ema = EMA(smoothing=0.9999)
    attached = drive(ema, model, [lambda: None] + [lambda: model.values[0].copy_(end)] * 1000)
    average = ema.ema_model.values[0].detach()
    assert average.dtype == torch.float32
    want = begin.double() + (end.double() - begin.double()) * (1 - 0.9999**1000)
    moved, should = (average.double() - begin.double()).mean().item(), (want - begin.double()).mean().item()
    assert should == pytest.approx(0.005, rel=0.02)
    assert moved == pytest.approx(should, rel=0.01)
    assert (average.double() - want).abs().max() < 0.01 * 0.005
    with attached.applied():
        assert model.values[0].dtype == torch.bfloat16
        assert torch.equal(model.values[0], average.bfloat16())
    assert torch.equal(model.values[0], end)


def test_an_average_asked_for_in_bfloat16_moves_without_bias():
    begin = normal(40_000)
    end = (begin.float() + 0.0525).bfloat16()
    model = Constant(begin.clone())
    ema = EMA(smoothing=0.9995, dtype=torch.bfloat16)
    drive(ema, model, [lambda: None] + [lambda: model.values[0].copy_(end)] * 200)
    average = ema.ema_model.values[0].detach()
    assert average.dtype == torch.bfloat16
    want = begin.double() + (end.double() - begin.double()) * (1 - 0.9995**200)
    motion = (want - begin.double()).mean().item()
    error = average.double() - want
    assert motion == pytest.approx(0.005, rel=0.02)
    # Four standard errors of the mean, which are 4 % of the motion; plain rounding is wrong by 97 %.
    margin = 4 * error.std().item() / len(error) ** 0.5
    assert margin < 0.04 * motion
    assert abs(error.mean().item()) < margin
    for sign in (begin > 0.1, begin < -0.1):  # rounding towards zero would cancel over both
        assert abs(error[sign].mean().item()) < 2 * margin


def test_a_bfloat16_average_resumes_with_the_same_roundings():
    def run(model: nn.Module, optimizer: Optimizer, seeds: range) -> None:
        for seed in seeds:
            steps(model, optimizer, 1, seed=seed)

    model = loops.perceptron().bfloat16()
    ema, attached, optimizer = averaging(model, EMA("50ba", dtype=torch.bfloat16), n=0)
    run(model, optimizer, range(20))
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict(), attached.state_dict()))
    run(model, optimizer, range(20, 40))

    loops.disturb()
    again = loops.perceptron(seed=5).bfloat16()
    other, resumed, optimizer = averaging(again, EMA("50ba", dtype=torch.bfloat16), n=0)
    for target, part in zip((again, optimizer, resumed), state, strict=True):
        target.load_state_dict(part)
    run(again, optimizer, range(20, 40))
    assert loops.differences(loops.averaged(ema), loops.averaged(other)) == []


# Row 11


@pytest.mark.parametrize("true", [np.bool_(True), 1, torch.tensor(True)], ids=repr)
def test_a_save_interval_is_asked_for_its_truth(true, tmp_path):
    ema = EMA("4ba")
    trainer = loops.train(tmp_path, ema=ema, saves=lambda state, event: true if event == "batch_checkpoint" else False)
    trainer.fit()
    files = list((tmp_path / "checkpoints").iterdir())
    assert len(files) == 18 + 1  # and the end of the run
    saved = torch.load(tmp_path / "checkpoints" / "ep2-ba18.pt", weights_only=True)
    assert loops.differences(saved["model"], loops.averaged(ema)) == []
    assert saved["model_holds"].startswith("averaged")


# Row 12


def test_a_checkpoint_taken_up_without_the_ema_gives_training_weights_and_warns(tmp_path):
    trainer = loops.train(tmp_path, ema=EMA("4ba"))
    trainer.fit()
    path = tmp_path / "checkpoints" / "ep3-ba18.pt"
    with pytest.warns(PlanWarning, match=r"EMA.*training weights"):
        without = loops.train(tmp_path, load_path=path)
    assert loops.differences(loops.bits(trainer.state.model), loops.bits(without.state.model)) == []
    with pytest.warns(PlanWarning, match=r"4, 'ba'.*9, 'ba'"):
        loops.train(tmp_path, ema=EMA("9ba"), load_path=path)


# Row 13


def test_a_parameter_unfrozen_on_the_way_joins_the_average_from_its_value_then():
    model = loops.perceptron()
    model[0].requires_grad_(False)
    frozen = loops.bits(model)["0.weight"]
    ema = EMA("2ba")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    attached = attach(ema, model, optimizer)
    steps(model, optimizer, 3)
    assert "0.weight" not in ema.state_dict()["ema_model"]
    model[0].requires_grad_(True)
    want, kept = None, 0.5**0.5
    for i in range(4):
        steps(model, optimizer, 1, seed=i)
        now = model[0].weight.detach().double()
        want = now if want is None else kept * want + (1 - kept) * now
    assert not torch.equal(model[0].weight, frozen)
    torch.testing.assert_close(ema.ema_model[0].weight.double(), want, rtol=1e-6, atol=1e-7)
    training = loops.bits(model)
    with attached.applied():
        assert torch.equal(model[0].weight, loops.averaged(ema)["0.weight"])
        assert not torch.equal(model[0].weight, training["0.weight"])
    assert loops.differences(training, loops.bits(model)) == []


@pytest.mark.parametrize(("one", "other"), [((1, 4), (4, 4)), ((4, 4), (1, 4)), ((4,), (4, 1))])
def test_shapes_that_would_broadcast_are_refused(one, other):
    model, average = Constant(torch.ones(one)), Constant(torch.zeros(other))
    with pytest.raises(MismatchError, match=re.escape(f"expected shape {one}, got {other}")):
        compute_ema(model, average, 0.5)
    assert not any(p.any() for p in average.parameters())


def test_an_averaged_tensor_that_changes_its_shape_is_refused():
    model = Constant(torch.ones(4, 4))
    ema = EMA("2ba")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    attach(ema, model, optimizer)
    model.values[0].grad = torch.zeros(4, 4)
    optimizer.step()
    model.values[0] = nn.Parameter(torch.ones(1, 4))
    with pytest.raises(MismatchError, match=re.escape("(4, 4)")):
        optimizer.step()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_a_step_with_nan_or_inf_is_kept_out_of_the_average_counted_and_reported(dtype, bad):
    model = Constant(torch.ones(3), torch.ones(2))
    ema = EMA("1ba", dtype=dtype)

    def set_to(value: float) -> Callable[[], None]:
        return lambda: [p.fill_(value) for p in model.parameters()]

    def spoil() -> None:
        set_to(2.0)()
        model.values[0][1] = bad

    attached = drive(ema, model, [set_to(1.0), set_to(1.0), spoil, set_to(3.0)])
    # Value by value: those that were finite have taken in the 2.
    assert ema.ema_model.values[0].tolist() == [2.25, 2.0, 2.25]
    assert ema.ema_model.values[1].tolist() == [2.25, 2.25]
    assert ema.num_quarantined == 1
    with pytest.warns(QuarantineWarning, match="1 tensors"), attached.applied():
        pass
    with attached.applied():  # told once
        pass
    assert ema.state_dict()["num_quarantined"] == 1


def test_a_loss_that_is_nan_once_does_not_spoil_the_average_of_a_run(tmp_path):
    class Spoil(polyak.Callback):
        # Algorithms come before callbacks, so the average sees what this one repairs.
        def batch_start(self, state, logger):
            if state.timestamp.batch.value == 4:
                self.kept = loops.bits(state.model)
                state.model[0].weight.detach().fill_(math.nan)

        def batch_end(self, state, logger):
            if state.timestamp.batch.value == 5:
                state.model.load_state_dict(self.kept)

    ema = EMA("4ba")
    with pytest.warns(QuarantineWarning, match=r"\d tensors with NaN or inf"):
        loops.train(tmp_path, ema=ema, callbacks=(Spoil(),), saves=None).fit()
    assert ema.num_quarantined >= 1
    assert all(tensor.isfinite().all() for tensor in loops.averaged(ema).values())


# Row 14


def composer_compute_ema(model: nn.Module, ema_model: nn.Module, smoothing: float) -> None:
    """Composer's own arithmetic."""
    with torch.no_grad():
        for average, tensor in zip(ema_model.parameters(), model.parameters(), strict=True):
            average.copy_(average * smoothing + (1.0 - smoothing) * tensor.detach())


class Allocations(TorchDispatchMode):
    """Counts the elements of the new tensors that operations make. What is made is written and read once more."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        if writes(func) and not func._schema.is_mutable and isinstance(result, Tensor):
            self.elements += result.numel()
        return result


def test_compute_ema_does_not_copy_the_tensors_that_it_averages():
    # Composer's three temporaries a tensor are what makes it 18 times as slow; benchmarks/ has the times.
    model, average = (nn.ParameterList(torch.randn(400_000) for _ in range(4)) for _ in range(2))
    with Allocations() as composers:
        composer_compute_ema(model, average, 0.9)
    assert composers.elements >= 3 * 1_600_000
    with Allocations() as ours:
        compute_ema(model, average, 0.9)
    assert ours.elements < 100


# Row 15


def test_the_default_half_life_on_a_short_run_warns_with_the_share_of_the_first_weights():
    with pytest.warns(PlanWarning, match=r"98\.7%.*20ba.*1000, 'ba'.*unbiased=True"):
        fit("20ba", EMA())


def test_the_unbiased_profile_forgets_the_first_weights_and_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit("20ba", EMA(profile=HalfLife("1000ba", unbiased=True)))


def share_of_the_first_weights(max_duration: str, ema: EMA, epoch: int) -> float:
    """Measure it: the weights are 1 until averaging has begun, and 0 from then on."""

    class Set(polyak.Callback):
        def run_event(self, event: Event, state: Any, logger: Any) -> None:
            del logger
            if event.is_inner:
                return  # autograd needs the weights that the batch began with
            # Algorithms come first, so this is what the next event sees.
            for parameter in state.model.parameters():
                parameter.detach().fill_(0.0 if ema.ema_started else 1.0)

    model = loops.perceptron()
    Trainer(
        model,
        DataLoader(loops.dataset(epoch), batch_size=loops.BATCH),
        max_duration,
        algorithms=[ema],
        callbacks=Set(),
        optimizers=torch.optim.SGD(model.parameters(), lr=0.0),
        loss=nn.functional.cross_entropy,
        progress_bar=False,
    ).fit()
    return ema.ema_model[0].weight.mean().item()


# Runs over epochs of ten batches, of which the first weights keep more than half, and all of it in some.
PLANS = [
    ("20ba", {"half_life": "1000ba"}),
    ("20ba", {"half_life": "50ba", "ema_start": "7ba"}),
    ("25ba", {"half_life": "30ba", "update_interval": "10ba"}),
    ("20ba", {"smoothing": 0.99}),
    ("20ba", {"smoothing": 0.8, "update_interval": "10ba"}),
    ("3ep", {"smoothing": 0.8, "update_interval": "1ep"}),
    ("3ep", {"half_life": "5ep"}),
    ("25ba", {"half_life": "2ep"}),
    ("15ba", {"half_life": "0.2ep", "update_interval": "1ep"}),
    ("2ep", {"half_life": "3dur"}),
    ("2ep", {"half_life": "20ba", "ema_start": "0.5dur"}),
    ("3ep", {"half_life": "3ep", "update_interval": "1ba", "ema_start": "1ep"}),
]
NO_WARNING = [
    ("20ba", {"smoothing": 0.6, "update_interval": "10ba"}),
    ("20ba", {"half_life": "10ba"}),
    ("3ep", {"half_life": "1ep"}),
    ("3ep", {"half_life": "1ep", "update_interval": "3ba"}),
    ("2ep", {"half_life": "infba"}),
]


@pytest.mark.filterwarnings("ignore:the average was not updated:polyak.PlanWarning")
@pytest.mark.parametrize(("max_duration", "plan"), PLANS, ids=str)
def test_the_share_that_the_warning_names_is_the_share_that_comes(max_duration, plan):
    with pytest.warns(PlanWarning, match="the first weights") as caught:
        share = share_of_the_first_weights(max_duration, EMA(**plan), epoch=10)
    named = [float(found[1]) / 100 for w in caught if (found := re.search(r"([\d.]+)\s?%", str(w.message)))]
    assert named == [pytest.approx(share, abs=0.0006)]


@pytest.mark.parametrize(("max_duration", "plan"), NO_WARNING, ids=str)
def test_a_plan_that_can_be_meant_does_not_warn(max_duration, plan):
    share = share_of_the_first_weights(max_duration, EMA(**plan), epoch=10)
    assert share <= 0.5 or plan["half_life"] == "infba"

import io
import json
import math
import resource
import stat
import time
import warnings
from pathlib import Path
from typing import Any

import loops
import numpy as np
import pytest
import torch
import torchmetrics
from loops import BATCH, EPOCH
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from polyak import (
    EMA,
    Algorithm,
    Callback,
    CheckpointSaver,
    ConsoleLogger,
    Event,
    JSONLinesLogger,
    LoanError,
    PlanWarning,
    ProgressBar,
    TensorBoardLogger,
    TimeError,
    Trainer,
)


class Trace(Callback):
    """Keeps the events that come, those inside a batch only if asked to."""

    def __init__(self, *, inner: bool = False) -> None:
        self.events: list[str] = []
        self._inner = inner

    def run_event(self, event: Event, state: Any, logger: Any) -> None:
        del state, logger
        if self._inner or not event.is_inner:
            self.events.append(event.value)


def batches(n: int = EPOCH, seed: int = 0) -> DataLoader:
    return DataLoader(loops.dataset(n, seed=seed), batch_size=BATCH)


def build(max_duration: str | None = "2ep", n: int = 2, **options: Any) -> Trainer:
    """A trainer of few batches, with nothing on."""
    torch.set_num_threads(1)
    model = options.pop("model", None) or loops.perceptron()
    options = {
        "train_dataloader": batches(n),
        "optimizers": torch.optim.SGD(model.parameters(), lr=0.1),
        "loss": cross_entropy,
        "progress_bar": False,
    } | options
    return Trainer(model=model, max_duration=max_duration, **options)


def never_runs_away(limit: int) -> Callback:
    class Limit(Callback):
        seen = 0

        def batch_end(self, state, logger):
            self.seen += 1
            if self.seen > limit:
                raise RecursionError(f"the run went on after {limit} batches")

    return Limit()


# Events

INIT = ["init", "before_load", "after_load"]
EVAL = ["eval_before_all", "eval_start", "eval_end", "eval_after_all"]
SAVE = ["save_start", "save_end"]


def test_the_events_of_a_run_come_in_composers_order(tmp_path):
    trace = Trace()
    trainer = build(eval_dataloader=batches(1), callbacks=[trace, CheckpointSaver(tmp_path, "1ep")])
    assert trace.events == INIT
    trainer.fit()
    batch = ["batch_start", "batch_end", "batch_checkpoint"]
    epoch = ["epoch_start", *batch, *batch, "epoch_end", *EVAL, "epoch_checkpoint", *SAVE]
    assert trace.events == [*INIT, "fit_start", "iteration_start", *epoch, *epoch, "fit_end"]


def test_evaluation_and_saving_in_batches_come_between_the_end_and_the_checkpoint_of_a_batch(tmp_path):
    trace = Trace()
    callbacks = [trace, CheckpointSaver(tmp_path, "2ba")]
    build("4ba", 3, eval_dataloader=batches(1), eval_interval="2ba", callbacks=callbacks).fit()
    one = ["batch_start", "batch_end", "batch_checkpoint"]
    due = ["batch_start", "batch_end", *EVAL, "batch_checkpoint", *SAVE]
    want = ["epoch_start", *one, *due, *one, "epoch_end", "epoch_checkpoint", "epoch_start", *due]
    assert trace.events == [*INIT, "fit_start", "iteration_start", *want, "fit_end"]


def test_each_data_set_of_an_evaluation_has_a_start_and_an_end():
    trace = Trace()
    loaders = {"one": batches(1), "two": batches(1)}
    trainer = build("1ba", eval_dataloader=loaders, callbacks=trace, eval_weights="both")
    trainer.fit()
    passes = ["eval_start", "eval_end"] * 2
    # None was due: the last one comes after the end.
    end = ["batch_checkpoint", "fit_end", "eval_before_all", *passes, "eval_after_all"]
    assert trace.events[-len(end) :] == end
    trace.events.clear()
    trainer.eval()
    assert trace.events == ["eval_standalone_start", *passes, "eval_standalone_end"]
    trace.events.clear()
    trainer.predict([torch.zeros(1, 6)])
    assert trace.events == ["predict_start", "predict_end"]


def test_raw_weights_are_not_evaluated_while_the_model_holds_the_average():
    ema = EMA("1ba")
    trainer = build("2ba", eval_dataloader=batches(1), algorithms=ema, eval_weights="both")
    trainer.fit()
    ema.get_ema_model(trainer.state.model)
    with pytest.raises(LoanError, match="the raw weights must be in the model to be evaluated"):
        trainer.eval()
    ema.get_training_model(trainer.state.model)
    assert any("eval_raw/" in name for name in trainer.eval())


def test_a_run_that_ends_inside_an_epoch_fires_no_end_of_epoch():
    trace = Trace()
    trainer = build("3ba", callbacks=trace)
    trainer.fit()
    assert trace.events.count("epoch_start") == 2
    assert trace.events.count("epoch_end") == trace.events.count("epoch_checkpoint") == 1
    assert trace.events[-2:] == ["batch_checkpoint", "fit_end"]
    assert trainer.state.timestamp.epoch.value == 1
    assert trainer.state.timestamp.batch_in_epoch.value == 1


def test_a_run_is_not_evaluated_twice_at_one_batch():
    trace = Trace()
    build("4ba", 2, eval_dataloader=batches(1), eval_interval="2ba", callbacks=trace).fit()
    assert trace.events.count("eval_start") == 2


def test_loading_fires_its_events_between_set_up_and_fit(tmp_path):
    build("1ba").save_checkpoint(tmp_path / "x.pt")
    trace = Trace()
    build("1ba", callbacks=trace, load_path=tmp_path / "x.pt")
    assert trace.events == ["init", "before_load", "after_load"]


BEFORE_FIT = (Event.INIT, Event.BEFORE_LOAD, Event.AFTER_LOAD)
NEVER_IN_FIT = (*BEFORE_FIT, Event.ITERATION_END, Event.ITERATION_CHECKPOINT, Event.EXCEPTION)


@pytest.mark.parametrize("at", [event for event in Event if event not in NEVER_IN_FIT])
def test_an_exception_anywhere_fires_its_event_last_and_once(at, tmp_path):
    trace = Trace()
    error = RuntimeError("here")
    trainer = build(
        "2ba",
        eval_dataloader=batches(1),
        callbacks=[trace, loops.Raises(at, error), CheckpointSaver(tmp_path, "1ba")],
    )
    with pytest.raises(RuntimeError, match="here"):
        trainer.fit()
        trainer.eval()
        trainer.predict([torch.zeros(1, 6)])
    if at.is_predict:
        assert trace.events[-1] == "predict_end"
    else:
        assert trace.events.count("exception") == 1
        assert trace.events[-1] == "exception"


def test_algorithms_come_before_callbacks_and_loggers_last():
    order = []

    class Act(Algorithm):
        def match(self, event, state):
            return event is Event.BATCH_END

        def apply(self, event, state, logger):
            order.append("algorithm")

    class Follow(Callback):
        def batch_end(self, state, logger):
            order.append("callback")

    class Log(ConsoleLogger):
        def batch_end(self, state, logger):
            order.append("logger")

    build("1ba", algorithms=Act(), callbacks=Follow(), loggers=Log(io.StringIO())).fit()
    assert order == ["algorithm", "callback", "logger"]


# The clock


def test_the_clock_counts_batches_samples_tokens_and_epochs():
    trainer = build("3ba", num_samples=lambda batch: len(batch[1]), num_tokens=lambda batch: 10 * len(batch[1]))
    trainer.fit()
    now = trainer.state.timestamp
    assert (now.batch.value, now.sample.value, now.token.value, now.epoch.value) == (3, 12, 120, 1)
    assert (now.sample_in_epoch.value, now.token_in_epoch.value) == (4, 40)
    assert now.total_wct.value > 0


@pytest.mark.parametrize("duration", ["3ba", "12sp", "24tok", "9sp"])
def test_a_run_ends_at_its_duration_in_any_unit(duration):
    trainer = build(duration, num_tokens=lambda batch: 8)
    trainer.fit()
    assert trainer.state.timestamp.batch.value == 3


@pytest.mark.slow
def test_a_run_measured_in_seconds_ends():
    class Slow(Callback):
        def batch_start(self, state, logger):
            time.sleep(0.3)

    trainer = build("1sec", callbacks=Slow())
    trainer.fit()
    assert trainer.state.timestamp.total_wct.value >= 1
    assert 0 < trainer.state.timestamp.batch.value < 5


@pytest.mark.parametrize("duration", ["10tok", "1iter"])
def test_a_duration_in_an_uncounted_unit_is_refused(duration):
    with pytest.raises(ValueError, match=r"num_tokens|iter"):
        build(duration, callbacks=never_runs_away(20)).fit()


def test_an_algorithm_that_is_appended_with_an_uncounted_unit_is_refused_before_the_first_batch(tmp_path) -> None:
    trainer = loops.train(tmp_path)
    trainer.state.algorithms[:] = [EMA("4ba", update_interval="8tok")]
    with pytest.raises(TimeError, match="update_interval='8tok'"):
        trainer.fit()
    assert trainer.state.timestamp.batch == 0


@pytest.mark.parametrize("option", ["eval_interval", "log_interval", "save_interval"])
def test_an_interval_in_an_uncounted_unit_is_refused(option, tmp_path):
    options: dict[str, Any] = {"eval_dataloader": batches(1)}
    if option == "save_interval":
        options["callbacks"] = CheckpointSaver(tmp_path, "10tok")
    else:
        options[option] = "10tok"
    with pytest.raises(ValueError, match="num_tokens"):
        build("2ba", **options).fit()


# Metrics


def by_hand(weights: dict[str, Tensor], data: DataLoader) -> tuple[float, float]:
    model = loops.perceptron()
    outputs = functional_call(model, weights, (data.dataset.tensors[0],))
    targets = data.dataset.tensors[1]
    return cross_entropy(outputs, targets).item(), (outputs.argmax(1) == targets).float().mean().item()


def test_raw_and_averaged_metrics_are_those_of_the_training_and_averaged_weights(tmp_path):
    recorder, seen = loops.Recorder(), {}
    data = DataLoader(loops.dataset(3, seed=5), batch_size=5)  # the last batch is smaller

    class Keep(Callback):
        def eval_after_all(self, state, logger):
            seen[state.timestamp.batch.value] = state.eval_metrics

    trainer = build(
        "8ba",
        n=4,
        algorithms=EMA("4ba"),
        eval_dataloader=data,
        eval_interval="3ba",
        eval_weights="both",
        metrics={"accuracy": loops.Accuracy()},
        callbacks=[recorder, Keep()],
        loggers=JSONLinesLogger(tmp_path / "log"),
    )
    trainer.fit()
    assert list(seen) == [3, 6, 8]
    average: dict[str, Tensor] = {}
    kept = 0.5**0.25
    for batch, weights in recorder.weights.items():
        now = {name: tensor.double() for name, tensor in weights.items()}
        average = {name: kept * average[name] + (1 - kept) * now[name] for name in now} if average else now
        if batch in seen:
            raw_loss, raw_accuracy = by_hand(weights, data)
            loss, accuracy = by_hand({name: tensor.float() for name, tensor in average.items()}, data)
            want = {
                "eval/loss": loss,
                "eval/accuracy": accuracy,
                "eval_raw/loss": raw_loss,
                "eval_raw/accuracy": raw_accuracy,
            }
            assert seen[batch] == pytest.approx(want, rel=1e-5)
            assert loss != pytest.approx(raw_loss, rel=1e-4)
    logged = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert {line["batch"]: line["eval/loss"] for line in logged if "eval/loss" in line} == {
        batch: metrics["eval/loss"] for batch, metrics in seen.items()
    }


def test_evaluation_runs_in_eval_mode_without_gradients_and_restores_the_mode_of_each_module():
    modes = []

    class Watch(nn.Sequential):
        def forward(self, x):
            modes.append((self.training, torch.is_grad_enabled()))
            return super().forward(x)

    model = Watch(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    trainer = build("1ba", model=model, eval_dataloader=batches(1))
    model.train()
    model[1].eval()
    trainer.eval()
    trainer.predict([torch.zeros(1, 6)])
    assert modes == [(False, False), (False, False)]
    assert [module.training for module in model.modules()] == [True, True, False, True]


def test_a_metric_of_torchmetrics_works():
    metric = torchmetrics.classification.MulticlassAccuracy(num_classes=3, average="micro")
    ours = loops.Accuracy()
    trainer = build(eval_dataloader=batches(3, seed=2), metrics={"theirs": metric, "ours": ours})
    trainer.fit()
    metrics = trainer.eval()
    assert metrics["eval/theirs"] == pytest.approx(metrics["eval/ours"])
    collection = torchmetrics.MetricCollection({"accuracy": metric})
    assert build(eval_dataloader=batches(3, seed=2), metrics=collection).eval()["eval/accuracy"] >= 0


def test_eval_takes_other_data_and_returns_metrics_by_name():
    trainer = build(algorithms=EMA("1ba"))
    trainer.fit()
    one, two = batches(1, seed=3), batches(1, seed=4)
    assert set(trainer.eval(one)) == {"eval/loss"}
    both = trainer.eval({"one": one, "two": two})
    assert set(both) == {"one/loss", "two/loss"}
    average = loops.averaged(trainer.state.algorithms[0])
    assert both["two/loss"] == pytest.approx(by_hand(average, two)[0], rel=1e-5)


def test_eval_before_fit_evaluates_the_initial_weights():
    model = loops.perceptron()
    data = batches(1, seed=3)
    assert build(model=model, algorithms=EMA("1ba")).eval(data)["eval/loss"] == pytest.approx(
        by_hand(loops.bits(model), data)[0], rel=1e-6
    )


def test_predict_uses_the_averaged_weights_and_restores_the_training_weights():
    ema = EMA("2ba")
    trainer = build(algorithms=ema)
    trainer.fit()
    training = loops.bits(trainer.state.model)
    inputs, targets = loops.dataset(2).tensors
    outputs = trainer.predict([inputs[:4], (inputs[4:], targets[4:])])
    want = functional_call(trainer.state.model, loops.averaged(ema), (inputs,))
    torch.testing.assert_close(torch.cat(outputs), want)
    assert not torch.allclose(trainer.state.model(inputs), want)
    assert loops.differences(training, loops.bits(trainer.state.model)) == []


# Models with their own loss


class Own(nn.Module):
    """In the shape of a ComposerModel, with batches that are mappings."""

    def __init__(self) -> None:
        super().__init__()
        self.net = loops.perceptron()
        self.calls: list[str] = []

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.net(batch["x"])

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return cross_entropy(outputs, batch["y"])

    def eval_forward(self, batch: dict[str, Tensor], outputs: Tensor | None = None) -> Tensor:
        self.calls.append("eval_forward")
        return self.forward(batch) if outputs is None else outputs

    def update_metric(self, batch: dict[str, Tensor], outputs: Tensor, metric: Any) -> None:
        self.calls.append("update_metric")
        metric.update(outputs, batch["y"])


def mappings(loader: DataLoader) -> list[dict[str, Tensor]]:
    return [{"x": x, "y": y} for x, y in loader]


def test_a_model_with_its_own_loss_trains_as_the_plain_one_does():
    plain = build(algorithms=EMA("2ba"), eval_dataloader=batches(2, seed=5), metrics={"accuracy": loops.Accuracy()})
    own = Own()
    trainer = build(
        model=own,
        loss=None,
        train_dataloader=mappings(batches(2)),
        eval_dataloader=mappings(batches(2, seed=5)),
        optimizers=torch.optim.SGD(own.parameters(), lr=0.1),
        algorithms=EMA("2ba"),
        metrics={"accuracy": loops.Accuracy()},
    )
    plain.fit()
    trainer.fit()
    assert loops.differences(loops.bits(plain.state.model), loops.bits(own.net)) == []
    assert trainer.state.eval_metrics == plain.state.eval_metrics
    assert own.calls == ["eval_forward", "update_metric"] * 4
    assert loops.differences(plain.predict([loops.dataset(1).tensors[0]]), trainer.predict(mappings(batches(1)))) == []


def test_the_example_of_the_mission_runs_unchanged():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = loops.perceptron()

        def forward(self, batch):
            inputs, _ = batch
            return self.net(inputs)

        def loss(self, outputs, batch):
            _, targets = batch
            return cross_entropy(outputs, targets)

    model = Model()
    train_dataloader, eval_dataloader = batches(20), batches(2, seed=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    algorithm = EMA(half_life="1000ba", update_interval="1ba")
    trainer = Trainer(
        model=model,
        train_dataloader=train_dataloader,
        eval_dataloader=eval_dataloader,
        max_duration="1ep",
        algorithms=[algorithm],
        optimizers=[optimizer],
    )
    with pytest.warns(PlanWarning, match=r"98\.7%.*20ba.*1000"):
        trainer.fit()
    assert algorithm.smoothing == pytest.approx(0.5**0.001)
    assert algorithm.num_updates == 19
    average = {name.removeprefix("net."): tensor for name, tensor in loops.averaged(algorithm).items()}
    assert trainer.state.eval_metrics["eval/loss"] == pytest.approx(by_hand(average, eval_dataloader)[0], rel=1e-5)
    assert algorithm.training_model is model


def test_the_example_of_the_mission_does_not_warn_on_a_run_that_is_long_enough():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer = build("1100ba", n=2, algorithms=[EMA(half_life="1000ba", update_interval="1ba")])
        trainer.fit()


# The batch: accumulation, precision, schedulers


class Steps:
    """Counts the steps of an optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.n = 0
        optimizer.register_step_post_hook(self._count)

    def _count(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        del optimizer, args, kwargs
        self.n += 1


@pytest.mark.parametrize("parts", [2, 3, 4, 100])
def test_gradient_accumulation_trains_as_on_the_full_batch(parts):
    def run(grad_accum: int) -> tuple[dict[str, Tensor], dict[str, Tensor], int, list[float]]:
        model, ema, recorder = loops.perceptron(), EMA("2ba"), loops.Recorder()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        steps = Steps(optimizer)
        data = DataLoader(loops.dataset(5), batch_size=7)  # 7, 7, 6: not all divide
        build(
            model=model,
            train_dataloader=data,
            optimizers=optimizer,
            grad_accum=grad_accum,
            algorithms=ema,
            callbacks=recorder,
        ).fit()
        return loops.bits(model), loops.averaged(ema), steps.n, recorder.losses

    whole, split = run(1), run(parts)
    assert whole[2] == split[2] == 6
    assert split[3] == pytest.approx(whole[3], rel=1e-5)
    for one, other in zip(whole[:2], split[:2], strict=True):
        for name in one:
            torch.testing.assert_close(one[name], other[name])


def infinite_at(*batches: int) -> Any:
    """A loss whose gradient is infinite at these batches, counted from 0."""
    seen = iter(range(1_000_000))

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs, targets) * (math.inf if next(seen) in batches else 1.0)

    return loss


@pytest.mark.parametrize("skipped", [(2,), (0,), (0, 1, 2), (3, 4)], ids=str)
def test_a_step_that_mixed_precision_skips_is_not_counted(skipped):
    model, ema, trace, recorder = loops.perceptron(), EMA("2ba"), Trace(), loops.Recorder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps = Steps(optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    trainer = build(
        "5ba",
        n=4,
        model=model,
        optimizers=optimizer,
        schedulers=scheduler,
        step_schedulers_every_batch=True,
        algorithms=ema,
        callbacks=[trace, recorder],
        precision="amp_fp16",
        loss=infinite_at(*skipped),
    )
    trainer.fit()
    assert trace.events.count("batch_end") == 5 + len(skipped)
    assert trainer.state.timestamp.batch.value == 5
    assert steps.n == 5
    assert ema.num_updates == 4
    assert optimizer.param_groups[0]["lr"] == 0.1 * 0.5**5
    assert all(tensor.isfinite().all() for tensor in loops.bits(model).values())
    average: dict[str, Tensor] = {}
    for weights in (weights for batch, weights in recorder.weights.items() if batch > 0):
        now = {name: tensor.double() for name, tensor in weights.items()}
        average = {n: 0.5**0.5 * average[n] + (1 - 0.5**0.5) * now[n] for n in now} if average else now
    for name, tensor in loops.averaged(ema).items():
        torch.testing.assert_close(tensor.double(), average[name], rtol=1e-6, atol=1e-7)


def test_a_run_in_which_every_step_is_skipped_ends_with_an_error():
    with pytest.raises(RuntimeError, match="gradients must be finite"):
        build("5ba", precision="amp_fp16", loss=infinite_at(*range(1000)), callbacks=never_runs_away(500)).fit()


@pytest.mark.parametrize("precision", ["amp_bf16", "amp_fp16"])
def test_training_evaluation_and_prediction_use_mixed_precision(precision):
    dtypes = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        dtypes.append(outputs.dtype)
        return cross_entropy(outputs.float(), targets)

    trainer = build("1ba", precision=precision, loss=loss, eval_dataloader=batches(1))
    trainer.fit()
    outputs = trainer.predict([torch.zeros(1, 6)])
    want = torch.bfloat16 if precision == "amp_bf16" else torch.float16
    assert [*dtypes, outputs[0].dtype] == [want, want, want]


@pytest.mark.parametrize(("every_batch", "want"), [(True, [0, 1, 2, 3, 4, 5]), (False, [0, 0, 0, 1, 1, 1])])
def test_schedulers_step_by_the_batch_or_the_epoch(every_batch, want):
    model = loops.perceptron()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    rates = []

    class Watch(Callback):
        def batch_start(self, state, logger):
            rates.append(optimizer.param_groups[0]["lr"])

    build(
        n=3,
        model=model,
        optimizers=optimizer,
        schedulers=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step),
        step_schedulers_every_batch=every_batch,
        callbacks=Watch(),
    ).fit()
    assert rates == [0.5**n for n in want]


def test_several_optimizers_and_schedulers_all_step():
    model = loops.perceptron()
    optimizers = [torch.optim.SGD(model[i].parameters(), lr=1.0) for i in (0, 2)]
    before = loops.bits(model)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) for optimizer in optimizers]
    build("1ep", model=model, optimizers=optimizers, schedulers=schedulers).fit()
    assert all(not torch.equal(tensor, before[name]) for name, tensor in loops.bits(model).items())
    assert [optimizer.param_groups[0]["lr"] for optimizer in optimizers] == [0.5, 0.5]


def test_runs_with_the_same_seed_are_equal_and_with_another_differ():
    def run(seed: int) -> dict[str, Tensor]:
        data = DataLoader(loops.Noisy(), batch_size=4, shuffle=True)
        trainer = build("1ep", model=loops.noisy_perceptron(), train_dataloader=data, seed=seed)
        trainer.fit()
        return loops.bits(trainer.state.model)

    assert loops.differences(run(1), run(1)) == []
    assert loops.differences(run(1), run(2))


# Checkpoints


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("interval", "want"),
    [
        ("1ep", ["ep1-ba3.pt", "ep2-ba6.pt"]),
        ("2ep", ["ep2-ba6.pt"]),
        ("2ba", ["ep0-ba2.pt", "ep1-ba4.pt", "ep1-ba6.pt"]),
        ("8sp", ["ep0-ba2.pt", "ep1-ba4.pt", "ep1-ba6.pt"]),
        ("9sp", ["ep0-ba3.pt", "ep1-ba5.pt"]),
        ("0.5dur", ["ep0-ba3.pt", "ep1-ba6.pt"]),
        ("100ba", []),
    ],
)
def test_a_saver_saves_each_interval_and_at_the_end(interval, want, tmp_path):
    build(n=3, callbacks=CheckpointSaver(tmp_path, interval)).fit()
    end = {"ep1-ba6.pt", "ep2-ba6.pt"}
    assert set(names(tmp_path)) - end == set(want) - end
    assert "ep2-ba6.pt" in names(tmp_path)


def test_an_interval_of_a_tenth_of_the_run_is_due_ten_times(tmp_path):
    trace, ema = Trace(), EMA("2ba", update_interval="0.1dur")
    trainer = build("10ba", n=5, eval_dataloader=batches(1), eval_interval="0.1dur", callbacks=trace, algorithms=ema)
    trainer.fit()
    assert trace.events.count("eval_start") == 10
    assert ema.num_updates == 9


@pytest.mark.parametrize("true", [True, np.bool_(True), 1], ids=repr)
def test_a_function_decides_when_to_save(true, tmp_path):
    asked = []

    def when(state: Any, event: Event) -> Any:
        asked.append(event)
        return true if state.timestamp.batch.value == 2 and event is Event.BATCH_CHECKPOINT else np.bool_(False)

    build("5ba", n=3, callbacks=CheckpointSaver(tmp_path, when)).fit()
    assert names(tmp_path) == ["ep0-ba2.pt", "ep1-ba5.pt"]
    assert asked == [Event.BATCH_CHECKPOINT] * 3 + [Event.EPOCH_CHECKPOINT] + [Event.BATCH_CHECKPOINT] * 2


@pytest.mark.parametrize(("keep", "want"), [(1, [6]), (2, [5, 6]), (None, [1, 2, 3, 4, 5, 6])])
def test_a_saver_keeps_the_newest(keep, want, tmp_path):
    saver = CheckpointSaver(tmp_path, "1ba", keep=keep)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "ep0-best.pt").write_text("mine")
    build("6ba", n=10, callbacks=saver).fit()
    assert names(tmp_path) == sorted([f"ep0-ba{n}.pt" for n in want] + ["ep0-best.pt", "notes.txt"])
    assert saver.latest() == tmp_path / "ep0-ba6.pt"


def test_the_latest_checkpoint_is_the_one_with_most_batches_not_the_last_by_name(tmp_path):
    build("11ba", n=20, callbacks=CheckpointSaver(tmp_path, "1ba")).fit()
    assert CheckpointSaver(tmp_path).latest() == tmp_path / "ep0-ba11.pt"
    assert CheckpointSaver(tmp_path / "none").latest() is None


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
def test_a_failure_while_writing_leaves_the_old_file_and_nothing_else(error, tmp_path, monkeypatch):
    ema = EMA("2ba")
    trainer = build(algorithms=ema)
    trainer.fit()
    path = tmp_path / "folder" / "x.pt"
    trainer.save_checkpoint(path)
    before, training = path.read_bytes(), loops.bits(trainer.state.model)

    def failing(checkpoint: object, file: Any) -> None:
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(type(error)):
        trainer.save_checkpoint(path)
    assert path.read_bytes() == before
    assert names(tmp_path / "folder") == ["x.pt"]
    assert loops.differences(training, loops.bits(trainer.state.model)) == []


def test_a_full_disk_is_named_with_the_checkpoint(tmp_path):
    trainer = build()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))  # torch.save says "unexpected pos"
    try:
        with pytest.raises(OSError, match="File too large.*x.pt"):
            trainer.save_checkpoint(tmp_path / "x.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == []


def test_a_checkpoint_has_the_permissions_of_other_files(tmp_path):
    (tmp_path / "plain").touch()
    build().save_checkpoint(tmp_path / "x.pt")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "x.pt")]
    assert modes[0] == modes[1]


def test_a_checkpoint_saved_during_an_evaluation_has_both_weights(tmp_path):
    recorder = loops.Recorder()

    class Best(Callback):
        def eval_end(self, state, logger):
            state.save_checkpoint(tmp_path / "best.pt")

        def eval_start(self, state, logger):
            state.save_checkpoint(tmp_path / "start.pt")

    ema = EMA("2ba")
    trainer = build("3ba", algorithms=ema, eval_dataloader=batches(1), callbacks=[recorder, Best()])
    trainer.fit()
    assert not ema.ema_weights_active
    for name in ("best.pt", "start.pt"):
        saved = torch.load(tmp_path / name, weights_only=True)
        assert loops.differences(saved["model"], loops.averaged(ema)) == []
        assert loops.differences(saved["training_model"], recorder.weights[3]) == []
    assert loops.differences(recorder.weights[3], loops.bits(trainer.state.model)) == []


# Loggers


def test_each_json_line_is_one_object_with_the_batch(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    path.parent.mkdir()
    path.write_text("of an earlier run\n")
    recorder = loops.Recorder()
    build(
        "4ba",
        eval_dataloader=batches(1),
        log_interval="2ba",
        callbacks=recorder,
        loggers=JSONLinesLogger(path),
    ).fit()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    training = [line for line in lines if "train/loss" in line]
    assert training == [{"batch": n, "train/loss": recorder.losses[n - 1], "lr": 0.1} for n in (2, 4)]
    assert [line["batch"] for line in lines if "eval/loss" in line] == [2, 4]


def test_log_interval_may_be_in_epochs(tmp_path):
    build(loggers=JSONLinesLogger(tmp_path / "log"), log_interval="1ep").fit()
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["batch"] for line in lines if "train/loss" in line] == [2, 4]


def test_the_console_logger_prints_one_line_for_each_call(capsys):
    stream = io.StringIO()
    build("2ba", eval_dataloader=batches(1), loggers=[ConsoleLogger(stream), ConsoleLogger(only="eval")]).fit()
    lines = stream.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["[1ba]", "[2ba]", "[2ba]"]
    assert "train/loss" in lines[0]
    assert capsys.readouterr().out.splitlines() == [lines[2]]
    assert "eval/loss" in lines[2]


def test_the_tensorboard_logger_writes_scalars(tmp_path):
    recorder = loops.Recorder()
    build("3ba", eval_dataloader=batches(1), callbacks=recorder, loggers=TensorBoardLogger(tmp_path)).fit()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(recorder.losses)
    assert [event.step for event in events.Scalars("eval/loss")] == [2, 3]


def test_the_progress_bar_shows_the_progress_and_stops_on_an_exception():
    for callbacks in ([], [loops.Raises(Event.BATCH_END, RuntimeError("here"), batch=4)]):
        console = Console(file=io.StringIO(), force_terminal=True, width=100)
        bar = ProgressBar(console)
        trainer = build("2ep", eval_dataloader=batches(1), callbacks=callbacks, loggers=bar)
        if callbacks:
            with pytest.raises(RuntimeError, match="here"):
                trainer.fit()
        else:
            trainer.fit()
            assert "2/2" in console.file.getvalue().replace("2.0", "2")
        assert bar._progress is None
        assert "train/loss" in console.file.getvalue()


def test_callbacks_and_algorithms_log_at_the_current_batch():
    seen = []

    class Keep(ConsoleLogger):
        def log_metrics(self, metrics, step):
            seen.append((metrics, step))

    class Say(Callback):
        def epoch_end(self, state, logger):
            logger.log_metrics({"said": 1.0})
            logger.log_metrics({"said": 2.0}, step=77)

    build("1ep", n=3, callbacks=Say(), loggers=Keep(), log_interval="100ba").fit()
    assert seen == [({"said": 1.0}, 3), ({"said": 2.0}, 77)]


# Having the averaged model


def test_the_average_is_available_as_a_copy_and_in_the_model_in_training():
    ema = EMA("2ba")
    trainer = build(algorithms=ema)
    apart = loops.perceptron(seed=7)
    with pytest.raises(LoanError, match="begun"):
        ema.get_ema_model(apart)
    trainer.fit()
    model = trainer.state.model
    training, average = loops.bits(model), loops.averaged(ema)
    assert ema.get_ema_model(apart) is apart
    assert loops.differences(average, loops.bits(apart)) == []
    assert loops.differences(training, loops.bits(model)) == []
    assert ema.get_training_model(apart) is apart
    assert loops.differences(training, loops.bits(apart)) == []

    assert ema.get_ema_model(model) is model
    assert ema.get_ema_model(model) is model  # asked again: it has it already
    assert ema.ema_weights_active
    assert ema.ema_model is model
    assert loops.differences(average, loops.bits(model)) == []
    assert loops.differences(training, loops.bits(ema.training_model)) == []
    ema.get_training_model(apart)
    assert loops.differences(training, loops.bits(apart)) == []
    ema.get_ema_model(apart)
    assert loops.differences(average, loops.bits(apart)) == []
    with pytest.raises(LoanError, match="training must begin with training weights"):
        trainer.fit()
    assert loops.differences(average, loops.bits(model)) == []
    metrics = trainer.eval(batches(1))
    assert metrics["eval/loss"] == pytest.approx(by_hand(average, batches(1))[0], rel=1e-5)
    assert ema.get_training_model(model) is model
    assert not ema.ema_weights_active
    assert ema.training_model is model
    assert loops.differences(training, loops.bits(model)) == []
    assert loops.differences(average, loops.averaged(ema)) == []


def test_the_averaged_model_has_the_tensors_of_the_average():
    ema = EMA("2ba")
    trainer = build(algorithms=ema)
    trainer.fit()
    before = loops.averaged(ema)
    held = ema.ema_model
    assert not held.training
    assert not any(p.requires_grad for p in held.parameters())
    trainer = build("4ep", model=trainer.state.model, algorithms=ema)
    trainer.fit()
    assert ema.ema_model is not held  # made again, over the same tensors
    assert loops.differences(before, loops.bits(held))


# At the door


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss": None}, "give loss="),
        ({"model": Own()}, "needs none"),
        ({"precision": "fp8"}, "fp32, amp_bf16, amp_fp16.*'fp8'"),
        ({"eval_weights": "best"}, "'averaged', 'raw' or 'both'.*'best'"),
        ({"grad_accum": 0}, r"grad_accum .*0"),
        ({"max_duration": "0ba"}, "max_duration must be above 0"),
        ({"max_duration": "ten"}, "'ten'"),
        ({"max_duration": 1.5}, "whole number"),
        ({"max_duration": "infba"}, "infba"),
        ({"max_duration": "0.5dur"}, r"0\.5dur"),
        ({"max_duration": "1.5ep"}, "whole number"),
        ({"eval_interval": "0ba"}, "eval_interval must be above 0"),
        ({"eval_interval": "1iter"}, "iter"),
        ({"log_interval": "1.5ba"}, "log_interval must be a whole number"),
        ({"autoresume": True}, "CheckpointSaver"),
        ({"algorithms": [EMA(), EMA()]}, "there can be one"),
        ({"load_path": "nowhere.pt"}, r"nowhere\.pt"),
    ],
    ids=loops.label,
)
def test_the_trainer_refuses_a_wrong_argument(options, words):
    with pytest.raises(ValueError, match=words):
        build(**{"max_duration": "1ep"} | options)


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ({"train_dataloader": None}, "train_dataloader"),
        ({"max_duration": None}, "max_duration"),
        ({"optimizers": None}, "optimizers"),
    ],
    ids=loops.label,
)
def test_fit_names_the_missing_arguments(missing, words):
    trainer = build(**missing)
    with pytest.raises(ValueError, match=words):
        trainer.fit()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"keep": 0}, ValueError, "keep must be None or at least 1"),
        ({"save_interval": "0ep"}, TimeError, "save_interval must be above 0"),
        ({"save_interval": "often"}, TimeError, "'often'"),
        ({"save_interval": "0.5ba"}, TimeError, "whole number"),
    ],
    ids=loops.label,
)
def test_a_saver_with_a_wrong_argument_is_refused(arguments, error, words, tmp_path):
    with pytest.raises(error, match=words):
        CheckpointSaver(tmp_path, **arguments)


def test_data_without_batches_is_refused():
    for options in ({"train_dataloader": []}, {"eval_dataloader": []}):
        with pytest.raises(ValueError, match="at least one batch"):
            build(**options).fit()
    with pytest.raises(ValueError, match="eval_dataloader"):
        build().eval()


def test_a_batch_whose_samples_cannot_be_counted_is_refused_with_a_remedy():
    class Strange:
        def to(self, device: Any, non_blocking: bool = False) -> "Strange":
            return self

    model = SimpleModel()
    options = {"model": model, "loss": None, "optimizers": torch.optim.SGD(model.parameters(), lr=0.1)}
    with pytest.raises(ValueError, match="num_samples="):
        build("2ba", train_dataloader=[Strange()], **options).fit()
    trainer = build("2ba", train_dataloader=[Strange()], num_samples=lambda batch: 3, **options)
    trainer.fit()
    assert trainer.state.timestamp.sample.value == 6


class SimpleModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, batch: Any) -> Tensor:
        return self.weight

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return outputs.square().sum()


def test_a_loader_without_a_length_trains_and_has_epochs():
    class Stream:
        def __iter__(self):
            return iter(batches(3))

    ema = EMA("2ba")
    trainer = build("2ep", train_dataloader=Stream(), algorithms=ema)
    trainer.fit()
    assert (trainer.state.timestamp.batch.value, trainer.state.timestamp.epoch.value) == (6, 2)
    assert ema.num_updates == 5


@pytest.mark.parametrize("grad_accum", [1, 2])
def test_numbers_and_tensors_without_a_dimension_in_a_batch_are_no_samples(grad_accum) -> None:
    class Model(nn.Linear):
        def forward(self, batch: Any) -> Tensor:
            assert batch["scale"].shape == ()
            return super().forward(batch["inputs"]) * batch["scale"]

        def loss(self, outputs: Any, batch: Any) -> Tensor:
            return outputs.square().mean() + batch["epoch"]

    batch = {"scale": torch.tensor(2.0), "epoch": 3, "mask": None, "inputs": torch.ones(4, 3)}
    model = Model(3, 1)
    trainer = Trainer(
        model,
        [batch] * 2,
        "1ep",
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        grad_accum=grad_accum,
        progress_bar=False,
    )
    trainer.fit()
    assert trainer.state.timestamp.sample == 8

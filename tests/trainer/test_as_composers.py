"""The trainer under the names of Composer's: events inside a batch, state, evaluators, metrics, repeated fits."""

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import loops
import pytest
import torch
import torchmetrics
from paths import ROOT
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from polyak import (
    EMA,
    Algorithm,
    ArgumentError,
    Callback,
    CheckpointSaver,
    Evaluator,
    Event,
    GradientClipping,
    Time,
    TimeUnit,
    Trainer,
)
from polyak.trainer.loggers import Destination
from tests.composer_suite import units


class Trace(Callback):
    def __init__(self) -> None:
        self.events: list[str] = []

    def run_event(self, event: Event, state: Any, logger: Any) -> None:
        self.events.append(event.value)


class Kept(Destination):
    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.closed = 0

    def log_metrics(self, metrics: Any, step: int) -> None:
        self.lines.append((step, dict(metrics)))

    def close(self, state: Any, logger: Any) -> None:
        self.closed += 1

    def of(self, name: str) -> dict[int, float]:
        return {step: line[name] for step, line in self.lines if name in line}


def batches(n: int = 3, seed: int = 0) -> DataLoader:
    return DataLoader(loops.dataset(n, seed=seed), batch_size=loops.BATCH)


def build(max_duration: Any = "2ep", n: int = 3, **options: Any) -> Trainer:
    torch.set_num_threads(1)
    model = options.pop("model", None) or loops.perceptron()
    given = {
        "train_dataloader": batches(n),
        "optimizers": torch.optim.SGD(model.parameters(), lr=0.1),
        "loss": cross_entropy,
        "progress_bar": False,
    }
    return Trainer(model, max_duration=max_duration, **(given | options))


# Events

MICROBATCH = ["before_forward", "after_forward", "before_loss", "after_loss", "before_backward", "after_backward"]
BATCH = [
    *["before_dataloader", "after_dataloader", "batch_start", "before_train_batch"],
    *MICROBATCH,
    *["after_train_batch", "batch_end", "batch_checkpoint"],
]
EVAL_BATCH = ["eval_batch_start", "eval_before_forward", "eval_after_forward", "eval_batch_end"]
EVAL = ["eval_before_all", "eval_start", *EVAL_BATCH, *EVAL_BATCH, "eval_end", "eval_after_all"]
EPOCH = ["epoch_start", *BATCH, *BATCH, "before_dataloader", "epoch_end", *EVAL, "epoch_checkpoint"]
GOLDEN = ["init", "before_load", "after_load", "fit_start", "iteration_start", *EPOCH, *EPOCH, "fit_end"]


def test_the_events_inside_a_batch_come_in_composers_order():
    trace = Trace()
    trainer = build(n=2, eval_dataloader=batches(2), callbacks=trace)
    trainer.fit()
    assert trace.events == GOLDEN
    trace.events.clear()
    trainer.predict([torch.zeros(1, 6)])
    inside = ["predict_batch_start", "predict_before_forward", "predict_after_forward", "predict_batch_end"]
    assert trace.events == ["predict_start", *inside, "predict_end"]


def test_with_microbatches_the_events_of_each_come_between_those_of_the_batch():
    trace = Trace()
    build("1ba", callbacks=trace, grad_accum=2).fit()
    at = trace.events.index("before_train_batch")
    assert trace.events[at : at + 14] == ["before_train_batch", *MICROBATCH, *MICROBATCH, "after_train_batch"]


@pytest.mark.skipif(find_spec("mcli") is None, reason="Composer needs stubs: PYTHONPATH=tests/stubs")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("duration", "interval"), [("2ep", "1ep"), ("5ba", "2ba"), ("4ba", "1ep"), ("3ba", "2ep")])
def test_the_trace_of_a_run_is_that_of_composers_trainer(duration, interval):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import composer
        from composer.models import ComposerClassifier

    class Theirs(composer.Callback):
        def __init__(self) -> None:
            self.events: list[str] = []

        def run_event(self, event: Any, state: Any, logger: Any) -> None:
            self.events.append(event.value)

    theirs, ours = Theirs(), Trace()
    model = ComposerClassifier(loops.perceptron(), num_classes=3)
    composer.Trainer(
        model=model,
        train_dataloader=batches(2),
        eval_dataloader=batches(1),
        eval_interval=interval,
        max_duration=duration,
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        callbacks=[theirs],
        device="cpu",
        progress_bar=False,
    ).fit()
    build(duration, n=2, eval_dataloader=batches(1), eval_interval=interval, callbacks=ours).fit()
    assert ours.events == theirs.events


def test_the_page_has_a_row_for_each_of_composers_tests_of_time_that_differs():
    page = ROOT / "docs" / "composer.md"
    if not page.exists():
        pytest.skip("the documentation is not here")
    text = page.read_text(encoding="utf-8")
    assert [name for name in units.DIFFERENT if f"| `{name}" not in text] == []


def test_an_iteration_begins_with_the_clock_and_not_where_a_run_continues(tmp_path):
    trace = Trace()
    trainer = build("1ep", n=2, callbacks=trace)
    trainer.fit()
    trainer.fit(duration="1ep")
    trainer.save_checkpoint(tmp_path / "x.pt")
    build("3ep", n=2, callbacks=trace, load_path=tmp_path / "x.pt").fit()
    assert (trace.events.count("iteration_start"), trace.events.count("epoch_start")) == (1, 3)
    trainer.fit(duration="1ep", reset_time=True)
    assert trace.events.count("iteration_start") == 2
    assert "iteration_end" not in trace.events


def test_events_know_what_they_are_as_composers_do():
    assert Event.BATCH_START.is_before_event
    assert Event.BATCH_END.is_after_event
    assert Event.EVAL_BATCH_END.is_eval
    assert Event.PREDICT_END.is_predict
    assert Event.AFTER_FORWARD.canonical_name == Event.BEFORE_FORWARD.canonical_name == "forward"
    assert Event.BATCH_START.canonical_name == "batch"


class Doubles(Algorithm):
    """Changes batch, outputs and loss at the events where Composer's algorithms do."""

    def match(self, event: Event, state: Any) -> bool:
        return event in (Event.AFTER_DATALOADER, Event.BEFORE_FORWARD, Event.AFTER_FORWARD, Event.AFTER_LOSS)

    def apply(self, event: Event, state: Any, logger: Any) -> None:
        if event in (Event.AFTER_DATALOADER, Event.BEFORE_FORWARD):
            state.batch = (state.batch[0] * 2, state.batch[1])
        elif event is Event.AFTER_FORWARD:
            state.outputs = state.outputs * 3
        else:
            state.loss = state.loss * 5


def test_what_an_algorithm_changes_in_the_state_is_what_is_trained_on():
    model, by_hand = loops.perceptron(), loops.perceptron()
    seen: list[float] = []

    class Watch(Callback):
        def batch_end(self, state: Any, logger: Any) -> None:
            seen.append(float(state.loss))

    build("1ba", model=model, algorithms=Doubles(), callbacks=Watch()).fit()
    inputs, targets = next(iter(batches()))
    loss = 5 * cross_entropy(3 * by_hand(4 * inputs), targets)
    loss.backward()
    assert seen == [pytest.approx(loss.item())]
    for ours, want in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, want - 0.1 * want.grad)


# Clipping


@pytest.mark.parametrize("precision", ["fp32", "amp_fp16"])
@pytest.mark.parametrize("grad_accum", [1, 2])
def test_gradients_are_clipped_unscaled_and_complete_before_the_step(precision, grad_accum):
    norms: list[tuple[float, float]] = []

    class Watch(Algorithm):
        def match(self, event: Event, state: Any) -> bool:
            return event is Event.AFTER_TRAIN_BATCH

        def apply(self, event: Event, state: Any, logger: Any) -> None:
            gradients = [parameter.grad.flatten() for parameter in state.model.parameters()]
            norms.append((float(torch.cat(gradients).norm()), float(torch.cat(gradients).abs().max())))

    # After events run in reverse order: the last of the list looks before the others clip.
    class WatchBefore(Watch):
        pass

    def run(kind: str, threshold: float) -> list[tuple[float, float]]:
        norms.clear()
        algorithms = [Watch(), GradientClipping(kind, threshold), WatchBefore()]
        build("1ba", algorithms=algorithms, precision=precision, grad_accum=grad_accum).fit()
        return list(norms)

    (before, _), (after, _) = run("norm", 0.01)
    assert before == pytest.approx(run("norm", 1e9)[1][0])
    assert before > 0.1 > after == pytest.approx(0.01, rel=1e-3)
    (_, before), (_, after) = run("value", 0.01)
    assert before > 0.02 > after == pytest.approx(0.01)


@pytest.mark.parametrize(("kind", "threshold"), [("adaptive", 0.1), ("norm", 0), ("norm", -1), ("value", "1")])
def test_a_clipping_that_is_not_one_is_refused(kind, threshold):
    with pytest.raises(ArgumentError, match="clipping_t"):
        GradientClipping(kind, threshold)


# The state


def test_the_state_has_what_composers_has():
    seen: dict[str, Any] = {}

    class Look(Callback):
        def after_backward(self, state: Any, logger: Any) -> None:
            inputs, targets = state.batch
            seen["loss"] = torch.equal(state.loss, cross_entropy(state.outputs, targets))
            seen["inputs"] = inputs.shape

        def eval_start(self, state: Any, logger: Any) -> None:
            seen["eval"] = (state.dataloader_label, state.dataloader)

        def epoch_start(self, state: Any, logger: Any) -> None:
            seen["train"] = (state.dataloader_label, state.dataloader)

        def eval_batch_end(self, state: Any, logger: Any) -> None:
            seen["outputs"] = state.outputs.shape

    loader, evaluated, look, log = batches(), batches(1), Look(), Kept()
    trainer = build(
        train_dataloader=loader, eval_dataloader=evaluated, callbacks=[look], loggers=log, run_name="mine", seed=3
    )
    trainer.fit()
    state = trainer.state
    assert seen == {
        "loss": True,
        "inputs": (4, 6),
        "train": ("train", loader),
        "eval": ("eval", evaluated),
        "outputs": (4, 3),
    }
    assert state.callbacks == [look, log]
    assert (state.dataloader, state.dataloader_label, state.dataloader_len) == (loader, "train", Time(3, "ba"))
    assert (state.run_name, state.seed, state.train_dataloader is loader) == ("mine", 3, True)
    assert [one.label for one in state.evaluators] == ["eval"]
    assert TimeUnit.TOKEN not in state.counted
    assert build().state.run_name != build().state.run_name


def test_a_callback_that_joins_through_the_state_is_called():
    trainer, trace = build("1ba"), Trace()
    trainer.state.callbacks.append(trace)
    trainer.fit()
    assert "batch_end" in trace.events


@pytest.mark.parametrize("at", ["batch_start", "after_loss", "batch_end", "epoch_end", "epoch_start"])
def test_stop_training_ends_the_run_after_the_batch_and_a_later_fit_continues(at, tmp_path):
    class Stop(Callback):
        def run_event(self, event: Event, state: Any, logger: Any) -> None:
            if event == at and state.timestamp.batch >= 3 and not trace.events.count("fit_end"):
                state.stop_training()

    trace, whole, ema, again = Trace(), build("3ep"), EMA("2ba"), EMA("2ba")
    whole.state.algorithms.append(again)
    whole.fit()
    trainer = build("3ep", callbacks=[Stop(), trace, CheckpointSaver(tmp_path, "100ba")], algorithms=ema)
    trainer.fit()
    stopped = int(trainer.state.timestamp.batch)
    assert stopped == {"batch_start": 4, "after_loss": 4, "epoch_start": 4}.get(at, 3)
    assert trace.events[-1] == "fit_end"
    assert [path.name for path in tmp_path.iterdir()] == [f"ep1-ba{stopped}.pt"]
    trainer.fit()
    assert trainer.state.timestamp.batch == 9
    assert loops.differences(loops.bits(whole.state.model), loops.bits(trainer.state.model)) == []


# Durations


@pytest.mark.parametrize(("given", "want"), [(2, 6), ("5ba", 5), (Time(1, "ep"), 3)])
def test_a_number_is_epochs_wherever_a_time_is_asked_for(given, want, tmp_path):
    log = Kept()
    trainer = build(
        given, eval_dataloader=batches(1), eval_interval=1, log_interval=1, loggers=log, save_folder=tmp_path
    )
    trainer.fit()
    assert trainer.state.timestamp.batch == want
    assert list(log.of("train/loss")) == [step for step in (3, 6) if step <= want]


def test_fits_one_after_another_are_one_run():
    whole, parts = build("4ep", algorithms=EMA("1ba")), build("1ep", algorithms=EMA("1ba"))
    whole.fit()
    parts.fit()
    assert parts.state.timestamp.epoch == "1ep"
    parts.fit(duration="1ba")
    assert parts.state.timestamp.batch_in_epoch == "1ba"
    parts.fit(duration=Time(4, "ba"))
    parts.fit(duration=2)
    now = parts.state.timestamp
    assert (now.epoch, now.batch, parts.state.max_duration) == (4, 12, Time(4, "ep"))
    assert loops.differences(loops.bits(whole.state.model), loops.bits(parts.state.model)) == []


def test_a_fit_from_a_clock_that_is_set_back_trains_for_the_duration_again():
    trainer = build("1ep")
    trainer.fit()
    trainer.fit(reset_time=True)
    assert trainer.state.timestamp.epoch == 1
    trainer.fit(reset_time=True, duration="2ep")
    assert (trainer.state.timestamp.epoch, trainer.state.timestamp.batch) == (2, 6)


def test_a_fit_on_other_data_begins_a_new_epoch_of_them():
    trainer = build("4ba")
    trainer.fit()
    other = batches(5, seed=4)
    trainer.fit(other, duration="6ba")
    now = trainer.state.timestamp
    assert (now.batch, now.epoch, now.batch_in_epoch, now.epoch_length) == (10, 3, 1, 5)
    assert trainer.state.train_dataloader is other


# Evaluators and metrics


def test_each_evaluator_has_its_label_metrics_and_interval():
    log = Kept()
    evaluators = [
        Evaluator(label="often", dataloader=batches(2, seed=5), eval_interval="2ba", metric_names=["accuracy"]),
        Evaluator(label="short", dataloader=batches(3, seed=6), subset_num_batches=1),
        Evaluator(label="never", dataloader=batches(1), eval_interval=0),
        Evaluator(label="asked", dataloader=batches(1), eval_interval=lambda state, event: state.timestamp == "5ba"),
    ]
    metrics = {"accuracy": loops.Accuracy(), "other": loops.Accuracy()}
    trainer = build("7ba", n=3, eval_dataloader=evaluators, metrics=metrics, loggers=log)
    trainer.fit()
    assert list(log.of("often/accuracy")) == [2, 4, 6, 7]
    assert list(log.of("short/other")) == [3, 6, 7]
    assert list(log.of("asked/loss")) == [5]
    assert log.of("never/loss") == log.of("often/other") == {}
    only_first = trainer.eval([Evaluator(label="whole", dataloader=[next(iter(batches(3, seed=6)))])])
    assert trainer.state.eval_metrics == only_first
    assert only_first["whole/loss"] == pytest.approx(log.of("short/loss")[7])
    assert set(trainer.eval()) >= {"often/accuracy", "short/other", "never/loss", "asked/loss"}


def test_an_evaluator_runs_once_at_the_last_batch_of_a_resumed_run(tmp_path):
    evaluators = [
        Evaluator(label="a", dataloader=batches(1), eval_interval="2ba"),
        Evaluator(label="b", dataloader=batches(1), eval_interval="3ba"),
    ]
    build("4ba", eval_dataloader=evaluators, save_folder=tmp_path, save_interval="100ba").fit()
    log = Kept()
    resumed = build("4ba", eval_dataloader=evaluators, loggers=log, load_path=tmp_path / "ep1-ba4.pt")
    resumed.fit()
    assert [label for label in ("a", "b") if log.of(f"{label}/loss")] == ["b"]


class Classifier(nn.Module):
    """In the shape of a ``ComposerClassifier``: with metrics of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.module = loops.perceptron()
        self.train_accuracy = torchmetrics.classification.MulticlassAccuracy(num_classes=3, average="micro")
        self.val_accuracy = torchmetrics.classification.MulticlassAccuracy(num_classes=3, average="micro")

    def forward(self, batch: Any) -> Tensor:
        return self.module(batch[0])

    def loss(self, outputs: Tensor, batch: Any) -> dict[str, Tensor]:
        return {"one": 0.25 * cross_entropy(outputs, batch[1]), "two": 0.75 * cross_entropy(outputs, batch[1])}

    def eval_forward(self, batch: Any, outputs: Tensor | None = None) -> Tensor:
        return self.forward(batch) if outputs is None else outputs

    def get_metrics(self, is_train: bool = False) -> dict[str, Any]:
        return {"Accuracy": self.train_accuracy if is_train else self.val_accuracy}

    def update_metric(self, batch: Any, outputs: Tensor, metric: Any) -> None:
        metric.update(outputs, batch[1])


@pytest.mark.parametrize("grad_accum", [1, 2])
def test_a_models_own_metrics_are_computed_in_training_and_evaluation(grad_accum):
    model, plain, log, want = Classifier(), loops.perceptron(), Kept(), loops.Recorder()
    accuracies: list[float] = []

    class Watch(Callback):
        def before_forward(self, state: Any, logger: Any) -> None:
            with torch.no_grad():
                outputs = plain(state.batch[0])
            accuracies.append(float((outputs.argmax(1) == state.batch[1]).float().mean()))

    build("3ba", model=plain, callbacks=[Watch(), want]).fit()
    trainer = build("3ba", model=model, loss=None, eval_dataloader=batches(2), loggers=log, grad_accum=grad_accum)
    trainer.fit()
    assert list(log.of("train/Accuracy").values()) == pytest.approx(accuracies)
    assert list(log.of("train/loss").values()) == pytest.approx(want.losses, rel=1e-5)
    assert set(log.of("eval/Accuracy")) == {3}
    assert trainer.state.train_metrics == {"train/Accuracy": pytest.approx(accuracies[-1])}


def test_training_metrics_of_a_plain_module_are_of_the_batch_that_is_logged():
    log = Kept()
    build("4ba", loggers=log, log_interval="2ba", train_metrics={"accuracy": loops.Accuracy()}).fit()
    assert list(log.of("train/accuracy")) == [2, 4]
    assert all(0 <= value <= 1 for value in log.of("train/accuracy").values())


def test_a_metric_that_computes_several_figures_has_each_and_one_of_no_number_is_refused():
    class Several(loops.Accuracy):
        def compute(self) -> Any:
            return {"one": 1.0, "two": torch.tensor(2.0)}

    class Vector(loops.Accuracy):
        def compute(self) -> Any:
            return torch.zeros(3)

    found = build(metrics={"both": Several()}).eval(batches(1))
    assert (found["eval/both/one"], found["eval/both/two"]) == (1.0, 2.0)
    with pytest.raises(ArgumentError, match=r"the metric each must compute one number .*\(3,\)"):
        build(metrics={"each": Vector()}).eval(batches(1))


# Saving, closing


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_save_folder_is_a_saver_among_the_callbacks(tmp_path):
    folder = tmp_path / "{run_name}" / "checkpoints"
    trainer = build("7ba", save_folder=folder, save_interval="2ba", save_num_checkpoints_to_keep=2, run_name="mine")
    trainer.fit()
    assert names(tmp_path / "mine" / "checkpoints") == ["ep1-ba6.pt", "ep2-ba7.pt"]
    resumed = build("8ba", save_folder=folder, save_interval="2ba", run_name="mine", autoresume=True)
    assert resumed.state.timestamp.batch == 7
    build("2ba", save_folder=tmp_path / "all", save_interval="1ba", save_num_checkpoints_to_keep=-1).fit()
    assert names(tmp_path / "all") == ["ep0-ba1.pt", "ep0-ba2.pt"]


def test_a_savers_interval_answers_true_at_the_end_of_the_run_as_composers_does(tmp_path):
    answers: list[tuple[int, str]] = []
    saver = CheckpointSaver(tmp_path, "100ba")

    class Asks(Algorithm):
        def match(self, event: Event, state: Any) -> bool:
            savers = [one for one in state.callbacks if isinstance(one, CheckpointSaver)]
            if any(one.save_interval(state, event) for one in savers):
                answers.append((int(state.timestamp.batch), event.value))
            return False

        def apply(self, event: Event, state: Any, logger: Any) -> None: ...

    build("5ba", algorithms=Asks(), callbacks=saver).fit()
    assert answers == [(5, "batch_checkpoint")]
    answers.clear()
    build("6ba", algorithms=Asks(), callbacks=saver).fit()
    assert answers == [(6, "epoch_checkpoint")]


def saved_run(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the training weights and the average of a run of four batches, saved as ``x.pt``."""
    ema, options = EMA("1ba"), {"seed": 1}
    trainer = build("4ba", algorithms=ema, **options)
    trainer.fit()
    trainer.save_checkpoint(folder / "x.pt")
    return loops.bits(trainer.state.model), loops.averaged(ema)


def test_load_weights_only_takes_the_weights_for_use_and_nothing_else(tmp_path):
    _, average = saved_run(tmp_path)
    rng = torch.get_rng_state()
    trainer = build("4ba", model=loops.perceptron(seed=9), load_path=tmp_path / "x.pt", load_weights_only=True)
    assert loops.differences(average, loops.bits(trainer.state.model)) == []
    assert trainer.state.timestamp.batch == 0
    assert torch.equal(rng, torch.get_rng_state())
    model = loops.perceptron(seed=9)
    Trainer(model, load_path=tmp_path / "x.pt", load_weights_only=True, loss=cross_entropy, progress_bar=False)
    assert loops.differences(average, loops.bits(model)) == []


@pytest.mark.parametrize("prefix", ["", "state/"])
def test_ignored_keys_are_left_as_they_are(prefix, tmp_path):
    training, _ = saved_run(tmp_path)

    def load(*keys: str, **options: Any) -> Trainer:
        ignored = [prefix + key for key in keys]
        given = {"model": loops.perceptron(seed=9), "load_path": tmp_path / "x.pt", "load_ignore_keys": ignored}
        return build("6ba", **(given | options))

    assert load("algorithms").state.timestamp.batch == 4
    trainer = load("timestamp", "algorithms")
    assert (trainer.state.timestamp.batch, trainer.state.timestamp.batch_in_epoch) == (0, 0)
    assert loops.differences(training, loops.bits(trainer.state.model)) == []
    trainer.fit()
    assert trainer.state.timestamp.batch == 6
    fresh = loops.bits(loops.perceptron(seed=9))
    for keys, kept in (
        (["model/2.*"], ["2.bias", "2.weight"]),
        (["model/*"], sorted(fresh)),
        (["model"], sorted(fresh)),
    ):
        found = loops.bits(load(*keys, "algorithms").state.model)
        assert sorted(name for name in fresh if torch.equal(found[name], fresh[name])) == kept
    assert load("optimizers", "algorithms", optimizers=None).state.timestamp.batch == 4
    rng = torch.get_rng_state()
    load("rng", "algorithms")
    assert torch.equal(rng, torch.get_rng_state())


@pytest.mark.parametrize("key", ["weights", "optimizers/0", "model/nothing.*"])
def test_an_ignored_key_that_is_not_in_the_checkpoint_is_refused(key, tmp_path):
    saved_run(tmp_path)
    with pytest.raises(ArgumentError, match="load_ignore_keys must"):
        build(load_path=tmp_path / "x.pt", load_ignore_keys=[key])


def test_close_lets_callbacks_and_loggers_finish_once():
    order: list[str] = []

    class Closes(Callback):
        def close(self, state: Any, logger: Any) -> None:
            order.append("close")

        def post_close(self) -> None:
            order.append("post_close")

    log = Kept()
    trainer = build("1ba", callbacks=[Closes()], loggers=log)
    trainer.fit()
    trainer.close()
    trainer.close()
    assert order == ["close", "post_close"]
    assert log.closed == 1


def test_deterministic_mode_is_torchs():
    before = torch.are_deterministic_algorithms_enabled()
    try:
        build("1ba", deterministic_mode=True).fit()
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(before)

"""Wrong arguments of the trainer: each is one error that names the argument, before anything is changed or trained."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loops
import pytest
import torch
import torchmetrics
from torch import nn
from torch.nn.functional import cross_entropy

import polyak
from polyak import EMA, Callback, CheckpointSaver, ConsoleLogger, Evaluator, PolyakError, Trainer

DATA = [(torch.zeros(4, 6), torch.zeros(4, dtype=torch.long)) for _ in range(3)]


class Unlike(nn.Module):
    """A model with a loss that cannot be called."""

    loss = 3

    def forward(self, batch: Any) -> Any:
        return batch


def generator() -> Any:
    yield from DATA


def other_optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD(loops.perceptron(seed=5).parameters(), lr=0.1)


def text_file(folder: Path) -> Path:
    (folder / "notes.txt").write_text("not a checkpoint")
    return Path("notes.txt")


def weights_file(folder: Path) -> Path:
    torch.save(loops.perceptron().state_dict(), folder / "weights.pt")
    return Path("weights.pt")


def plateau(model: nn.Module) -> Any:
    return torch.optim.lr_scheduler.ReduceLROnPlateau(torch.optim.SGD(model.parameters(), lr=0.1))


# Argument, what is given, what the error says: docs/trainer-errors.md shows the tables of this file. `text_file` and
# `weights_file` are called where the test runs.
WRONG: list[tuple[str, Any, str]] = [
    ("model", "resnet", "model must be a torch.nn.Module .*'resnet'"),
    ("model", nn.Linear, "model must be a torch.nn.Module .*the class Linear.*parentheses"),
    ("model", lambda inputs: inputs, "model must be a torch.nn.Module .*function"),
    ("model", None, "model must be a torch.nn.Module .*None"),
    ("model", Unlike(), "loss"),
    ("loss", None, "give loss="),
    ("loss", "cross_entropy", "loss must be a function .*'cross_entropy'"),
    ("loss", nn.CrossEntropyLoss, "loss must be a function .*the class CrossEntropyLoss.*parentheses"),
    ("loss", torch.zeros(()), "loss must be a function .*Tensor"),
    ("train_dataloader", "data/train", "train_dataloader must be an iterable of batches"),
    ("train_dataloader", loops.dataset(), "train_dataloader must be .*TensorDataset.*DataLoader"),
    ("train_dataloader", generator(), "train_dataloader must be .*a generator.*only once"),
    ("train_dataloader", iter(DATA), "train_dataloader must be .*only once"),
    ("train_dataloader", generator, "train_dataloader must be .*the function generator"),
    ("train_dataloader", torch.zeros(8, 6), "train_dataloader must be .*Tensor"),
    ("train_dataloader", {"train": DATA}, "train_dataloader must be .*dict"),
    ("train_dataloader", 5, "train_dataloader must be .*5, an int"),
    ("train_dataloader", torch.utils.data.DataLoader, "train_dataloader must be .*the class DataLoader.*parentheses"),
    ("eval_dataloader", "data/eval", "eval_dataloader must be an iterable of batches"),
    ("eval_dataloader", generator(), "eval_dataloader must be .*a generator.*only once"),
    ("eval_dataloader", {"test": generator()}, "the dataloader of test must be .*only once"),
    ("eval_dataloader", {1: DATA}, "the label of an evaluator must be a string"),
    (
        "eval_dataloader",
        [torch.utils.data.DataLoader(loops.dataset()), torch.utils.data.DataLoader(loops.dataset())],
        "several loaders in eval_dataloader must have labels .*DataLoader, a DataLoader.*Evaluator",
    ),
    (
        "eval_dataloader",
        [Evaluator(label="a", dataloader=DATA), torch.utils.data.DataLoader(loops.dataset())],
        "several loaders in eval_dataloader must have labels .*a DataLoader",
    ),
    (
        "eval_dataloader",
        [Evaluator(label="a", dataloader=DATA), Evaluator(label="a", dataloader=DATA)],
        "the labels in eval_dataloader must differ .*'a', 'a'",
    ),
    (
        "eval_dataloader",
        Evaluator(label="a", dataloader=DATA, metric_names=["f1"]),
        "metric_names must match .*'f1'.*none",
    ),
    ("max_duration", "ten", "max_duration must be a time.*'ten'"),
    ("max_duration", 1.5, "max_duration must be a whole number"),
    ("max_duration", 0, "max_duration must be above 0"),
    ("max_duration", -1, "max_duration must be above 0"),
    ("max_duration", True, "max_duration must be a time.*True"),
    ("max_duration", [1], "max_duration must be a time.*list"),
    ("max_duration", "1_000_ba", "max_duration must be a time.*1_000_ba"),
    ("max_duration", "4tok", "max_duration must be .*4tok.*num_tokens="),
    ("max_duration", "1iter", "max_duration must be in ep, ba, .*1iter"),
    ("max_duration", "0.5dur", "max_duration must be finite"),
    ("algorithms", "ema", "algorithms must be a polyak.Algorithm or a list .*'ema'"),
    ("algorithms", EMA, "algorithms must be instances .*the class EMA.*parentheses"),
    ("algorithms", [EMA(), EMA()], "there can be one"),
    ("algorithms", lambda event, state: True, "algorithms must be instances .*function"),
    ("algorithms", (one for one in [EMA()]), "algorithms must be a polyak.Algorithm or a list .*a generator"),
    ("algorithms", loops.Recorder(), "algorithms must be instances of polyak.Algorithm .*Recorder"),
    ("optimizers", "adam", "optimizers must be a torch.optim.Optimizer or a list"),
    ("optimizers", torch.optim.SGD, "optimizers must be a torch.optim.Optimizer .*the class SGD"),
    (
        "optimizers",
        loops.perceptron().parameters(),
        "optimizers must be a torch.optim.Optimizer or a list.*a generator",
    ),
    ("optimizers", lambda: None, "optimizers must be a torch.optim.Optimizer .*function"),
    ("optimizers", other_optimizer(), "optimizers must be over the parameters of the model .*SGD over 4"),
    ("schedulers", "cosine", "schedulers must be a scheduler .*or a list"),
    ("schedulers", lambda step: 0.5, "schedulers must be a scheduler .*function"),
    (
        "schedulers",
        torch.optim.lr_scheduler.StepLR(other_optimizer(), 1),
        "schedulers must be over the trainer's optimizers .*StepLR over another SGD",
    ),
    ("schedulers", other_optimizer(), "schedulers must be a scheduler .*SGD"),
    ("metrics", [loops.Accuracy()], "metrics must be a mapping"),
    ("metrics", {"accuracy": loops.Accuracy}, "the metric 'accuracy' must be .*the class Accuracy.*parentheses"),
    ("metrics", {"accuracy": lambda outputs, targets: 0.0}, "the metric 'accuracy' must be .*function"),
    ("metrics", torchmetrics.MeanMetric(), "metrics must be a mapping .*MeanMetric"),
    ("train_metrics", "accuracy", "train_metrics must be a mapping"),
    ("callbacks", CheckpointSaver, "callbacks must be instances .*the class CheckpointSaver"),
    ("callbacks", lambda state, logger: None, "callbacks must be instances .*function"),
    ("callbacks", EMA(), "callbacks must be instances .*EMA.*algorithms"),
    ("loggers", "console", "loggers must be a polyak.Destination or a list"),
    ("loggers", Callback(), "loggers must be instances of polyak.Destination .*Callback.*callbacks="),
    ("loggers", ConsoleLogger, "loggers must be instances .*the class ConsoleLogger"),
    ("eval_interval", "often", "eval_interval must be a time.*'often'"),
    ("eval_interval", "1.5ba", "eval_interval must be a whole number"),
    ("eval_interval", -1, "eval_interval must be above 0"),
    ("eval_interval", True, "eval_interval must be a time.*True"),
    ("eval_interval", "4tok", "eval_interval must be .*4tok.*num_tokens="),
    ("eval_interval", Callback, "eval_interval must be a time or a function .*the class Callback"),
    ("eval_weights", "best", "eval_weights must be 'averaged', 'raw' or 'both' .*'best'"),
    ("log_interval", None, "log_interval must be a time.*None"),
    ("log_interval", 0, "log_interval must be above 0"),
    ("log_interval", "4tok", "log_interval must be .*4tok.*num_tokens="),
    ("device", "gpu", "device must be a device of this machine .*'gpu'"),
    ("device", "cuda:99", "device must be a device of this machine .*'cuda:99'"),
    ("precision", "fp8", "precision must be one of fp32, amp_bf16, amp_fp16 .*'fp8'"),
    ("precision", torch.bfloat16, "precision must be one of .*dtype"),
    ("parallelism", "fsdp", "parallelism must be None or one of ddp, fsdp2 .*'fsdp'"),
    ("parallelism", True, "parallelism must be None or one of"),
    ("grad_accum", 0, "grad_accum must be a whole number of at least 1"),
    ("grad_accum", 2.0, "grad_accum must be a whole number .*2.0"),
    ("grad_accum", "auto", "grad_accum must be a whole number .*'auto'"),
    ("step_schedulers_every_batch", "yes", "step_schedulers_every_batch must be True or False"),
    ("polish", "100%", "polish must be above 0 % and below 100 % of the run"),
    ("polish", "5", "polish"),
    ("polish", "-5ba", "polish"),
    ("polish", [5], "polish"),
    ("polish", "5%", "polish needs one average among the algorithms"),
    ("deterministic_mode", 1, "deterministic_mode must be True or False"),
    ("seed", -1, "seed must be a whole number"),
    ("seed", "1", "seed must be a whole number"),
    ("seed", 2**32, "seed must be a whole number"),
    ("run_name", 5, "run_name must be a string"),
    ("progress_bar", "no", "progress_bar must be True or False"),
    ("save_folder", 5, "save_folder must be a path"),
    ("save_interval", "1ep", "save_interval must be given together with save_folder"),
    ("save_num_checkpoints_to_keep", 2, "save_num_checkpoints_to_keep must be given together with save_folder"),
    ("load_path", 5, "load_path must be a path"),
    ("load_path", "", "load_path must be a path"),
    ("load_path", "nowhere.pt", r"nowhere\.pt"),
    ("load_path", text_file, r"notes\.txt must be a checkpoint"),
    ("load_path", weights_file, r"weights\.pt must be a checkpoint"),
    ("load_weights_only", "yes", "load_weights_only must be True or False"),
    ("load_ignore_keys", "optimizers", "load_ignore_keys must be a list of strings"),
    ("load_ignore_keys", [1], "load_ignore_keys must be a list of strings"),
    ("autoresume", True, "CheckpointSaver"),
    ("autoresume", "latest", "autoresume must be True or False"),
    ("num_samples", 4, "num_samples must be a function"),
    ("num_tokens", "input_ids", "num_tokens must be a function"),
]


# With `save_folder`.
WRONG_SAVING: list[tuple[str, Any, str]] = [
    ("save_interval", "often", "save_interval must be a time"),
    ("save_interval", "0ba", "save_interval must be above 0"),
    ("save_num_checkpoints_to_keep", 0, "save_num_checkpoints_to_keep must be -1 for all, or at least 1"),
    ("save_num_checkpoints_to_keep", True, "save_num_checkpoints_to_keep must be"),
]
WRONG_EVALUATOR: list[tuple[str, Any, str]] = [
    ("label", "", "the label of an evaluator must be a string"),
    ("metric_names", "accuracy", "metric_names must be a list of strings"),
    ("metric_names", [1], "metric_names must be a list of strings"),
    ("subset_num_batches", 1.5, "subset_num_batches must be a whole number"),
    ("eval_interval", "often", "eval_interval must be a time"),
    ("dataloader", generator(), "the dataloader of x must be .*only once"),
]
WRONG_CALL: list[tuple[Callable[[Trainer], object], str]] = [
    (lambda trainer: trainer.fit(duration="soon"), "duration must be a time"),
    (lambda trainer: trainer.fit(duration="4tok"), "duration must be .*num_tokens"),
    (lambda trainer: trainer.fit(generator()), "train_dataloader must be .*only once"),
    (lambda trainer: trainer.eval("test"), "eval_dataloader must be"),
    (lambda trainer: trainer.eval([loops.dataset()]), "eval_dataloader must be .*DataLoader"),
]


def build(**options: Any) -> Trainer:
    model = options.pop("model", None) if "model" in options else loops.perceptron()
    own = model if isinstance(model, nn.Module) else loops.perceptron()
    parameters = list(own.parameters()) or [nn.Parameter(torch.zeros(1))]
    given: dict[str, Any] = {
        "train_dataloader": DATA,
        "max_duration": "1ep",
        "optimizers": torch.optim.SGD(parameters, lr=0.1),
        "loss": cross_entropy,
        "progress_bar": False,
    }
    return Trainer(model, **(given | options))


def at(folder: Path, given: Any) -> Any:
    """Return what is given, in a folder if it is a file."""
    return given(folder) if given is text_file or given is weights_file else given


@pytest.mark.parametrize(
    ("argument", "given", "words"), WRONG, ids=[f"{argument} {number}" for number, (argument, _, _) in enumerate(WRONG)]
)
def test_a_wrong_argument_is_one_error_by_name_before_the_first_batch(argument, given, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls: list[Any] = []
    hook = nn.modules.module.register_module_forward_pre_hook(lambda *inputs: calls.append(inputs))
    rng = torch.get_rng_state()
    try:
        with pytest.raises(PolyakError, match=words):
            build(**{argument: at(tmp_path, given)})
    finally:
        hook.remove()
    assert calls == []
    assert argument == "load_path" or torch.equal(rng, torch.get_rng_state())


def test_a_scheduler_that_needs_a_metric_is_refused():
    model = loops.perceptron()
    scheduler = plateau(model)
    with pytest.raises(PolyakError, match="schedulers must be ones that need no metric .*ReduceLROnPlateau.*callback"):
        build(model=model, optimizers=scheduler.optimizer, schedulers=scheduler)


@pytest.mark.parametrize(("argument", "given", "words"), WRONG_SAVING)
def test_a_wrong_argument_for_saving_is_refused(argument, given, words, tmp_path):
    with pytest.raises(PolyakError, match=words):
        build(save_folder=tmp_path, **{argument: given})


@pytest.mark.parametrize(("argument", "given", "words"), WRONG_EVALUATOR)
def test_a_wrong_evaluator_is_refused(argument, given, words):
    with pytest.raises(PolyakError, match=words):
        Evaluator(**({"label": "x", "dataloader": DATA} | {argument: given}))


@pytest.mark.parametrize(("call", "words"), WRONG_CALL, ids=["time", "unit", "loader", "eval string", "eval data set"])
def test_a_wrong_argument_of_fit_and_eval_is_refused(call: Callable[[Trainer], object], words):
    trainer = build()
    with pytest.raises(PolyakError, match=words):
        call(trainer)
    assert trainer.state.timestamp.batch == 0


@pytest.mark.parametrize(("name", "arguments"), [("EMA", ()), ("Recorder", ("record",))])
def test_an_algorithm_for_composers_trainer_is_refused_with_the_right_import(name, arguments, tmp_path, monkeypatch):
    pytest.importorskip("composer")
    monkeypatch.chdir(tmp_path)
    hosted = getattr(importlib.import_module("polyak.hosts.composer"), name)(*arguments)
    with pytest.raises(PolyakError, match=rf"this {name} is for Composer's trainer: `from polyak import {name}`"):
        build(algorithms=hosted)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (torch.zeros(4, 6), r"pairs \(inputs, targets\) \(got a Tensor"),
        ((torch.zeros(4, 6),), r"pairs \(inputs, targets\) \(got a tuple with 1 entries"),
        ({"x": torch.zeros(4, 6), "y": torch.zeros(4)}, r"pairs .*loss\(outputs, batch\)"),
    ],
    ids=["tensor", "single", "mapping"],
)
def test_a_batch_that_is_no_pair_is_refused_for_a_plain_module(batch, words):
    with pytest.raises(PolyakError, match=words):
        build(train_dataloader=[batch]).fit()


def test_a_loss_of_many_elements_is_refused():
    with pytest.raises(PolyakError, match=r"the loss must be a tensor of one element \(got a tensor of shape \(4,\)"):
        build(loss=lambda outputs, targets: cross_entropy(outputs, targets, reduction="none")).fit()


def test_every_argument_of_the_trainer_has_a_wrong_value_in_the_table():
    arguments = set(Trainer.__init__.__annotations__) - {"return"}
    assert arguments - {argument for argument, _, _ in WRONG} == set()
    assert polyak.ArgumentError.__mro__[1:3] == (PolyakError, ValueError)

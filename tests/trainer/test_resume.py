import shutil
import signal

import loops
import pytest
import torch
from launching import exit_code
from loops import EPOCH_END, MID_EPOCH
from torch.utils.data import DataLoader

from polyak import EMA, CheckpointError, Evaluator, Event, PlanWarning, Trainer
from polyak.profiles import HalfLife

pytestmark = pytest.mark.slow  # trains each run several times

PLANS = {
    "default interval": {},
    "every 3 batches": {"update_interval": "3ba"},
    "every epoch": {"update_interval": "1ep"},
    "started after the checkpoint": {"ema_start": "10ba"},
    "started before the checkpoint": {"ema_start": "4ba"},
    "started at a share of the run": {"ema_start": "0.2dur"},
}


@pytest.mark.parametrize(
    ("plan", "half_life"),
    [
        ("default interval", "4ba"),
        ("default interval", "0.9ep"),
        ("every 3 batches", "0.9ep"),
        ("every epoch", "4ba"),
        ("started after the checkpoint", "4ba"),
        ("started before the checkpoint", "0.9ep"),
        ("started at a share of the run", "0.9ep"),
    ],
)
def test_a_resumed_run_equals_one_that_never_stopped(half_life, plan, tmp_path):
    def build(folder, **options):
        return loops.train(folder, ema=EMA(half_life, **PLANS[plan]), **options)

    assert loops.resume_differences(build, tmp_path) == {}


SETUPS = {
    "momentum": {"optimizer": "momentum"},
    "shuffle from the global generator": {"shuffle": True},
    "shuffle from a generator of its own": {"shuffle": True, "generator_seed": 7},
    "random transforms": {"shuffle": True, "data": loops.Noisy()},
    "random transforms, generator of its own": {"shuffle": True, "data": loops.Noisy(), "generator_seed": 7},
    "grad_accum": {"grad_accum": 2},
    "amp_bf16": {"precision": "amp_bf16"},
    "amp_fp16": {"precision": "amp_fp16"},
    "evaluated every other batch": {"eval_interval": "2ba", "eval_weights": "both"},
}


@pytest.mark.parametrize("setup", SETUPS)
def test_a_resumed_run_equals_one_that_never_stopped_in_any_setup(setup, tmp_path):
    def build(folder, **options):
        return loops.train(folder, ema=EMA("4ba"), **SETUPS[setup], **options)

    assert loops.resume_differences(build, tmp_path) == {}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_run_of_dropout_batch_norm_and_workers_equals_one_that_never_stopped(num_workers, tmp_path):
    def build(folder, **options):
        model = loops.noisy_perceptron(seed=len(options))  # the resumed run begins with other weights
        data = loops.Noisy()
        return loops.train(
            folder, ema=EMA("4ba"), model=model, data=data, shuffle=True, num_workers=num_workers, **options
        )

    assert loops.resume_differences(build, tmp_path) == {}


@pytest.mark.parametrize(
    "ema",
    [
        {"half_life": "16sp"},
        {"half_life": "20tok"},
        {"half_life": "0.2dur"},
        {"smoothing": 0.8, "update_interval": "2ba"},
        {"profile": HalfLife("1000ba", unbiased=True), "ema_start": "4ba"},
        {"half_life": "4ba", "dtype": torch.bfloat16},
        {"half_life": "4ba", "dtype": torch.float64},
    ],
    ids=lambda ema: "-".join(map(str, ema.values())),
)
def test_every_clock_profile_and_dtype_resumes_bit_for_bit(ema, tmp_path):
    def build(folder, **options):
        return loops.train(folder, ema=EMA(**ema), num_tokens=lambda batch: int(batch[1].sum()) + 1, **options)

    assert loops.resume_differences(build, tmp_path) == {}


def test_a_model_in_bfloat16_resumes_bit_for_bit(tmp_path):
    class Cast(torch.utils.data.Dataset):
        def __len__(self):
            return len(loops.dataset())

        def __getitem__(self, i):
            inputs, target = loops.dataset()[i]
            return inputs.bfloat16(), target

    def build(folder, **options):
        trainer = loops.train(folder, ema=EMA("4ba"), model=loops.perceptron().bfloat16(), data=Cast(), **options)
        trainer.state.evaluators = [Evaluator(label="eval", dataloader=DataLoader(Cast(), batch_size=4))]
        return trainer

    assert loops.resume_differences(build, tmp_path) == {}


def test_a_run_resumed_twice_equals_one_that_never_stopped(tmp_path):
    def build(folder, **options):
        return loops.train(folder, ema=EMA("4ba"), model=loops.noisy_perceptron(), shuffle=True, **options)

    whole = build(tmp_path / "whole")
    whole.fit()
    first = build(tmp_path / "parts", callbacks=(loops.Raises(Event.BATCH_START, KeyboardInterrupt(), batch=4),))
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    loops.disturb()
    callbacks = (loops.Raises(Event.EVAL_START, KeyboardInterrupt(), batch=12),)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "parts", autoresume=True, callbacks=callbacks).fit()
    loops.disturb()
    last = build(tmp_path / "parts", autoresume=True)
    last.fit()
    want = loops.everything(whole, tmp_path / "whole")
    got = loops.everything(last, tmp_path / "parts")
    assert loops.differences(want, got) == []


def test_a_failed_run_resumes_from_its_last_checkpoint(tmp_path):
    whole = loops.train(tmp_path / "whole", ema=EMA("4ba"), shuffle=True)
    whole.fit()
    failing = loops.Raises(Event.BATCH_START, RuntimeError("once"), batch=8)
    parts = loops.train(tmp_path / "parts", ema=EMA("4ba"), shuffle=True, callbacks=(failing,))
    with pytest.raises(RuntimeError, match="once"):
        parts.fit()
    assert parts.state.timestamp.batch.value == 8
    loops.disturb()
    again = loops.train(tmp_path / "parts", ema=EMA("4ba"), shuffle=True, autoresume=True)
    again.fit()
    want, got = loops.everything(whole, tmp_path / "whole"), loops.everything(again, tmp_path / "parts")
    assert loops.differences(want, got) == []


def test_a_run_killed_while_it_saves_resumes_bit_for_bit(tmp_path):
    assert exit_code(loops.train_until_killed, tmp_path / "killed", 12) == -signal.SIGKILL
    folder = tmp_path / "killed" / "checkpoints"
    assert [path.name for path in sorted(folder.glob("ep*.pt"))] == ["ep0-ba4.pt", "ep1-ba8.pt"]
    assert len((tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()) > 8

    whole = loops.killable(tmp_path / "whole")
    whole.fit()
    loops.disturb()
    resumed = loops.killable(tmp_path / "killed")
    assert resumed.state.timestamp.batch.value == 8
    resumed.fit()
    want, got = loops.everything(whole, tmp_path / "whole"), loops.everything(resumed, tmp_path / "killed")
    assert loops.differences(want, got) == []


@pytest.mark.parametrize("first", ["2ep", "9ba", "12ba"])
def test_a_run_resumed_with_a_longer_duration_equals_one_that_was_that_long(first, tmp_path):
    def build(folder, **options):
        return loops.train(folder, ema=EMA("4ba"), model=loops.noisy_perceptron(), shuffle=True, **options)

    whole = build(tmp_path / "whole")
    whole.fit()
    build(tmp_path / "parts", max_duration=first).fit()
    loops.disturb()
    longer = build(tmp_path / "parts", autoresume=True)
    longer.fit()
    want, got = loops.everything(whole, tmp_path / "whole"), loops.everything(longer, tmp_path / "parts")
    assert loops.differences(want, got) == []


def test_a_finished_run_that_is_resumed_trains_no_more(tmp_path):
    first = loops.train(tmp_path, ema=EMA("4ba"))
    first.fit()
    log = (tmp_path / "metrics.jsonl").read_text()
    again = loops.train(tmp_path, ema=EMA("4ba"), autoresume=True)
    again.fit()
    assert loops.differences(loops.bits(first.state.model), loops.bits(again.state.model)) == []
    assert (tmp_path / "metrics.jsonl").read_text() == log


# Training does not depend on what watches it


def trajectory(folder, **options):
    recorder = loops.Recorder()
    loops.train(
        folder,
        model=loops.noisy_perceptron(),
        data=loops.Noisy(),
        shuffle=True,
        callbacks=(recorder,),
        **({"saves": None} | options),
    ).fit()
    return recorder.weights, recorder.losses


@pytest.mark.parametrize(
    "watched",
    [
        {"ema": lambda: EMA("4ba")},
        {"ema": lambda: EMA("1ep"), "saves": "6ba"},
        {"ema": lambda: EMA("4ba", dtype=torch.bfloat16), "saves": loops.often},
        {"ema": lambda: EMA("4ba"), "eval_interval": "1ba", "eval_weights": "both"},
        {"eval_interval": "1ba"},
        {"saves": loops.often},
    ],
    ids=loops.label,
)
def test_averaging_evaluating_and_saving_do_not_change_the_trajectory(watched, tmp_path):
    plain = trajectory(tmp_path / "plain")
    make = watched.get("ema")
    options = watched | {"ema": make() if make else None}
    assert loops.differences(plain, trajectory(tmp_path / "watched", **options)) == []


@pytest.mark.parametrize("at", [EPOCH_END, MID_EPOCH])
def test_a_run_resumed_without_its_ema_warns_and_equals_one_never_averaged(at, tmp_path):
    never = loops.train(tmp_path / "never", shuffle=True)
    never.fit()
    loops.train(tmp_path / "averaged", ema=EMA("4ba"), shuffle=True).fit()
    loops.disturb()
    shutil.copytree(tmp_path / "averaged", tmp_path / "without")
    with pytest.warns(PlanWarning, match="EMA"):
        without = loops.train(tmp_path / "without", shuffle=True, load_path=tmp_path / "averaged" / "checkpoints" / at)
    without.fit()
    want, got = loops.everything(never, tmp_path / "never"), loops.everything(without, tmp_path / "without")
    for run in (want, got):
        run.pop("log")  # the first part was evaluated with the average
        run["checkpoint"].pop("callbacks")
    assert loops.differences(want, got) == []


def test_a_run_resumed_with_another_half_life_warns_with_both(tmp_path):
    loops.train(tmp_path, ema=EMA("4ba")).fit()
    with pytest.warns(PlanWarning, match=r"4, 'ba'.*5, 'ba'"):
        loops.train(tmp_path, ema=EMA("5ba"), load_path=tmp_path / "checkpoints" / MID_EPOCH)


def test_a_run_resumed_with_another_dtype_of_the_average_warns(tmp_path):
    loops.train(tmp_path, ema=EMA("4ba")).fit()
    with pytest.warns(PlanWarning, match="bfloat16"):
        loops.train(tmp_path, ema=EMA("4ba", dtype=torch.bfloat16), load_path=tmp_path / "checkpoints" / MID_EPOCH)


def test_an_ema_that_is_added_to_a_resumed_run_starts_there(tmp_path):
    loops.train(tmp_path, saves=loops.often).fit()
    ema = EMA("4ba")
    with pytest.warns(PlanWarning, match="has no state of EMA"):
        trainer = loops.train(tmp_path, ema=ema, load_path=tmp_path / "checkpoints" / EPOCH_END)
    assert not ema.ema_started
    trainer.fit()
    assert ema.num_updates == 11


# What a checkpoint holds


def test_a_checkpoint_has_averaged_and_training_weights_and_names_them(tmp_path):
    recorder, ema = loops.Recorder(), EMA("4ba", ema_start="3ba")
    trainer = loops.train(tmp_path, ema=ema, model=loops.noisy_perceptron(), callbacks=(recorder,))
    trainer.fit()
    saved = {path.name: torch.load(path, weights_only=True) for path in (tmp_path / "checkpoints").iterdir()}
    assert len(saved) == 6 + 3
    for name, checkpoint in saved.items():
        batch = int(name.removesuffix(".pt").split("ba")[1])
        if batch < 3:
            assert checkpoint["training_model"] is None
            assert checkpoint["model_holds"] == "training weights"
            assert loops.differences(checkpoint["model"], recorder.weights[batch]) == []
        else:
            assert loops.differences(checkpoint["training_model"], recorder.weights[batch]) == []
            assert checkpoint["model_holds"].startswith("averaged weights of EMA(")
    last = saved["ep3-ba18.pt"]
    assert loops.differences(last["model"], loops.averaged(ema)) == []
    assert loops.differences(last["training_model"], loops.bits(trainer.state.model)) == []
    assert loops.differences(last["model"], last["training_model"])
    plain = loops.noisy_perceptron(seed=3)
    plain.load_state_dict(last["model"])
    assert plain(torch.ones(2, 6)).shape == (2, 3)


def test_a_checkpoint_of_tied_and_frozen_tensors_has_each_under_all_its_names(tmp_path):
    def build():
        model = loops.seeded(lambda: torch.nn.Sequential(*(torch.nn.Linear(6, 6) for _ in range(3))))
        model[2].weight = model[0].weight
        model[1].weight.requires_grad_(False)
        return model

    trainer = loops.train(tmp_path, ema=EMA("4ba"), model=build())
    trainer.fit()
    saved = torch.load(tmp_path / "checkpoints" / "ep3-ba18.pt", weights_only=True)
    for held, weights in (("model", trainer.state.algorithms[0].ema_model), ("training_model", trainer.state.model)):
        assert loops.differences(saved[held], dict(weights.state_dict())) == []
    resumed = loops.train(tmp_path, ema=EMA("4ba"), model=build(), autoresume=True, max_duration="4ep")
    assert resumed.state.model[2].weight is resumed.state.model[0].weight
    resumed.fit()


def test_a_checkpoint_of_a_wrapped_model_loads_into_the_model_itself_and_back(tmp_path):
    wrapped = loops.train(
        tmp_path / "wrapped", ema=EMA("4ba"), model=torch.nn.DataParallel(loops.perceptron()), max_duration="2ep"
    )
    wrapped.fit()
    load = {"load_path": tmp_path / "wrapped" / "checkpoints" / "ep2-ba12.pt"}
    plain = loops.train(tmp_path / "plain", ema=EMA("4ba"), **load)
    plain.fit()
    load = {"load_path": tmp_path / "plain" / "checkpoints" / "ep2-ba15.pt"}
    back = loops.train(tmp_path / "back", ema=EMA("4ba"), model=torch.nn.DataParallel(loops.perceptron()), **load)
    back.fit()
    whole = loops.train(tmp_path / "whole", ema=EMA("4ba"))
    whole.fit()
    assert loops.differences(loops.bits(whole.state.model), loops.bits(back.state.model.module)) == []
    assert loops.differences(loops.averaged(whole.state.algorithms[0]), loops.averaged(back.state.algorithms[0])) == []


# What does not fit is refused


def resume_with(folder, at=MID_EPOCH, **options):
    return loops.train(folder, ema=EMA("4ba"), load_path=folder / "checkpoints" / at, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": torch.nn.Linear(6, 3)}, "the model must be that of"),
        ({"data": loops.dataset(4)}, "6 batches.*got 4"),
        ({"shuffle": True, "generator_seed": 3}, "0 generators.*1"),
    ],
    ids=["model", "data", "generator"],
)
def test_a_checkpoint_of_another_model_is_refused(options, words, tmp_path):
    loops.train(tmp_path, ema=EMA("4ba")).fit()
    with pytest.raises(CheckpointError, match=words):
        resume_with(tmp_path, **options)


def test_a_checkpoint_from_the_end_of_an_epoch_resumes_on_other_data(tmp_path):
    loops.train(tmp_path, ema=EMA("4ba")).fit()
    trainer = resume_with(tmp_path, EPOCH_END, data=loops.dataset(4))
    trainer.fit()
    assert trainer.state.timestamp.batch.value == 14


def test_a_checkpoint_of_another_number_of_optimizers_is_refused(tmp_path):
    loops.train(tmp_path).fit()
    path = tmp_path / "checkpoints" / MID_EPOCH
    with pytest.raises(CheckpointError, match="as many optimizers"):
        Trainer(loops.perceptron(), loss=torch.nn.functional.cross_entropy, load_path=path)


@pytest.mark.parametrize("content", [None, b"", b"nonsense", "a model"])
def test_a_file_that_is_no_checkpoint_is_refused(content, tmp_path):
    path = tmp_path / "x.pt"
    if content == "a model":
        torch.save(loops.perceptron().state_dict(), path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.pt"):
        loops.train(tmp_path, load_path=path)

"""Two runs that are mixed up in one folder are found, and averaged together only on request."""

import argparse
import json

import pytest
import torch
from safetensors.torch import save_file

from polyak import CheckpointError
from polyak.checkpoints import average_checkpoints


def write(folder, name: str, config: dict[str, object] | None = None, **counters: object) -> None:
    path = folder / name
    if config is None or path.suffix:
        counters |= {} if config is None else {"config": config}
        torch.save({"model": {"w": torch.ones(2)}, **counters}, path)
        return
    path.mkdir()
    save_file({"w": torch.ones(2)}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))


def average(folder, pattern: str, **options) -> int:
    made = average_checkpoints(sorted(folder.glob(pattern)), folder / "out.safetensors", overwrite=True, **options)
    return len(made.checkpoints)


def test_two_checkpoints_of_one_step_are_refused_as_a_copy_or_another_run(tmp_path) -> None:
    for name, step in (("a.pt", 10), ("last.pt", 20), ("b.pt", 20)):
        write(tmp_path, name, global_step=step)
    with pytest.raises(CheckpointError, match=r"b.pt and .*last.pt are both of step 20: one is a copy"):
        average(tmp_path, "*.pt")
    assert average(tmp_path, "*.pt", mixed=True) == 3
    assert average(tmp_path, "*.pt", weights=[1, 1, 1]) == 3


def test_a_later_step_of_an_earlier_epoch_is_of_another_run(tmp_path) -> None:
    for name, step, epoch in (("a.pt", 100, 1), ("b.pt", 200, 2), ("c.pt", 150, 3)):
        write(tmp_path, name, global_step=step, epoch=epoch)
    with pytest.raises(CheckpointError, match=r"b.pt is of a later step than .*c.pt, but of an earlier epoch: 2, not"):
        average(tmp_path, "*.pt")


def test_another_configuration_is_of_another_run_and_another_library_version_is_not(tmp_path) -> None:
    write(tmp_path, "checkpoint-1", {"layers": 2, "dropout": 0.1, "transformers_version": "4"})
    write(tmp_path, "checkpoint-2", {"layers": 2, "dropout": 0.1, "transformers_version": "5"})
    assert average(tmp_path, "checkpoint-*") == 2
    write(tmp_path, "checkpoint-3", {"layers": 2, "dropout": 0.2, "seed": 1})
    with pytest.raises(CheckpointError, match=r"of .*checkpoint-3 is another dropout, seed than in that of"):
        average(tmp_path, "checkpoint-*")
    assert average(tmp_path, "checkpoint-*", mixed=True) == 3


def test_runs_in_folders_of_their_own_are_averaged_without_a_question(tmp_path) -> None:
    for seed in ("1", "2"):
        (tmp_path / seed).mkdir()
        write(tmp_path / seed, "best.pt", global_step=20)
    assert average(tmp_path, "*/best.pt") == 2


def test_another_hyper_parameter_is_of_another_run_and_another_log_folder_is_not(tmp_path) -> None:
    settings = {"lr": 0.1, "log_dir": "a", "net": {"width": 3}}
    write(tmp_path, "step-1.ckpt", hyper_parameters=settings)
    write(tmp_path, "step-2.ckpt", hyper_parameters={**settings, "log_dir": "b"})
    assert average(tmp_path, "*.ckpt") == 2
    write(tmp_path, "step-3.ckpt", hyper_parameters={**settings, "net": {"width": 4}})
    with pytest.raises(CheckpointError, match=r"step-3.ckpt hyper_parameters.net.width is 4, not 3 as in .*step-2"):
        average(tmp_path, "*.ckpt")
    assert average(tmp_path, "*.ckpt", mixed=True) == 3


def test_the_arguments_of_a_script_are_compared_as_hyper_parameters_are(tmp_path) -> None:
    for step, rate in ((1, 0.1), (2, 0.2)):
        write(tmp_path, f"step-{step}.pt", args=argparse.Namespace(lr=rate, seed=1, resume=str(step)))
    with pytest.raises(CheckpointError, match=r"args.lr is 0.2, not 0.1"):
        average(tmp_path, "*.pt")


@pytest.mark.parametrize(
    "grows",
    [
        {"start_epoch": (0, 5)},  # of DETR, MAE, ConvNeXt and torchvision, once they are resumed
        {"init_from": ("scratch", "resume")},  # of nanoGPT
        {
            "consumed_train_samples": (800, 1600),
            "iteration": (100, 200),
            "num_floating_point_operations_so_far": (1, 2),
        },
    ],
)
def test_what_grows_in_a_run_or_says_that_it_was_resumed_is_no_other_run(tmp_path, grows) -> None:
    for i in (0, 1):
        said = {"lr": 0.1, **{name: values[i] for name, values in grows.items()}}
        write(tmp_path, f"step-{i + 1}.pt", args=argparse.Namespace(**said), config=said)
    assert average(tmp_path, "*.pt") == 2


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        ("ema_0.9999_010000.pt", "model010000.pt", "is ema 0.9999, and .* no average"),  # guided-diffusion
        ("ema_0.9999_010000.pt", "ema_0.999_010000.pt", "is ema 0.9999, and .* ema 0.999"),
        ("run-EMA.ckpt", "run.ckpt", "is ema, and .* no average"),  # NeMo
        ("12epoch.pth", "valid.acc.ave_10best.pth", "is no average, and .* ave"),  # ESPnet
    ],
)
def test_an_average_by_its_name_is_not_averaged_with_training_weights(tmp_path, one, other, said) -> None:
    for name, number in ((one, 1.0), (other, 2.0)):
        torch.save({"w": torch.full((2,), number)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=rf"must be averages of one kind, or training weights .*{said}"):
        average(tmp_path, "*.*")
    assert average(tmp_path, "*.*", mixed=True) == 2


def test_a_metric_and_a_word_with_three_letters_of_an_average_are_no_average(tmp_path) -> None:
    for number, name in enumerate(
        ["epoch=1-avg_loss=0.2.ckpt", "epoch=2.ckpt", "wave-epoch=3.ckpt", "schema_epoch=4.ckpt"]
    ):
        torch.save({"w": torch.full((2,), float(number))}, tmp_path / name)
    assert average(tmp_path, "*.ckpt") == 4


def test_the_output_of_a_command_is_not_averaged_with_what_it_was_made_from(tmp_path) -> None:
    for number in (1, 2):
        torch.save({"w": torch.full((2,), float(number))}, tmp_path / f"w{number}.pt")
    average_checkpoints([tmp_path / "w1.pt", tmp_path / "w2.pt"], tmp_path / "final.pt")
    with pytest.raises(CheckpointError, match=r"with an average of it \(.*final.pt was made from .*w1.pt, .*w2.pt\)"):
        average(tmp_path, "*.pt")
    assert average(tmp_path, "*.pt", mixed=True) == 3


def test_segments_of_a_record_are_refused_with_the_command_that_averages_them(tmp_path) -> None:
    for begin, end in ((0, 8), (8, 12)):
        save_file({"w": torch.ones(2)}, tmp_path / f"{begin:010d}-{end:010d}-d77a7f3a8f1f7b0a.safetensors")
    with pytest.raises(CheckpointError, match=rf"segments of a record .*: polyak reconstruct {tmp_path} gives"):
        average(tmp_path, "0*.safetensors")

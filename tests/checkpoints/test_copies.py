"""A checkpoint that is there twice, as ``last.pt`` and ``best.pt`` often are, is found and counts once."""

import shutil

import pytest
import torch

from polyak import CheckpointError
from polyak.checkpoints import average_checkpoints


def save(folder, name: str, number: float, **more: object) -> None:
    torch.save({"model": {"w": torch.full((4,), number), "frozen": torch.ones(2)}, **more}, folder / name)


def average(folder, pattern: str, **options) -> int:
    made = average_checkpoints(sorted(folder.glob(pattern)), folder / "out.safetensors", overwrite=True, **options)
    return len(made.checkpoints)


@pytest.mark.parametrize(
    ("names", "copy"),
    [
        (("model_0.pth", "model_1.pth"), "checkpoint.pth"),  # torchvision
        (("checkpoint-0.pth.tar", "checkpoint-1.pth.tar"), "last.pth.tar"),  # timm
        (("epoch_0_ckpt.pth", "epoch_1_ckpt.pth"), "best_ckpt.pth"),  # YOLOX
    ],
)
def test_a_copy_of_a_checkpoint_of_an_epoch_is_refused_by_both_names(tmp_path, names, copy) -> None:
    for epoch, name in enumerate(names):
        save(tmp_path, name, epoch, epoch=epoch)
    assert average(tmp_path, "*.pth*") == 2
    shutil.copy(tmp_path / names[1], tmp_path / copy)
    with pytest.raises(CheckpointError, match=r"must have other weights .* have the same: one is a copy") as error:
        average(tmp_path, "*.pth*")
    assert names[1] in str(error.value)
    assert copy in str(error.value)
    assert average(tmp_path, "*.pth*", mixed=True) == 3


def test_a_copy_without_its_optimizer_and_without_a_moment_is_found(tmp_path) -> None:
    save(tmp_path, "a.pt", 1)
    save(tmp_path, "b.pt", 2, optimizer={"state": {}})
    save(tmp_path, "final.pt", 2)
    with pytest.raises(CheckpointError, match=r"b.pt and .*final.pt have the same"):
        average(tmp_path, "*.pt")


def test_checkpoints_of_other_steps_may_have_the_same_weights(tmp_path) -> None:
    for step in (1, 2):
        save(tmp_path, f"step-{step}.pt", 1)
    assert average(tmp_path, "*.pt") == 2


def test_a_tensor_that_is_the_same_in_all_makes_no_copy(tmp_path) -> None:
    for name, number in (("a.pt", 1), ("b.pt", 2), ("c.pt", 3)):
        save(tmp_path, name, number)
    assert average(tmp_path, "*.pt") == 3

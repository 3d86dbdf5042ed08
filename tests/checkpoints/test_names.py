"""Checkpoints whose names differ by wrappers alone are of one model: a resumed run may be compiled or wrapped."""

import pytest
import torch
from safetensors.torch import load_file

from polyak import CheckpointError
from polyak.checkpoints import average_checkpoints
from polyak.cli import main

NAMES = ("net.0.weight", "net.1.bias")
WRAPPED = {
    "torch.compile": ("_orig_mod.net.0.weight", "_orig_mod.net.1.bias"),
    "a compiled layer": ("net.0._orig_mod.weight", "net.1.bias"),
    "DDP": ("module.net.0.weight", "module.net.1.bias"),
    "DDP of a compiled model": ("module._orig_mod.net.0.weight", "module._orig_mod.net.1.bias"),
    "checkpointed activations": ("net.0._checkpoint_wrapped_module.weight", "net.1._checkpoint_wrapped_module.bias"),
    "FSDP": ("_fsdp_wrapped_module.net.0.weight", "net.1._fsdp_wrapped_module.bias"),
}


def save(path, names, number: float) -> None:
    torch.save({"model": {name: torch.full((2,), float(number + i)) for i, name in enumerate(names)}}, path)


@pytest.mark.parametrize("kind", list(WRAPPED))
@pytest.mark.parametrize("newest", ["wrapped", "plain"])
def test_names_that_differ_by_wrappers_are_those_of_the_newest(tmp_path, kind, newest) -> None:
    order = (NAMES, WRAPPED[kind]) if newest == "wrapped" else (WRAPPED[kind], NAMES)
    for step, names in enumerate(order, 1):
        save(tmp_path / f"step-{step}.pt", names, 2.0 * step)
    average_checkpoints([tmp_path / "step-1.pt", tmp_path / "step-2.pt"], tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert {name: one[0].item() for name, one in found.items()} == {order[1][0]: 3.0, order[1][1]: 4.0}


def test_two_tensors_of_one_name_without_wrappers_stay_as_they_are(tmp_path) -> None:
    save(tmp_path / "step-1.pt", ("w", "_orig_mod.w"), 1)
    save(tmp_path / "step-2.pt", ("w", "v"), 1)
    with pytest.raises(CheckpointError, match="it lacks v; only it has _orig_mod.w"):
        average_checkpoints([tmp_path / "step-1.pt", tmp_path / "step-2.pt"], tmp_path / "out.safetensors")


def test_diff_compares_a_compiled_model_with_a_plain_one(tmp_path, capsys) -> None:
    save(tmp_path / "a.pt", NAMES, 1)
    save(tmp_path / "b.pt", WRAPPED["torch.compile"], 1)
    assert main(["diff", str(tmp_path / "a.pt"), str(tmp_path / "b.pt")]) == 0
    assert "2 compared, 2 of them the same" in capsys.readouterr().out


def test_names_in_front_of_which_is_one_word_more_say_how_to_take_it_off(tmp_path) -> None:
    save(tmp_path / "a.ckpt", ["model.net.0.weight", "model.net.1.bias"], 1)
    save(tmp_path / "b.ckpt", NAMES, 2)
    with pytest.raises(CheckpointError, match=r"write it without model. by polyak average .*a.ckpt --prefix model. -o"):
        average_checkpoints([tmp_path / "a.ckpt", tmp_path / "b.ckpt"], tmp_path / "out.safetensors")

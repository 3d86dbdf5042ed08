"""What is silently wrong elsewhere is refused by name: other infinities, codes, numbers that do not fit, two models."""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from polyak.checkpoints import average_checkpoints
from polyak.cli import main


@pytest.fixture
def average(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        before = sorted(tmp_path.iterdir())
        code = main(["average", *arguments, "-o", "out.safetensors"])
        printed = capsys.readouterr()
        assert code == 0 or (printed.err.count("\n"), sorted(tmp_path.iterdir())) == (1, before)
        return printed.out if code == 0 else printed.err

    return run


def save(*states) -> None:
    for i, state in enumerate(states, 1):
        torch.save(state, f"step-{i}.pt")


CODES = {
    "float8 with scales": ("l.weight", torch.ones(4, 3).to(torch.float8_e4m3fn), "l.weight_scale_inv"),
    "int8 of bitsandbytes": ("l.weight", torch.ones(4, 3, dtype=torch.int8), "l.SCB"),
    "4 bits of bitsandbytes": ("l.weight", torch.ones(6, 1, dtype=torch.uint8), "l.weight.absmax"),
    "GPTQ": ("l.qweight", torch.ones(4, 3, dtype=torch.int32), "l.scales"),
    "HQQ": ("l.W_q", torch.ones(4, 3, dtype=torch.uint8), "l.scale"),
    "Quanto": ("l.weight._data", torch.ones(4, 3, dtype=torch.int8), "l.weight._scale"),
    "gpt-oss in MXFP4": ("l.up_proj_blocks", torch.ones(4, 3, dtype=torch.uint8), "l.up_proj_scales"),
}


@pytest.mark.parametrize("kind", list(CODES))
def test_quantized_weights_are_refused_with_their_scales(average, kind) -> None:
    codes, tensor, scales = CODES[kind]
    save(*[{codes: tensor, scales: torch.ones(4)}] * 2)
    said = average("step-1.pt", "step-2.pt")
    assert f"weights must not be quantized ({codes} in step-1.pt has codes in" in said
    assert f"their scales are in {scales}); dequantize the checkpoints first" in said


def test_float8_without_scales_is_averaged_and_nan_in_it_is_named(average) -> None:
    save(*[{"w": torch.full((4,), number).to(torch.float8_e4m3fn)} for number in (1.0, 2.0)])
    average("step-1.pt", "step-2.pt")
    assert load_file("out.safetensors")["w"].float().tolist() == [1.5] * 4
    Path("out.safetensors").unlink()
    torch.save({"w": torch.full((4,), torch.nan).to(torch.float8_e4m3fn)}, "step-2.pt")
    assert "w in step-2.pt has NaN" in average("step-1.pt", "step-2.pt")


def test_numbers_of_4_bits_are_refused(average) -> None:
    save(*[{"w": torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), "b": torch.ones(2)}] * 2)
    assert "must not be quantized (w in step-1.pt is of torch.float4_e2m1fn_x2)" in average("step-1.pt", "step-2.pt")


@pytest.mark.parametrize("which", [1, 2])
def test_an_infinity_in_one_checkpoint_is_named_and_those_of_a_mask_stay(average, which) -> None:
    mask = torch.tensor([0.0, -torch.inf])
    save(*[{"w": torch.ones(2), "mask": mask}] * 2)
    average("step-1.pt", "step-2.pt")
    assert load_file("out.safetensors")["mask"].tolist() == mask.tolist()
    Path("out.safetensors").unlink()
    torch.save({"w": torch.tensor([1.0, torch.inf]), "mask": mask}, f"step-{which}.pt")
    assert f"(w in step-{which}.pt has others than in step-{3 - which}.pt)" in average("step-1.pt", "step-2.pt")


def test_an_average_that_does_not_fit_the_dtype_of_the_newest_is_refused(average) -> None:
    save({"w": torch.full((3,), 1e6)}, {"w": torch.ones(3).half()})
    said = average("step-1.pt", "step-2.pt")
    assert (
        "must fit the dtype of the newest checkpoint (w has 5e+05, more than torch.float16 of step-2.pt holds)" in said
    )


@pytest.mark.parametrize("weight", ["1e300", "1e308", "1e-320"])
def test_very_large_and_small_weights_count_as_their_shares(average, weight) -> None:
    save({"w": torch.full((3,), 1e10)}, {"w": torch.full((3,), 3e10)})
    average("step-1.pt", "step-2.pt", "--weights", f"{weight},{weight}")
    assert load_file("out.safetensors")["w"].tolist() == [2e10] * 3


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_two_models_in_one_folder_are_refused(average) -> None:
    for number in (1, 2):
        folder = Path(f"step-{number}")
        folder.mkdir()
        for file in ("model.safetensors", "model-1.safetensors", "pytorch_model.bin"):
            save_file({"w": torch.full((2,), float(number))}, folder / file)
        index = {"weight_map": {"w": "model-1.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    said = average("step-1", "step-2")
    assert "one model (step-1 has model.safetensors.index.json, model.safetensors); give the file instead" in said
    for number in (1, 2):
        Path(f"step-{number}/model.safetensors.index.json").unlink()
    average("step-1", "step-2")  # as from_pretrained, which takes safetensors before .bin
    assert load_file("out.safetensors")["w"].tolist() == [1.5, 1.5]
    Path("out.safetensors").unlink()
    for number in (1, 2):
        dcp.save({"w": torch.ones(2)}, checkpoint_id=f"step-{number}", no_dist=True)
    assert "(step-1 has .metadata and model.safetensors, pytorch_model.bin)" in average("step-1", "step-2")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_folder_of_dcp_that_is_not_complete_is_refused(average) -> None:
    for number in (1, 2):
        dcp.save({"w": torch.ones(400)}, checkpoint_id=f"step-{number}", no_dist=True)
    Path("step-2/.metadata").unlink()
    assert "(step-2 has __0_0.distcp); its .metadata is missing, which is saved last" in average("step-1", "step-2")


def test_a_folder_that_may_not_be_read_is_named(average, monkeypatch) -> None:
    for number in (1, 2):
        Path(f"step-{number}").mkdir()
        save_file({"w": torch.ones(2)}, f"step-{number}/model.safetensors")
    listed = Path.iterdir

    def denied(path):
        if path.name == "step-2":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "iterdir", denied)
        code = main(["average", "step-1", "step-2", "-o", "out.safetensors"])
    assert code == 2
    assert not Path("out.safetensors").exists()


def test_links_in_a_circle_are_named(average) -> None:
    save({"w": torch.ones(2)})
    Path("step-2.pt").symlink_to("other")
    Path("other").symlink_to("step-2.pt")
    assert "step-2.pt" in average("step-1.pt", "step-2.pt")


@pytest.mark.skipif(not hasattr(os, "link"), reason="needs hard links")
def test_a_hard_link_is_the_same_checkpoint(average) -> None:
    save({"w": torch.ones(2)})
    os.link("step-1.pt", "last.pt")
    assert "each checkpoint must be given once (twice: last.pt)" in average("step-1.pt", "last.pt")


def test_a_pointer_of_git_lfs_says_what_to_run(average) -> None:
    save({"w": torch.ones(2)})
    Path("step-2.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12345\n")
    assert "step-2.safetensors cannot be read: it is a pointer of Git LFS" in average("step-1.pt", "step-2.safetensors")


def test_fewer_checkpoints_than_were_asked_for_are_said(average) -> None:
    save({"w": torch.ones(2)}, {"w": torch.ones(2)})
    assert "9 checkpoints were asked for, and there are 2: all are averaged" in average("step-*.pt", "--last", "9")


def test_snapshots_of_two_widths_are_refused_and_one_width_is_averaged_by_its_images(average) -> None:
    for thousands in (1024, 2048):
        for width in ("0.050", "0.100"):
            torch.save({"w": torch.full((2,), float(thousands))}, f"network-snapshot-{thousands:07d}-{width}.pt")
    said = average("network-snapshot-*.pt")
    assert "averages of one width (network-snapshot-0002048-0.050.pt is of 0.050" in said
    assert "such as *-0.050.pt, or average all with --mixed" in said
    said = average("network-snapshot-*-0.050.pt", "--half-life", "1024000sp")
    assert "1024000sp  0.3333" in said


def test_average_checkpoints_has_the_same_answers_in_python(tmp_path) -> None:
    torch.save({"l.qweight": torch.ones(4, 3, dtype=torch.int32), "l.scales": torch.ones(4)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="must not be quantized"):
        average_checkpoints([tmp_path / "a.pt"], tmp_path / "out.pt")

"""The commands on folders of checkpoints of other libraries."""

import json
import shlex
import sys
from pathlib import Path

import foreign_runs as runs
import pytest
import torch
from safetensors.torch import load_file

from polyak import Record, Window
from polyak.cli import main

FILES = Path(__file__).parents[1] / "checkpoints" / "series_files"
STORED = ["--stored", "power=0.05,power=0.28", "--update-every", "1"]


def test_reconstruct_reads_a_folder_of_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs.write_icefall(tmp_path, 800, 100, period=1)
    output = tmp_path.parent / "averaged.safetensors"
    assert main(["reconstruct", str(tmp_path), "--window", "400ba", "-o", str(output), "--json", "--force"]) == 0
    assert json.loads(capsys.readouterr().out)["error_estimate"] == 0
    assert runs.error(load_file(output), Window("400ba"), 800) < 1e-4


def test_reconstruct_reads_a_folder_of_post_hoc_ema(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "averaged.safetensors"
    folder = str(FILES / "ema_pytorch")
    assert main(["reconstruct", folder, "--power", "0.15", "-o", str(output)]) != 0
    assert "--stored power=0.05,power=0.28 --update-every 10" in capsys.readouterr().err
    assert main(["reconstruct", folder, "--power", "0.15", "-o", str(output), *STORED]) == 0


def test_inspect_lists_what_checkpoints_store_and_the_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.write_raw(tmp_path, 1600, 100)
    assert main(["inspect", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "checkpoints of training weights" in shown
    assert "the weights of the moment" in shown
    assert "25ba: refused" in shown
    assert main(["inspect", str(FILES / "ema_pytorch"), "--json", "--verify", *STORED]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["kind"] == "folder of PostHocEMA"
    assert plain["averages"][-1]["profile"].startswith("power function with gamma")
    assert plain["verified"]


EVALUATE = """
def loss(state):
    return {"loss": float(state["weight"].double().square().mean())}
"""


@pytest.mark.parametrize("pattern", ["", "/*.pt"])
def test_a_sweep_prints_a_command_that_gives_its_best_average_of_checkpoints_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], pattern: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("evaluate.py").write_text(EVALUATE)
    folder = f"{FILES / 'ema_pytorch'}{pattern}"
    line = ["sweep", folder, "--evaluate", "evaluate.py:loss", *STORED, "--profiles", "power=0.1,power=0.2", "--json"]
    assert main(line) == 0
    command = shlex.split(json.loads(capsys.readouterr().out)["reconstruct"])
    assert command[3:7] == STORED
    assert main(command[1:]) == 0
    assert Path("averaged.safetensors").read_bytes() == Path("polyak-sweep/best.safetensors").read_bytes()
    sys.modules.pop("polyak_user_evaluate", None)


def test_recommend_reads_checkpoints_and_prints_a_command_that_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run 1").mkdir()
    runs.write_icefall(Path("run 1"), 1600, 100, period=1)
    assert main(["recommend", "run 1", "--key", "model_avg"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    command = shlex.split(said.partition("To write it: ")[2])
    assert command[2:5] == [str(tmp_path / "run 1"), "--key", "model_avg"]
    assert main(command[1:]) == 0
    assert Path("averaged.safetensors").exists()
    assert main(["recommend", "run 1", "-o", "run 1/out.safetensors"]) != 0
    assert "-o must not be the input or in its folder" in capsys.readouterr().err


def test_checkpoints_that_a_command_line_cannot_say_give_no_command(tmp_path: Path) -> None:
    runs.write_raw(tmp_path, 400, 100)
    assert Record.from_checkpoints(tmp_path, prefix="").arguments == str(tmp_path)
    assert Record.from_checkpoints(sorted(tmp_path.glob("*.pt"))).arguments is None


def test_options_of_checkpoints_are_refused_for_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "none")
    assert main(["reconstruct", folder, "--window", "4ba", "-o", str(tmp_path / "o.safetensors"), *STORED]) != 0
    assert "--stored must be for checkpoints of another library" in capsys.readouterr().err


def test_a_share_of_a_run_of_another_library_is_of_what_there_is_of_it(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    for step, weights in enumerate(torch.randn(32, 6).cumsum(0), 1):
        torch.save({"model": {"w": weights.clone()}, "step": 10 * step}, f"step-{10 * step}.pt")
    for half_life, out in (("0.25dur", "a.safetensors"), ("80ba", "b.safetensors")):
        assert main(["reconstruct", "step-*.pt", "--half-life", half_life, "-o", out]) == 0
    assert torch.equal(load_file("a.safetensors")["w"], load_file("b.safetensors")["w"])

"""Nothing is overwritten without ``--force``: neither a file, nor the results of another record."""

import json
import sys

import pytest
import torch
import warm
from records import record
from safetensors.torch import load_file

from polyak.cli import main


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record(tmp_path / "run", updates=64)
    (tmp_path / "evaluate.py").write_text("def validate(state): return float(state['0.weight'].norm())")
    torch.save({"n_averaged": torch.tensor(3), "module.weight": torch.ones(2)}, tmp_path / "a.pt")
    yield tmp_path
    sys.modules.pop("polyak_user_evaluate", None)


@pytest.mark.parametrize("line", ["convert a.pt", "reconstruct run --half-life 20ba"])
def test_an_existing_file_is_replaced_with_force_alone(here, capsys, line) -> None:
    output = here / "out.safetensors"
    output.write_text("mine")
    assert main([*line.split(), "-o", "out.safetensors"]) == 2
    assert "out.safetensors exists); choose another, or add --force to replace it" in capsys.readouterr().err
    assert output.read_text() == "mine"
    assert main([*line.split(), "-o", "out.safetensors", "--force"]) == 0
    assert load_file(output)


SWEEP = ["--evaluate", "evaluate.py:validate", "--points", "2", "--refine", "0", "--out", "out"]


def records(here):
    return {json.loads(line)["record"] for line in (here / "out" / "sweep.jsonl").read_text().splitlines()}


@pytest.mark.slow
def test_a_sweep_does_not_replace_the_results_of_another_record(here, capsys) -> None:
    record(here / "other", updates=64, interval=4)
    assert main(["sweep", "run", *SWEEP]) == 0
    before = {path.name: path.read_bytes() for path in (here / "out").iterdir()}
    capsys.readouterr()
    assert main(["sweep", "other", *SWEEP]) == 2
    said = capsys.readouterr().err
    assert f"--out must not have the results of another record (out has those of {here / 'run'})" in said
    assert {path.name: path.read_bytes() for path in (here / "out").iterdir()} == before
    assert main(["sweep", "other", *SWEEP, "--force"]) == 0
    assert records(here) == {str(here / "other")}
    assert main(["sweep", "run", *SWEEP]) == 2


@pytest.mark.slow
def test_a_record_that_was_moved_keeps_its_results(here, capsys) -> None:
    assert main(["sweep", "run", *SWEEP]) == 0
    (here / "run").rename(here / "moved")
    content = (here / "out" / "sweep.jsonl").read_bytes()
    assert main(["sweep", "moved", *SWEEP]) == 0
    assert (here / "out" / "sweep.jsonl").read_bytes() == content


def test_a_sweep_does_not_replace_files_that_are_not_of_a_sweep(here, capsys) -> None:
    (here / "out").mkdir()
    (here / "out" / "best.safetensors").write_text("mine")
    assert main(["sweep", "run", *SWEEP]) == 2
    assert "(out has best.safetensors but no sweep.jsonl)" in capsys.readouterr().err
    assert (here / "out" / "best.safetensors").read_text() == "mine"
    assert main(["sweep", "run", *SWEEP, "--force"]) == 0
    assert load_file(here / "out" / "best.safetensors")


def test_a_program_that_converts_in_a_loop_may_replace_what_it_wrote_itself(here, capsys) -> None:
    line = ["convert", "a.pt", "-o", "again.safetensors"]
    assert main(line) == main(line) == 0
    refused = warm.run("-m", "polyak", *line, cwd=here)
    assert refused.returncode == 2
    assert "add --force to replace it" in refused.stderr

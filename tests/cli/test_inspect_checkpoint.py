"""``polyak inspect`` and ``polyak diff`` of checkpoints of any library."""

import json

import checkpoint_files
import pytest
import torch
from safetensors.torch import save_file

from polyak.cli import main


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a command in a folder of its own; return its exit code and what it printed."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> tuple[int, str]:
        code = main(list(arguments))
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return command


@pytest.mark.parametrize("name", list(checkpoint_files.FORMATS))
def test_inspect_reads_every_format_that_average_reads(run, tmp_path, name) -> None:
    path = checkpoint_files.write(name, tmp_path, 3.0)
    code, said = run("inspect", path.name, "--json")
    assert code == 0
    plain = json.loads(said)
    assert plain["moment"]["ba"] == 300
    assert [one["tensors"] for one in plain["state_dicts"]] == [9]
    code, said = run("inspect", path.name)
    assert code == 0
    assert f"Checkpoint {path.name}" in said
    assert "300ba" in said


def test_inspect_shows_all_state_dicts_with_their_keys_and_the_metrics(run, tmp_path) -> None:
    raw = {"w": torch.zeros(1000, 3)}
    content = {"model": raw, "ema": {"module": {"w": torch.zeros(9).half()}}, "epoch": 2, "val_loss": 0.25}
    torch.save(content, tmp_path / "it.pt")
    code, said = run("inspect", "it.pt")
    assert code == 0
    rows = [line.split() for line in said.splitlines()]
    assert ["model", "1", "3,000", "float32", "12.0", "kB"] in rows
    assert ["ema.module", "1", "9", "float16", "18", "B"] in rows
    assert "val_loss 0.25" in said
    assert "2ep" in said
    assert "--key" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["it.pt", "--verify"], "--verify must be for a record (it.pt is none)"),
        (["empty"], "must have weights in it"),
        (["none"], "RECORD must be there (there is no none)"),
    ],
)
def test_inspect_refuses_in_one_line(run, tmp_path, arguments, said) -> None:
    torch.save({"w": torch.zeros(2)}, tmp_path / "it.pt")
    (tmp_path / "empty").mkdir()
    code, printed = run("inspect", *arguments)
    assert code == 2
    assert said in printed
    assert printed.count("\n") == 1


@pytest.fixture
def pair(tmp_path):
    first = {"near": torch.ones(4), "far": torch.ones(4), "same": torch.ones(4), "a": torch.ones(1)}
    second = {"near": torch.full((4,), 1.5), "far": torch.full((4,), 3.0), "same": torch.ones(4), "b": torch.ones(1)}
    save_file({**first, "shape": torch.ones(2)}, tmp_path / "a.safetensors")
    torch.save({"model": {**second, "shape": torch.ones(3)}}, tmp_path / "b.pt")


@pytest.mark.usefixtures("pair")
def test_diff_shows_the_largest_distances_first_and_what_only_one_has(run) -> None:
    code, said = run("diff", "a.safetensors", "b.pt")
    assert code == 0
    rows = [line.split() for line in said.splitlines()]
    assert rows[2:6] == [
        ["shape", "-", "-", "float32", "[2]", "to", "float32", "[3]"],
        ["far", "2", "2", "float32", "[4]"],
        ["near", "0.5", "0.5", "float32", "[4]"],
        ["same", "0", "0", "float32", "[4]"],
    ]
    assert "4 compared, 1 of them the same" in said
    assert ["only", "in", "A", "1:", "a"] in rows
    assert ["only", "in", "B", "1:", "b"] in rows


@pytest.mark.usefixtures("pair")
def test_diff_shows_the_top_alone_and_json_for_programs(run) -> None:
    code, said = run("diff", "a.safetensors", "b.pt", "--top", "2")
    assert code == 0
    assert "near" not in said
    plain = json.loads(run("diff", "a.safetensors", "b.pt", "--json")[1])
    assert [one["name"] for one in plain["tensors"]] == ["shape", "far", "near", "same"]
    assert plain["relative"] == pytest.approx(((4 * 0.25 + 4 * 4) / 12) ** 0.5)
    assert (plain["only_in_first"], plain["only_in_second"]) == (["a"], ["b"])
    assert len(json.loads(run("diff", "a.safetensors", "b.pt", "--json", "--top", "1")[1])["tensors"]) == 1


@pytest.mark.usefixtures("pair")
def test_diff_takes_two_state_dicts_of_one_file(run, tmp_path) -> None:
    torch.save({"model": {"w": torch.ones(2)}, "ema": {"w": torch.full((2,), 2.0)}}, tmp_path / "it.pt")
    plain = json.loads(run("diff", "it.pt", "it.pt", "--key", "model", "--second-key", "ema", "--json")[1])
    assert plain["relative"] == 1

"""``polyak sweep`` and ``polyak recommend`` under torchrun: each line is printed once, and each file written once."""

import json
from pathlib import Path

import pytest
import sweeps_in_ranks as jobs
from launching import torchrun
from records import record
from safetensors.torch import load_file

from polyak.cli import main

pytestmark = pytest.mark.slow  # processes of several ranks

EVALUATE = """
import os
from pathlib import Path

import records

def validate(state):
    with Path("ranks.txt").open("a") as file:
        file.write(os.environ.get("RANK", "alone") + "\\n")
    print("evaluated")
    return records.validate(state)

def fails(state):
    if os.environ.get("RANK") == "1":
        raise ZeroDivisionError("here")
    return records.validate(state)

def losses(state):
    import torch

    model = records.build().eval()
    model.load_state_dict(state)
    with torch.no_grad():
        return torch.cat([(model(x) - y).square().flatten() for x, y in records.data(seed=1, batches=8)])
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    record(folder / "run")
    (folder / "evaluate.py").write_text(EVALUATE)
    return folder


def test_a_sweep_under_torchrun_prints_and_writes_what_one_process_does(here, monkeypatch, capsys) -> None:
    monkeypatch.chdir(here)
    command = ["sweep", "run", "--evaluate", "evaluate.py:validate", "--metric", "loss", "--json", "--out"]
    done = torchrun("-m", "polyak", *command, "two")
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout)
    ranks = Path("ranks.txt").read_text().split()
    assert len(ranks) == len(two["results"])
    assert set(ranks) == {"0", "1"}
    assert main([*command, "one"]) == 0
    one = json.loads(capsys.readouterr().out)
    for found in (one, two):
        for result in found["results"]:
            del result["seconds"]
    assert two["results"] == one["results"]
    averages = [load_file(f"{name}/best.safetensors") for name in ("one", "two")]
    assert all(averages[0][name].equal(averages[1][name]) for name in averages[0])
    assert {path.name for path in Path("two").iterdir()} == {path.name for path in Path("one").iterdir()}


def test_an_error_of_a_command_on_several_ranks_is_printed_once_and_each_exits_with_2(ranks, here) -> None:
    sweep = ["sweep", "run", "--evaluate", "evaluate.py:fails", "--metric", "loss", "--out"]
    failed = ranks.run(2, jobs.command, str(here), *sweep, "failed")
    assert [code for code, _, _ in failed] == [2, 2]
    assert "polyak sweep: evaluating half-life" in failed[1][2]
    assert "ZeroDivisionError: here\n" in failed[1][2]  # the traceback
    assert "evaluating" not in failed[0][2].replace("done; now", "")
    assert not (here / "failed" / "best.safetensors").exists()
    refused = ranks.run(2, jobs.command, str(here), *sweep, "run")
    assert [code for code, _, _ in refused] == [2, 2]
    assert [err.count("--out must not be the folder of the record") for _, _, err in refused] == [1, 0]


def test_a_recommendation_on_several_ranks_is_printed_and_written_once(ranks, here, monkeypatch, capsys) -> None:
    command = ["recommend", "run", "--evaluate", "evaluate.py:losses", "--json", "-o"]
    (code, out, _), other = ranks.run(2, jobs.command, str(here), *command, "two.safetensors")
    monkeypatch.chdir(here)
    assert main([*command, "one.safetensors"]) == 0
    assert (code, json.loads(out)) == (0, json.loads(capsys.readouterr().out) | {"output": "two.safetensors"})
    assert other == (0, "", "")
    assert Path("two.safetensors").read_bytes() == Path("one.safetensors").read_bytes()
    (_, out, _), other = ranks.run(2, jobs.command, str(here), "recommend", "run", "--json")
    assert json.loads(out)["comparison"] is None
    assert other == (0, "", "")

"""``polyak sweep`` and ``polyak recommend`` under torchrun: each line is printed once, and each file written once."""

import json
from pathlib import Path

import pytest
from launching import torchrun
from records import record
from safetensors.torch import load_file

import polyak
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


def test_a_sweep_on_two_processes_prints_and_writes_what_one_process_does(here, monkeypatch, capsys) -> None:
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
    refused = torchrun("-m", "polyak", *command[:3], "evaluate.py:fails", "--metric", "loss", "--out", "three")
    assert refused.returncode != 0
    assert refused.stderr.count("polyak sweep: evaluating half-life") == 1
    assert refused.stderr.count("ZeroDivisionError: here\n") == 1  # the traceback
    taken = torchrun("-m", "polyak", *command, "run")
    assert taken.stderr.count("polyak sweep: --out must not be the folder of the record") == 1


def test_a_recommendation_on_two_processes_is_printed_and_written_once(here, monkeypatch, capsys) -> None:
    monkeypatch.chdir(here)
    command = ["recommend", "run", "--evaluate", "evaluate.py:losses", "--json", "-o"]
    done = torchrun("-m", "polyak", *command, "two.safetensors")
    assert done.returncode == 0, done.stderr
    assert main([*command, "one.safetensors"]) == 0
    two, one = json.loads(done.stdout), json.loads(capsys.readouterr().out)
    assert two | {"output": ""} == one | {"output": ""}
    assert Path("two.safetensors").read_bytes() == Path("one.safetensors").read_bytes()
    assert polyak.recommend("run").half_life is not None
    without = torchrun("-m", "polyak", "recommend", "run", "--json")
    assert json.loads(without.stdout)["comparison"] is None

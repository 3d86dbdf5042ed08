"""``--json``: one object on stdout, with the keys that the help names, and nothing else."""

import json
import sys

import pytest
import torch
from records import record

from polyak.cli import COMMANDS, main

EVALUATE = """
print("imported")

def validate(state):
    print("evaluating")
    return {"loss": [float(state["0.weight"].norm()) + n for n in range(9)], "accuracy": float("nan")}

def norm(state):
    return float(state["weight"].norm())

def build():
    print("building")
    from records import build
    return build()
"""

LINES = {
    "average": "average model-1.pt model-2.pt -o averaged.safetensors",
    "convert": "convert a.pt -o converted.safetensors",
    "diff": "diff model-1.pt model-2.pt",
    "env": "env",
    "inspect": "inspect run",
    "plan": "plan evaluate.py:build",
    "recommend": "recommend run",
    "reconstruct": "reconstruct run --half-life 20ba -o new.safetensors",
    "soup": "soup model-1.pt model-2.pt --evaluate evaluate.py:norm -o soup.safetensors",
    "sweep": "sweep run --evaluate evaluate.py:validate --points 3 --refine 1",
    "watch": "watch run --evaluate evaluate.py:validate --patience 1",  # a line for each moment: there is one
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record(tmp_path / "run", updates=64)
    (tmp_path / "evaluate.py").write_text(EVALUATE)
    for n in (1, 2):
        torch.save({"weight": torch.full((2,), float(n))}, tmp_path / f"model-{n}.pt")
    torch.save({"n_averaged": torch.tensor(3), "module.weight": torch.ones(2)}, tmp_path / "a.pt")
    yield tmp_path
    sys.modules.pop("polyak_user_evaluate", None)


def printed(capsys, line):
    assert main([*line.split(), "--json"]) == 0
    return json.loads(capsys.readouterr().out, parse_constant=pytest.fail)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.NAME)
def test_a_command_prints_one_object_with_the_keys_of_its_help(here, capsys, command) -> None:
    if command.NAME == "demo":
        plain = printed(capsys, "demo --steps 10 --out demo")
    else:
        plain = printed(capsys, LINES[command.NAME])
    documented = {key for keys in command.JSON for key in keys.split(", ")}
    earlier = {"stretches"} if command.NAME == "inspect" else set()
    assert set(plain) == documented | earlier
    with pytest.raises(SystemExit):
        main([command.NAME, "--help"])
    text = capsys.readouterr().out
    assert all(f"\n  {keys} " in text for keys in command.JSON)


def test_the_object_of_a_sweep_has_the_best_and_all_results(here, capsys) -> None:
    plain = printed(capsys, LINES["sweep"])
    assert plain["metric"] == "loss"
    assert plain["direction"] == "minimize"
    assert plain["best"] in plain["results"]
    assert plain["best"]["metrics"]["accuracy"] is None
    low, high = plain["best"]["interval"]
    assert low < plain["best"]["metrics"]["loss"] < high
    assert plain["as_good_as_best"]["examples"] == 9
    command = plain["reconstruct"].replace("averaged.safetensors", "again.safetensors").split()[1:]
    assert main(command) == 0
    again, best = ((here / name).read_bytes() for name in ("again.safetensors", "polyak-sweep/best.safetensors"))
    assert again == best
    assert sorted(path.name for path in (here / "polyak-sweep").iterdir()) == sorted(
        name.rpartition("/")[2] for name in plain["files"]
    )


def test_an_error_with_json_prints_nothing_on_stdout(here, capsys) -> None:
    assert main(["inspect", "none", "--json"]) == 2
    out, said = capsys.readouterr()
    assert out == ""
    assert said.startswith("polyak inspect: ")

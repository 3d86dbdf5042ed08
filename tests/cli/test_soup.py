"""The command `polyak soup`."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from polyak.cli import main

EVALUATE = """
def loss(state):
    print("evaluating")
    return {"loss": abs(float(state["w"]) - 2.5), "size": float(state["w"])}

def broken(state):
    raise KeyError("model")
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Four checkpoints in the working directory; run the command, return its exit code and what it printed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evaluate.py").write_text(EVALUATE)
    for number in (1, 2, 3, 9):
        save_file({"w": torch.tensor([float(number)]), "n": torch.tensor(number)}, tmp_path / f"{number}.safetensors")

    def command(*arguments: str) -> tuple[int, str, str]:
        code = main(["soup", "[0-9].safetensors", "-o", "out.pt", "--evaluate", *arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    yield command
    sys.modules.pop("polyak_user_evaluate", None)


def test_a_soup_is_written_with_what_made_it_better_and_the_integers_of_the_best(run, tmp_path) -> None:
    code, said, progress = run("evaluate.py:loss", "--json")
    assert code == 0
    plain = json.loads(said)
    assert [(one["path"][0], one["kept"]) for one in plain["checkpoints"]] == [
        ("2", True),
        ("3", True),
        ("1", False),
        ("9", False),
    ]
    assert (plain["metric"], plain["direction"], plain["value"]) == ("loss", "minimize", 0)
    assert torch.load(tmp_path / "out.pt", weights_only=True) == {"w": torch.tensor([2.5]), "n": torch.tensor(2)}
    assert "polyak soup: " in progress


def test_the_metric_and_its_direction_can_be_said(run, tmp_path) -> None:
    code, _, said = run("evaluate.py:loss", "--metric", "size")
    assert code == 2
    assert "whether a lower or a higher size is better" in said
    code, said, _ = run("evaluate.py:loss", "--metric", "size", "--maximize")
    assert code == 0
    assert "1 of 4 checkpoints: size 9" in said
    assert torch.load(tmp_path / "out.pt", weights_only=True)["w"] == 9


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["evaluate.py:none"], "there is no function 'none'"),
        (["evaluate.py:broken"], "evaluating 1.safetensors failed: KeyError: 'model'"),
        (["evaluate.py:loss", "--metric", "acc", "--maximize"], "--metric must be one that loss returns"),
    ],
    ids=str,
)
def test_a_wrong_function_is_refused_and_nothing_is_written(run, tmp_path, arguments, said) -> None:
    code, _, printed = run(*arguments)
    assert code == 2
    assert said in printed
    assert not (tmp_path / "out.pt").exists()


def test_a_soup_says_what_it_was_made_from(run, tmp_path) -> None:
    assert main(["soup", "[0-9].safetensors", "-o", "out.safetensors", "--evaluate", "evaluate.py:loss"]) == 0
    assert load_file(tmp_path / "out.safetensors")["w"].item() == 2.5


def test_a_sweep_writes_the_best_number_of_the_newest_and_its_results_are_reused(run, tmp_path, capsys) -> None:
    code, said, _ = run("evaluate.py:loss", "--sweep", "--json")
    assert code == 0
    plain = json.loads(said)
    assert [(one["name"], one["metrics"]["loss"]) for one in plain["means"]] == [
        ("newest", 6.5),
        ("last 2", 3.5),
        ("last 3", pytest.approx(14 / 3 - 2.5)),
        ("last 4", 1.25),
        ("2, every 2nd", 3),
    ]
    assert plain["best"] == plain["means"][3]
    assert plain["best"]["paths"] == [f"{n}.safetensors" for n in (1, 2, 3, 9)]
    assert torch.load(tmp_path / "out.pt", weights_only=True) == {"w": torch.tensor([3.75]), "n": torch.tensor(9)}
    assert len((tmp_path / "out.pt.sweep.jsonl").read_text().splitlines()) == 5
    before = (tmp_path / "out.pt.sweep.jsonl").read_bytes()
    code, said, progress = run("evaluate.py:loss", "--sweep", "--force")
    assert (code, progress) == (0, "")
    assert (tmp_path / "out.pt.sweep.jsonl").read_bytes() == before
    assert "last 4 (best)" in said
    assert "best     last 4: loss 1.25" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--counts", "1,2"], "--counts must come with --sweep"),
        (["--sweep", "--counts", "0"], "it must be whole numbers of at least 1, such as 1,2,5 (got '0')"),
        (["--sweep", "--counts", "9"], "counts must be at most the number of checkpoints (got 9 for 4)"),
        (["--sweep", "--spacings", "a"], "it must be whole numbers of at least 1"),
    ],
    ids=str,
)
def test_a_wrong_argument_of_a_sweep_is_refused_in_one_line(run, tmp_path, capsys, arguments, said) -> None:
    try:
        code, _, printed = run("evaluate.py:loss", *arguments)
    except SystemExit as error:
        code, printed = error.code, capsys.readouterr().err
    assert code == 2
    assert said in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "out.pt").exists()

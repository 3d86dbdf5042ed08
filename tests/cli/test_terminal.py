"""What commands print fits the terminal, at 80 and at 40 columns: lines break at words."""

import re
import subprocess
import sys

import pytest
import torch
import warm
from records import record

from polyak.cli import COMMANDS, main

EVALUATE = """
def validate(state):
    return {"loss": float(state["0.weight"].norm()), "accuracy": 0.5}

def build():
    from records import build
    return build()
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("terminal")
    record(folder / "run", updates=128)
    (folder / "evaluate.py").write_text(EVALUATE)
    torch.save({"n_averaged": torch.tensor(3), "module.weight": torch.ones(2)}, folder / "a.pt")
    yield folder
    sys.modules.pop("polyak_user_evaluate", None)


def fits(text, width):
    """Return whether no line is longer than the width, but for words that are as long by themselves."""
    long = [line for line in text.splitlines() if len(line) > width]
    return not [line for line in long if len(line.split()) > 1 and len(line.rstrip("\\ ").split(" ")[-1]) < width / 2]


LINES = [
    "inspect run",
    "inspect run --verify",
    "reconstruct run --half-life 20ba -o out.safetensors --force",
    "convert a.pt -o converted.safetensors --force",
    "plan evaluate.py:build",
    "env",
    "sweep run --evaluate evaluate.py:validate --points 3 --refine 1 --out out",
    "sweep run --evaluate evaluate.py:validate --points 3 --refine 1 --at 80%,100% --out out2",
]


@pytest.mark.slow
@pytest.mark.parametrize("width", [40, 80])
@pytest.mark.parametrize("line", LINES)
def test_the_output_of_a_command_fits_the_terminal(here, monkeypatch, capsys, line, width) -> None:
    monkeypatch.chdir(here)
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(line.split()) == 0
    out, said = capsys.readouterr()
    assert fits(out, width), out
    assert "Traceback" not in said


@pytest.mark.parametrize("width", [40, 80])
@pytest.mark.parametrize("command", ["", *(command.NAME for command in COMMANDS)])
def test_the_help_of_a_command_fits_the_terminal_and_has_two_examples(monkeypatch, capsys, command, width) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit) as exit_:
        main([*command.split(), "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert fits(text, width), text
    examples = re.findall(rf"^  polyak {command or '[a-z]+'}\b", text, re.MULTILINE)
    assert len(examples) >= 2, text


@pytest.mark.parametrize("width", [40, 80])
def test_errors_and_notes_fit_the_terminal_and_are_one_line_where_there_is_none(
    here, monkeypatch, capsys, width
) -> None:
    monkeypatch.chdir(here)
    line = ["reconstruct", "run", "--half-life", "1ba", "-o", "new.safetensors"]
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(line) == 2
    said = capsys.readouterr().err
    assert max(map(len, said.splitlines())) <= width
    assert said.count("\n") > 1
    monkeypatch.delenv("COLUMNS")
    assert main(line) == 2
    assert capsys.readouterr().err.split() == said.split()


def test_a_line_of_progress_comes_for_each_tenth_of_the_work_where_there_is_no_terminal(
    here, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(here)
    assert (
        main(["sweep", "run", "--evaluate", "evaluate.py:validate", "--points", "30", "--refine", "0", "--out", "out3"])
        == 0
    )
    lines = capsys.readouterr().err.splitlines()
    assert 8 <= len(lines) <= 11
    assert lines[0].startswith("polyak sweep:   0%, 0 of at most ")
    assert all(re.search(r"; now half-life|; now newest mean", line) for line in lines)


def test_the_reader_of_a_pipe_may_stop(here) -> None:
    command = f"{warm.folder()}/polyak inspect run | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=here, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")

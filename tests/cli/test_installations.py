"""The commands work with torch and safetensors alone, and the help needs not even these."""

import os
import subprocess
import sys

import pytest
from records import record

from polyak.cli import COMMANDS

EXTRAS = ("rich", "matplotlib", "plotly", "sklearn", "pandas", "scipy", "tensorboard", "numpy.testing")

RUN = """
import sys
for name in {hidden}:
    sys.modules[name] = None
from polyak.cli import main
codes = []
for line in {lines}:
    try:
        codes.append(main(line.split()))
    except SystemExit as error:
        codes.append(error.code)
    found = [name for name in {forbidden} if sys.modules.get(name) is not None]
    assert not found, (line, found)
    print(file=sys.stderr)
print(codes, file=sys.stderr)
"""


def run(folder, *lines, hidden=(), forbidden=()):
    """Run the command once for each line, in one new interpreter; return the exit codes, stdout and stderr."""
    done = subprocess.run(
        [sys.executable, "-c", RUN.format(lines=lines, hidden=hidden, forbidden=forbidden)],
        cwd=folder,
        env={**os.environ, "COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said, _, codes = done.stderr.rstrip("\n").rpartition("\n")
    return codes, done.stdout, said


def test_the_help_and_the_version_import_no_torch(tmp_path) -> None:
    lines = ["--version", "--help", *(f"{command.NAME} --help" for command in COMMANDS)]
    codes, printed, said = run(tmp_path, *lines, hidden=("torch", "safetensors", "numpy"), forbidden=("torch",))
    assert codes == str([0] * len(lines)), said
    assert said.strip() == ""
    for command in COMMANDS:
        assert f"usage: polyak {command.NAME}" in printed


def test_a_wrong_argument_is_refused_without_torch(tmp_path) -> None:
    codes, _, said = run(tmp_path, "sweep record", hidden=("torch",))
    assert codes == "[2]"
    assert "required: --evaluate" in said


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    record(folder / "run", updates=64)
    (folder / "evaluate.py").write_text("def validate(state): return float(state['0.weight'].norm())")
    return folder


@pytest.mark.slow
def test_the_commands_work_without_any_extra(here) -> None:
    codes, _, said = run(
        here,
        "inspect run --verify",
        "reconstruct run --half-life 20ba -o new.safetensors",
        "convert new.safetensors -o again.safetensors --key model",  # says that the file is none that it knows
        "sweep run --evaluate evaluate.py:validate --points 2 --refine 0",
        "env",
        hidden=EXTRAS,
    )
    assert codes == "[0, 0, 2, 0, 0]", said
    assert "Error" not in said
    assert "needs rich" not in said
    assert sorted(path.name for path in (here / "polyak-sweep").iterdir()) == ["best.safetensors", "sweep.jsonl"]

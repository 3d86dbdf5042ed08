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
try:
    code = main(sys.argv[1:])
except SystemExit as error:
    code = error.code
print([name for name in {forbidden} if sys.modules.get(name) is not None], file=sys.stderr)
sys.exit(code)
"""


def run(folder, *arguments, hidden=(), forbidden=()):
    return subprocess.run(
        [sys.executable, "-c", RUN.format(hidden=hidden, forbidden=forbidden), *arguments],
        cwd=folder,
        env={**os.environ, "COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], *([c.NAME, "--help"] for c in COMMANDS)], ids=str)
def test_the_help_and_the_version_import_no_torch(tmp_path, arguments) -> None:
    done = run(tmp_path, *arguments, hidden=("torch", "safetensors", "numpy"), forbidden=("torch",))
    assert done.returncode == 0, done.stderr
    assert done.stderr == "[]\n"
    assert "polyak" in done.stdout


def test_a_wrong_argument_is_refused_without_torch(tmp_path) -> None:
    done = run(tmp_path, "sweep", "record", hidden=("torch",))
    assert done.returncode == 2
    assert "required: --evaluate" in done.stderr


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    record(folder / "run", updates=64)
    (folder / "evaluate.py").write_text("def validate(state): return float(state['0.weight'].norm())")
    return folder


@pytest.mark.parametrize(
    "line",
    [
        "inspect run --verify",
        "reconstruct run --half-life 20ba -o new.safetensors",
        "convert new.safetensors -o again.safetensors --key model",
        "sweep run --evaluate evaluate.py:validate --points 2 --refine 0",
        "env",
    ],
)
def test_the_commands_work_without_any_extra(here, line) -> None:
    done = run(here, *line.split(), hidden=EXTRAS)
    assert "Error" not in done.stderr, done.stderr
    assert "needs rich" not in done.stderr
    if not line.startswith("convert"):  # which says that the file is none that it knows
        assert done.returncode == 0, done.stderr
    if line.startswith("sweep"):
        assert sorted(path.name for path in (here / "polyak-sweep").iterdir()) == ["best.safetensors", "sweep.jsonl"]

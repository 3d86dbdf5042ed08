"""Type checkers accept the examples as users type them, and refuse what is wrong.

pyrefly is part of the development environment. mypy and pyright run where they are installed: a first run of mypy takes
longer than most tests here.
"""

import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from paths import ROOT

import polyak

SOURCE = Path(polyak.__file__).parents[1]
PAGES = ("README.md", "docs/first-tries.md")
WRONG = """
from torch import nn, optim
from polyak import EMA, attach

model = nn.Linear(1, 1)
optimizer = optim.SGD(model.parameters())
ema = attach(EMA("10 steps", decay=None), model, optimizer)
from polyak import Absent  # wrong
attach(model, optimizer, EMA())  # wrong
attach(EMA(), model)  # wrong
EMA(beta=0.9)  # wrong
EMA(half_life=0.9)  # wrong
EMA(decay="0.9")  # wrong
ema.update()  # wrong
ema.model = model  # wrong
ema(model)  # wrong
ema.metrics()["ema/decay"].upper()  # wrong
with ema.applied() as averaged:
    averaged.eval()
with ema.applied:
    pass
ema.num_updates + ema.save("averaged.safetensors")  # wrong
"""


def _pyrefly() -> list[str]:
    program = Path(sys.executable).with_name("pyrefly")
    if not program.exists():
        pytest.skip("pyrefly is not installed")
    python = ["--python-interpreter-path", sys.executable]
    return [str(program), "check", "--preset=strict", f"--search-path={SOURCE}", "--output-format=min-text", *python]


def _mypy() -> list[str]:
    if not find_spec("mypy"):
        pytest.skip("mypy is not installed")
    # Of torch, functions such as `backward` have no types.
    return [sys.executable, "-m", "mypy", "--strict", "--untyped-calls-exclude=torch", "--warn-unused-ignores"]


def _pyright() -> list[str]:
    if not find_spec("pyright"):
        pytest.skip("pyright is not installed")
    return [sys.executable, "-m", "pyright", "--pythonpath", sys.executable]


def check(command: list[str], file: Path) -> tuple[int, str]:
    """Return the exit status of a type checker and what it prints."""
    # mypy refuses a path to installed packages: there it finds polyak itself.
    own = {"MYPYPATH": str(SOURCE)} if SOURCE == ROOT / "src" else {}
    (file.parent / "pyrightconfig.json").write_text(f'{{"extraPaths": ["{SOURCE.as_posix()}"], "include": ["."]}}')
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(file.parent), **own}
    done = subprocess.run(
        [*command, file.name], cwd=file.parent, env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("checker", [_pyrefly, _mypy, _pyright], ids=["pyrefly", "mypy", "pyright"])
@pytest.mark.parametrize("page", PAGES)
def test_a_type_checker_accepts_the_examples_of_a_page(tmp_path, page, checker: Callable[[], list[str]]) -> None:
    if not (ROOT / page).exists():
        pytest.skip("the documentation is not here")
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert blocks
    (file := tmp_path / "pasted.py").write_text("\n".join(blocks), encoding="utf-8")
    status, said = check(checker(), file)
    assert status == 0, said


@pytest.mark.slow
@pytest.mark.parametrize("checker", [_pyrefly, _mypy, _pyright], ids=["pyrefly", "mypy", "pyright"])
def test_a_type_checker_refuses_each_wrong_line_and_no_other(tmp_path, checker: Callable[[], list[str]]) -> None:
    (file := tmp_path / "wrong.py").write_text(WRONG, encoding="utf-8")
    wrong = {number for number, line in enumerate(WRONG.splitlines(), 1) if line.endswith("# wrong")}
    status, said = check(checker(), file)
    assert status == 1, said
    found = {int(line) for line in re.findall(r"wrong\.py:(\d+)", said)}
    assert wrong == found, said


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(polyak.__file__).parent / "py.typed").exists()

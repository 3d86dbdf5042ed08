"""Type checkers accept the examples as users type them, and refuse what is wrong.

pyrefly is part of the development environment. mypy and pyright run where they are installed: a first run of mypy takes
longer than most tests here.
"""

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from paths import ROOT

import polyak

SOURCE = Path(polyak.__file__).parents[1]
PAGES = {"readme.py": "README.md", "first_tries.py": "docs/first-tries.md"}
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
kept = ema.num_updates + ema.save("averaged.safetensors")  # wrong
"""


def _pyrefly() -> list[str]:
    python = ["--python-interpreter-path", sys.executable]
    program = str(Path(sys.executable).with_name("pyrefly"))
    return [program, "check", "--preset=strict", f"--search-path={SOURCE}", "--output-format=min-text", *python]


def _mypy() -> list[str]:
    # Functions of torch without types, such as `backward`, are torch's.
    return [sys.executable, "-m", "mypy", "--strict", "--untyped-calls-exclude=torch"]


def _pyright() -> list[str]:
    return [sys.executable, "-m", "pyright", "--pythonpath", sys.executable]


def _is_installed(checker: str) -> bool:
    return Path(sys.executable).with_name(checker).exists() or find_spec(checker) is not None


@pytest.fixture(scope="module", params=[_pyrefly, _mypy, _pyright], ids=["pyrefly", "mypy", "pyright"])
def lines(request, tmp_path_factory) -> dict[str, set[int]]:
    """Return the lines in which a type checker finds an error, by file: those of the pages, and ``wrong.py``."""
    name = request.param.__name__.removeprefix("_")
    if not _is_installed(name):
        pytest.skip(f"{name} is not installed")
    folder = tmp_path_factory.mktemp(name)
    texts = {"wrong.py": WRONG} | {
        file: examples(ROOT / page) for file, page in PAGES.items() if (ROOT / page).exists()
    }
    for file, text in texts.items():
        (folder / file).write_text(text, encoding="utf-8")
    if name == "pyright":
        (folder / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [str(SOURCE)], "include": ["."]}))
    done = subprocess.run([*request.param(), *texts], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr  # there are errors, and no other failure
    found = re.findall(rf"({'|'.join(texts)}):(\d+).*", done.stdout, re.IGNORECASE)
    return {file: {int(line) for at, line in found if at == file} for file in texts}


def examples(page: Path) -> str:
    """Return the blocks of Python in a page, pasted one after another."""
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert blocks
    return "\n".join(blocks)


@pytest.mark.slow
@pytest.mark.parametrize("file", PAGES)
def test_a_type_checker_accepts_the_examples_of_a_page(lines, file) -> None:
    if file not in lines:
        pytest.skip("the documentation is not here")
    assert lines[file] == set()


@pytest.mark.slow
def test_a_type_checker_refuses_each_wrong_line_and_no_other(lines) -> None:
    assert lines["wrong.py"] == {n for n, line in enumerate(WRONG.splitlines(), 1) if line.endswith("# wrong")}


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(polyak.__file__).parent / "py.typed").exists()

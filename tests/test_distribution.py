"""What is built for an index is complete. ``make dist`` checks the same of the files that it builds."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import distribution
import pytest

import polyak

pytest.importorskip("hatchling", reason="hatchling builds the wheel; it comes with the extra `test`")


def build(folder: Path, target: str, tree: Path = distribution.ROOT, **environment: str) -> tuple[Path, str]:
    """Build a distribution without a network; return its path, and what was printed."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
    done = subprocess.run(command, cwd=tree, env=os.environ | environment, capture_output=True, text=True, check=True)
    (made,) = folder.iterdir()
    return made, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The pure wheel."""
    return build(tmp_path_factory.mktemp("wheel"), "wheel", POLYAK_PURE="1")[0]


def test_the_pure_wheel_is_complete_and_has_no_library(wheel) -> None:
    assert wheel.name == f"polyak-{distribution.version()}-py3-none-any.whl"
    assert distribution.wheel_faults(wheel) == []


@pytest.mark.slow
def test_the_source_distribution_is_complete_and_builds_without_a_compiler_which_it_says_in_one_line(tmp_path) -> None:
    source, _ = build(tmp_path / "source", "sdist")
    assert distribution.sdist_faults(source) == []
    with tarfile.open(source) as packed:
        packed.extractall(tmp_path, filter="data")
    wheel, printed = build(tmp_path / "wheel", "wheel", next(tmp_path.glob("polyak-*")), CC="no-such-compiler")
    said = [line for line in printed.splitlines() if "C kernel" in line]
    assert len(said) == 1
    assert "a C compiler must be on the path, or named by CC" in said[0]
    assert distribution.wheel_faults(wheel) == []


def test_a_wheel_that_lacks_a_file_is_found(wheel, tmp_path) -> None:
    less = tmp_path / wheel.name
    with zipfile.ZipFile(wheel) as full, zipfile.ZipFile(less, "w") as copy:
        for name in full.namelist():
            if name != "polyak/py.typed":
                copy.writestr(name, full.read(name))
        copy.writestr("tests/test_time.py", "")
    assert distribution.wheel_faults(less) == ["lacks polyak/py.typed", "has tests/test_time.py"]


def test_the_version_is_written_once() -> None:
    assert distribution.version() == polyak.__version__
    assert 'dynamic = ["version"]' in (distribution.ROOT / "pyproject.toml").read_text(encoding="utf-8")

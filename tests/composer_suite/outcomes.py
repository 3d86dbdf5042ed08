"""Run pytest in a folder, and read what became of each test."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

HERE = Path(__file__).parent


def outcomes(folder: Path, *arguments: str, **environment: str) -> Mapping[str, str]:
    """Return "passed", "failed", "error" or "skipped" by the file and name of each test.

    Args:
        folder: Where to run.
        *arguments: Of pytest.
        **environment: Variables to set.
    """
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    given = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    paths = [str(Path(path).resolve()) for path in [folder, HERE.parent / "stubs", *given]]
    call = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={report}"]
    done = subprocess.run(
        [*call, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    tests = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    if done.returncode not in (0, 1) or not tests:  # 1: tests failed
        raise SystemExit(f"pytest must run the tests (it said: {done.stdout}{done.stderr})")
    return {f"{test.get('classname')}::{test.get('name')}": _outcome(test) for test in tests}


def _outcome(test: ElementTree.Element) -> str:
    kinds = {child.tag for child in test} & {"failure", "error", "skipped"}
    # An error while a test is torn down comes with what the test itself did.
    return {"failure": "failed"}.get(kind := min(kinds, default="passed"), kind)

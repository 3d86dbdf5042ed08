"""The table of formats in the documentation names a test, or a format that tests read and average, in each row."""

import re
from pathlib import Path

import checkpoint_files
import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "average.md"

pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="needs the documentation")


def test_each_row_of_the_table_of_formats_names_its_test_and_who_wrote_the_files() -> None:
    table = PAGE.read_text(encoding="utf-8").partition("## Formats")[2]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 15
    tests = {
        name: path.name
        for path in Path(__file__).parent.glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    three = re.findall(r"`(test_\w+)`", table.partition("| format |")[0])
    assert len(three) == 3
    assert {*three} <= tests.keys()
    for what, written_by, _, test in rows:
        name = test.strip("`")
        assert name in tests or name in checkpoint_files.FORMATS, what
        if written_by == "the shape":
            assert name in checkpoint_files.FORMATS or tests[name] == "test_engines.py", what
        elif written_by not in {"torch", "safetensors"}:
            assert tests[name] == "test_libraries.py", what

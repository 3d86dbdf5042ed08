"""The page of what works names tests that exist, and that of plain loops warnings that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "what-works.md").read_text()


def test_the_page_names_files_that_exist() -> None:
    paths = set(re.findall(r"`(tests/[\w/]+(?:\.py)?)`", PAGE))
    assert len(paths) > 10
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_the_page_names_tests_that_exist() -> None:
    names = set(re.findall(r"`(test_\w+)(?:\.\.\.)?`", PAGE))
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert names
    assert not [name for name in names if f"def {name}" not in sources]


def test_the_page_of_plain_loops_quotes_warnings_that_exist() -> None:
    table = (ROOT / "docs" / "hosts" / "plain.md").read_text().partition("## Warnings")[2].partition("## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    quoted = [text for cell in cells for text in re.findall(r"`([^`]+)`", cell)]
    sources = "\n".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    joined = re.sub(r'"\s*f?"', "", sources)  # literals over several lines
    assert len(quoted) > 10
    assert not [text for text in quoted if text not in joined and text != "QuarantineWarning"]

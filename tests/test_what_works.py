"""The page of what works and what polyak refuses names tests that exist."""

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

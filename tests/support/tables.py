"""Tables in pages of the documentation that tests make: the text between two comments is that of the tests.

``WRITE_PAGES=1 pytest FILE`` rewrites them.
"""

import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import chdir
from pathlib import Path

import pytest

from polyak import PolyakError

BEGIN, END = "<!--- table {} -->", "<!--- end of table {} -->"


def error_of(call: Callable[[], object], expected: type[Exception] = PolyakError) -> str:
    """Return the class and the message of the error that a call raises, as the cell of a table."""
    with pytest.raises(expected) as caught:
        call()
    return f"`{caught.type.__name__}`: {cell(str(caught.value))}"


def cell(text: str) -> str:
    """Return plain text as the cell of a table."""
    return " ".join(text.split()).translate({ord(char): f"\\{char}" for char in "<|*"})


def rows(header: tuple[str, str], lines: Iterable[tuple[str, str]]) -> list[str]:
    """Return the lines of a table of code and text."""
    made = [f"| `{code}` | {text} |" for code, text in lines]
    return [f"| {header[0]} | {header[1]} |", "| --- | --- |", *made]


def rewritten(text: str, tables: Callable[[], Mapping[str, list[str]]]) -> str:
    """Return the text of a page with its tables rewritten; ``tables`` is called in an empty folder."""
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        for name, lines in tables().items():
            before, begin, rest = text.partition(BEGIN.format(name))
            _, end, after = rest.partition(END.format(name))
            assert begin, f"the page must have a table {name}"
            assert end, f"the table {name} must end"
            text = "\n".join([before + begin, "", *lines, "", end + after])
    return text


def check_page(page: Path, tables: Callable[[], Mapping[str, list[str]]]) -> None:
    """Check that the tables of a page are those of the tests, or rewrite them."""
    if not page.exists():
        pytest.skip("the documentation is not here")
    text = page.read_text(encoding="utf-8")
    made = rewritten(text, tables)
    if "WRITE_PAGES" in os.environ:
        page.write_text(made, encoding="utf-8")
        text = made
    assert made == text, f"rewrite {page.name}: WRITE_PAGES=1 pytest and the file of this test"
    assert str(Path(tempfile.gettempdir())) not in text
    assert " at 0x" not in text

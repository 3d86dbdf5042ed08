"""The prose of the project has none of the words that the glossary in CONTRIBUTING.md replaces.

``python tests/test_prose.py`` lists all places.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
CODE = re.compile(r"```.*?```|``[^`]*``|`[^`]*`|https?://\S+", re.DOTALL)
COMMENT = re.compile(r"(?:^|\s)#.*")
HOSTS = re.compile(r"\b(?<!polyak\.)[Hh]osts?\b(?!/)")  # in pages for users: "integrations"; the module keeps its name

pytestmark = pytest.mark.skipif(not CONTRIBUTING.exists(), reason="needs the documentation")


def glossary() -> list[str]:
    """Return the patterns in the left column of the glossary."""
    table = CONTRIBUTING.read_text(encoding="utf-8").partition("## Glossary")[2]
    cells = re.findall(r"^\| (`.*?`) \| ", table, re.MULTILINE)
    return [pattern.replace("\\|", "|") for cell in cells for pattern in re.findall(r"`([^`]+)`", cell)]


def banned() -> re.Pattern[str]:
    return re.compile(rf"\b(?:{'|'.join(glossary())})\b", re.IGNORECASE)


def prose_of_python(text: str) -> Iterator[tuple[int, str]]:
    """Yield comments, docstrings, messages and names of tests, with line numbers."""
    for number, line in enumerate(text.split("\n"), 1):
        if comment := COMMENT.search(line):  # in strings there may be some too
            yield number, comment.group()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            for number, line in enumerate(CODE.sub(blank, node.value).split("\n")):
                yield node.lineno + number, line
        elif isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node.lineno, node.name.replace("_", " ")


def prose_of_markdown(text: str) -> Iterator[tuple[int, str]]:
    yield from enumerate(CODE.sub(blank, text).split("\n"), 1)


def prose_of_c(text: str) -> Iterator[tuple[int, str]]:
    for comment in re.finditer(r"/\*.*?\*/|//[^\n]*", text, re.DOTALL):
        yield text.count("\n", 0, comment.start()) + 1, comment.group()


def prose_of_settings(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.split("\n"), 1):
        yield number, line.partition("#")[2]


READ = {".py": prose_of_python, ".md": prose_of_markdown, ".c": prose_of_c, ".h": prose_of_c}
SETTINGS = {"Makefile", "pyproject.toml", ".flake8", "constraints.txt"}


def blank(code: re.Match[str]) -> str:
    """Replace code by its line ends, so that the lines after it keep their numbers."""
    return "\n" * code.group().count("\n")


def files() -> list[Path]:
    folders = ["src", "docs", "tests", "benchmarks"]
    found = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in READ]
    return sorted([*found, *ROOT.glob("*.md"), *ROOT.glob("*.py"), *(ROOT / name for name in SETTINGS)])


def wrong_in(path: Path, words: re.Pattern[str]) -> list[str]:
    text = path.read_text(encoding="utf-8")
    if path == CONTRIBUTING:
        text = text.partition("## Glossary")[0]
    pages = path.suffix == ".md" and path.name not in {"CONTRIBUTING.md", "ARCHITECTURE.md"}
    return [
        f"{path.relative_to(ROOT)}:{number}: {found.group()!r} in {line.strip()[:100]!r}"
        for number, line in READ.get(path.suffix, prose_of_settings)(text)
        for found in [words.search(line) or (HOSTS.search(line) if pages else None)]
        if found
    ]


def test_prose_has_no_word_that_the_glossary_replaces() -> None:
    words = banned()
    wrong = [line for path in files() if path != Path(__file__) for line in wrong_in(path, words)]
    assert not wrong, "\n".join(["see the glossary in CONTRIBUTING.md:", *wrong])


@pytest.mark.parametrize(
    ("text", "line"),
    [("x = 1  # lent to it", 1), ('"""Say.\n\nIt is lent.\n"""', 3), ('raise ValueError("it is lent")', 1)],
)
def test_a_replaced_word_is_found_in_comments_docstrings_and_messages(text: str, line: int) -> None:
    assert [number for number, found in prose_of_python(text) if banned().search(found)] == [line]


def test_a_replaced_word_is_found_in_comments_of_settings() -> None:
    assert [number for number, found in prose_of_settings("a\nb # lent\nlent:") if banned().search(found)] == [2]


def test_code_in_prose_may_use_any_word() -> None:
    assert not any(banned().search(line) for _, line in prose_of_markdown("`lent` and\n```python\nlent = 1\n```\n"))


def test_the_glossary_has_the_words_that_this_project_had() -> None:
    for word in ("lent", "loan", "goes on from", "beside", "at once", "the first rank", "stretch"):
        assert banned().search(word), word


if __name__ == "__main__":
    places = [line for path in files() if path != Path(__file__) for line in wrong_in(path, banned())]
    print("\n".join([*places, f"{len(places)} places"]))
    sys.exit(bool(places))

"""The documentation builds without a warning, and its pages run as a reader pastes them (see ``pages.py``)."""

import re
from importlib.util import find_spec
from pathlib import Path

import pages
import pytest
import warm

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"

pytestmark = pytest.mark.skipif(not DOCS.exists(), reason="needs the documentation")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("furo") is None, reason="needs the extra docs")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = ["-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-b", "html", "-d", tmp_path / "doctrees"]
    built = warm.run(*command, DOCS, tmp_path / "site")
    assert built.returncode == 0, built.stderr
    site = "".join(page.read_text(encoding="utf-8") for page in (tmp_path / "site").rglob("*.html"))
    loaded = re.findall(r"""<(?:script|link|img)\b[^>]*\b(?:src|href)=["'](https?:[^"']*)""", site)
    assert not loaded, f"the site must need no network (it loads {set(loaded)})"


def test_the_links_of_the_readme_lead_to_files() -> None:
    links = re.findall(r"\]\(([^)#:]+)[)#]", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_readme_fits_on_one_screen() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 60


def page_of(folder: Path, text: str) -> Path:
    page = folder / "page.md"
    page.write_text(text, encoding="utf-8")
    return page


def test_the_blocks_of_a_page_share_names_and_a_folder(tmp_path: Path) -> None:
    page = page_of(
        tmp_path,
        "```python\nfrom pathlib import Path\nx = Path('file').write_text('two')\n```\n"
        "```bash\ncat file\n```\n```output\ntwo\n```\n```python\n>>> x + 1\n4\n```\n",
    )
    done = pages.in_process(page)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "```python\nunknown\n```\n",
        "```bash\nfalse\n```\n",
        "```python\n>>> 1 + 1\n3\n```\n",
        "```python\nprint('loss 0.5')\n```\n```output\nloss 0.9\n```\n",
        "```python\nimport warnings\nwarnings.warn('the reader should change this')\n```\n",
        "```python\nimport polyak\nimport conftest\n```\n",  # nothing of the tests is in reach
    ],
    ids=["unknown name", "failing command", "wrong result", "other output", "warning", "hidden module"],
)
def test_a_page_fails_whose_blocks_do_not_do_what_it_says(tmp_path: Path, text: str) -> None:
    assert pages.in_process(page_of(tmp_path, text)).returncode == 1


@pytest.mark.parametrize(
    ("expected", "printed", "differ"),
    [
        ("loss 0.50", "loss 0.55\n", False),
        ("loss 0.50", "loss 0.75\n", True),
        ("step 10", "step 11", True),
        ("raw 0.5", "averaged 0.5", True),
        ("a  b\n", "a b", False),
        ("...\nend 1.0", "whatever 3\nend 1.1", False),
        ("...\nend 1.0", "whatever 3\nend 2.1", True),
        ("91 %", "91 %\nand more", True),
    ],
)
def test_output_differs_in_words_whole_numbers_or_much_in_decimals(expected: str, printed: str, differ: bool) -> None:
    assert pages.differs(expected, printed) is differ


def test_a_block_that_does_not_run_is_announced(tmp_path: Path) -> None:
    assert pages.unannounced(page_of(tmp_path, "Not run here:\n\n```py\nx\n```\n\nSo:\n\n```sh\nx\n```\n")) == [10]


def test_few_blocks_do_not_run() -> None:
    idle = [block for page in DOCS.rglob("*.md") for block in pages.blocks(page) if block.tag in {"py", "sh"}]
    assert len(idle) <= 12  # most need a library that is not installed here

"""Runs the code blocks of a Markdown page as a reader pastes them: in order, in a fresh process and an empty folder.

The tag of a block says what happens to it: ``python`` and ``bash`` run, ``output`` is what the block before it prints.
A block that cannot run is tagged ``py`` or ``sh``, and the line before it says "not run". All other tags are no code.

``python tests/support/pages.py [--write] PAGE ...`` runs pages and shows what they print; with ``--write`` that becomes
what the pages show.
"""

import contextlib
import doctest
import io
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import warm

ROOT = Path(__file__).parents[2]
MISSING = 77  # the exit status of a page that needs one of these packages, where it is not installed
_OPTIONAL = "accelerate composer ignite lightning ray sklearn torchft torchmetrics transformers wandb"
OPTIONAL = set(_OPTIONAL.split())
INSTALLED = {"command-line.md"}  # these pages run the command as it is installed, in new interpreters
DECIMALS = 0.25  # how far a printed decimal may be from that of the page; whole numbers are equal
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NUMBER = re.compile(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)")


@dataclass(frozen=True)
class Block:
    """A fenced block: its tag, its text, the number of its first line, and the last line of the page before it."""

    tag: str
    text: str
    line: int
    before: str


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page that have a tag."""
    text = page.read_text(encoding="utf-8")
    found = []
    for fence in _FENCE.finditer(text):
        before = text[: fence.start()].rstrip().rpartition("\n")[2]
        found.append(Block(fence[1], fence[2], text.count("\n", 0, fence.start(2)) + 1, before))
    return [block for block in found if block.tag]


def unannounced(page: Path) -> list[int]:
    """Return the lines of blocks of code that do not run, and of which the page does not say so."""
    idle = [block for block in blocks(page) if block.tag in {"py", "sh", "shell", "console"}]
    return [block.line for block in idle if "not run" not in block.before.lower()]


def differs(expected: str, printed: str) -> bool:
    """Say whether what was printed differs from the page in a word, a whole number, or much in a decimal.

    ``...`` in the page stands for anything.

    Args:
        expected: The block of the page.
        printed: By the block before it.
    """
    parts = [_NUMBER.split(" ".join(part.split())) for part in expected.split("...")]
    rest = " ".join(printed.split())
    pattern = ".*".join("".join(_pattern(index, piece) for index, piece in enumerate(part)) for part in parts)
    match = re.fullmatch(pattern, rest, re.DOTALL)
    numbers = [piece for part in parts for piece in part[1::2]]
    return match is None or not all(_near(*pair) for pair in zip(numbers, match.groups(), strict=True))


def _pattern(index: int, piece: str) -> str:
    return r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)" if index % 2 else re.sub(r"(\\ )+", r"\\s*", re.escape(piece))


def _near(expected: str, found: str) -> bool:
    if expected.isdecimal():
        return expected == found
    one, other = float(expected), float(found)
    return abs(one - other) <= DECIMALS * max(abs(one), abs(other))


def run(page: Path, write: bool = False) -> str:
    """Run the blocks of a page in this process and this folder; return what they print.

    Args:
        page: The Markdown file.
        write: Whether what they print replaces what the page shows.

    Raises:
        AssertionError: If a block prints something else than the page says, or warns of what the reader should change.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    printed, everything, text = "", "", page.read_text(encoding="utf-8")
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("ignore", "training has waited")  # for the disk, on a busy machine
        for block in blocks(page):
            if block.tag == "output" and write and "..." not in block.text:
                text = text.replace(f"```output\n{block.text}```", f"```output\n{printed.rstrip()}\n```", 1)
            elif block.tag == "output":
                assert not differs(block.text, printed), f"{page}:{block.line}: not this, but\n{printed}"
            elif block.tag in {"python", "bash"}:
                printed = _run_python(block, names, page) if block.tag == "python" else _run_shell(block, page)
                everything += printed
    # What other packages say about themselves is none of the page's business.
    ours = [one for one in caught if one.category.__module__.startswith("polyak") or one.filename == str(page)]
    assert not ours, "\n".join(f"{page}:{one.lineno}: {one.message}" for one in ours)
    if write:
        page.write_text(text, encoding="utf-8")
    return everything


def _run_python(block: Block, names: dict[str, Any], page: Path) -> str:
    if block.text.startswith(">>>"):
        test = doctest.DocTestParser().get_doctest(block.text, names, page.name, str(page), block.line - 1)
        test.globs = names
        doctest.DebugRunner(optionflags=OPTIONS).run(test, clear_globs=False)
        return ""
    code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, names)
    return out.getvalue()


def _run_shell(block: Block, page: Path) -> str:
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", block.text], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{page}:{block.line}: exit status {done.returncode}\n{done.stdout}{done.stderr}"
    assert "Warning: " not in done.stderr, f"{page}:{block.line}: {done.stderr}"
    return done.stdout


def in_process(page: Path, *options: str, forked: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a page in a process and an empty folder of its own.

    Args:
        page: The Markdown file.
        options: For the command line of this module.
        forked: Whether the process and its commands ``polyak`` are forked from one that has imported torch; otherwise
            they are new interpreters and the command as it is installed.
    """
    text = page.read_text(encoding="utf-8")
    paths = [str(Path(sys.modules["polyak"].__file__ or "").parents[1])] if "polyak" in sys.modules else []
    # Composer imports torchvision, for which there may be a stub.
    stubs = [str(ROOT / "tests" / "stubs")] if "\nfrom composer " in text else []
    commands = [*([str(warm.folder())] if forked else []), str(Path(sys.executable).parent)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PATH": os.pathsep.join([*commands, os.environ.get("PATH", "")]),
        "PYTHONPATH": os.pathsep.join([*paths, *stubs, os.environ.get("PYTHONPATH", "")]).strip(os.pathsep),
    }
    command = [__file__, *options, str(page.resolve())]
    with tempfile.TemporaryDirectory() as folder:
        if forked:
            return warm.run(*command, cwd=folder, env=environment)
        command = [sys.executable, *command]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def runnable(page: Path) -> bool:
    """Say whether a page has a block that runs.

    Args:
        page: The Markdown file.
    """
    return any(block.tag in {"python", "bash"} for block in blocks(page))


def _lines(page: Path, *options: str) -> Iterator[str]:
    began = _children_s()
    done = in_process(page, *options, forked=False)
    yield f"{page}: status {done.returncode}, {_children_s() - began:.1f} s of one core"
    yield done.stdout + done.stderr


def _children_s() -> float:
    """Return the processor time of all processes that this one has started and that have ended."""
    used = os.times()
    return used.children_user + used.children_system


def main() -> None:
    """Run one page here if this folder is empty, and else each of the pages in a folder of its own."""
    options = [argument for argument in sys.argv[1:] if argument.startswith("--")]
    given = [Path(argument) for argument in sys.argv[1:] if not argument.startswith("--")]
    if any(Path().iterdir()):
        print("\n".join(line for page in given for line in _lines(page, *options)))
        return
    sys.path[0] = ""  # as in an interpreter, so that no module next to this file can be imported
    try:
        print(run(given[0], write="--write" in options))
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        print(error)
        sys.exit(MISSING)


if __name__ == "__main__":
    main()

"""The examples in docstrings and Markdown run as tests.

Examples in the docstrings of one module share a namespace and a working directory of their own. The blocks of a page
run in a process of their own, as a reader pastes them: see ``tests/support/pages.py``.
"""

import gc
import signal
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, chdir
from doctest import ELLIPSIS, NORMALIZE_WHITESPACE
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from sybil import Sybil
from sybil.document import PythonDocStringDocument
from sybil.parsers.doctest import DocTestParser

# A busy machine fails no test: how long an example takes says nothing.
settings.register_profile("polyak", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("polyak")

_OPTIONS = ELLIPSIS | NORMALIZE_WHITESPACE
_HERE = "_directory_of_this_document"


def _enter(namespace: dict[str, Any]) -> None:
    with ExitStack() as stack:
        stack.enter_context(chdir(stack.enter_context(tempfile.TemporaryDirectory())))
        namespace[_HERE] = stack.pop_all()


def _leave(namespace: dict[str, Any]) -> None:
    namespace.pop(_HERE).close()
    if torch.distributed.is_initialized():  # by an example of several ranks, here of one
        torch.distributed.destroy_process_group()


def pytest_configure() -> None:
    """Let Ctrl-C reach the processes that tests start: a shell starts background jobs that ignore it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Hide all that is loaded now from the garbage collector: a full collection would take half a second."""
    gc.collect()
    gc.freeze()


class Page(pytest.File):
    """A Markdown page: one test, if it has blocks that run."""

    def collect(self) -> Iterator[pytest.Item]:
        import pages  # in tests/support, which is on the path once pytest is configured

        if pages.runnable(self.path) or pages.unannounced(self.path):
            yield Blocks.from_parent(self, name="blocks")


class Blocks(pytest.Item):
    """The blocks of a page, in order."""

    def runtest(self) -> None:
        import pages

        lines = pages.unannounced(self.path)
        if lines:
            pytest.fail(f"{self.path}: the line before a block that does not run says so ({lines})", pytrace=False)
        done = pages.in_process(self.path, forked=self.path.name not in pages.INSTALLED)
        if done.returncode == pages.MISSING:
            pytest.skip(done.stdout.strip())
        if done.returncode:
            pytest.fail(f"{done.stdout}\n{done.stderr}", pytrace=False)

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, 0, self.path.name


_docstrings = Sybil(
    parsers=[DocTestParser(_OPTIONS)],
    path="src",
    pattern="*.py",
    document_types={".py": PythonDocStringDocument},
    setup=_enter,
    teardown=_leave,
)
_of_docstrings = _docstrings.pytest()


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Collect the examples of a module or a page."""
    if file_path.suffix == ".md":
        return Page.from_parent(parent, path=file_path)
    return _of_docstrings(file_path, parent)

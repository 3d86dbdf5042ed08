"""The examples in docstrings and Markdown run as tests.

Examples of one document share a namespace and a working directory of their own, and run in order (``--dist=loadfile``).
"""

import gc
import tempfile
from contextlib import ExitStack, chdir
from doctest import ELLIPSIS, NORMALIZE_WHITESPACE
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from sybil import Sybil
from sybil.document import PythonDocStringDocument
from sybil.parsers.doctest import DocTestParser
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

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


def pytest_collection_finish() -> None:
    """Hide all that is loaded now from the garbage collector: a full collection would take half a second."""
    gc.collect()
    gc.freeze()


_docstrings = Sybil(
    parsers=[DocTestParser(_OPTIONS)],
    path="src",
    pattern="*.py",
    document_types={".py": PythonDocStringDocument},
    setup=_enter,
    teardown=_leave,
)
_markdown = Sybil(
    parsers=[PythonCodeBlockParser(doctest_optionflags=_OPTIONS), SkipParser()],
    patterns=["*.md"],
    setup=_enter,
    teardown=_leave,
)

pytest_collect_file = (_docstrings + _markdown).pytest()

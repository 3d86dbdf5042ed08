"""Fixtures that several wings use."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from ranks import Ranks

# Most tests average a few batches. `averaging/test_youth.py` and the contract of integrations test these warnings.
_YOUTH = pytest.mark.filterwarnings(
    "ignore:the average that is .* is mostly its first weights", "ignore:raw weights are .* averaging has not begun"
)


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    for item in items:
        if " at 0x" in item.nodeid:  # the processes of pytest-xdist must collect the same names
            raise pytest.UsageError(
                f"the name of a test must be the same in each process (got {item.nodeid}): give ids="
            )
        if Path(__file__).parent in item.path.parents:
            item.add_marker(_YOUTH, append=False)


@pytest.fixture(autouse=True)
def _no_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)  # `import readline` sets it for processes to come, such as xdist's


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Four processes for all tests of several ranks: to start them takes longer than most of these tests."""
    started = Ranks(tmp_path_factory.mktemp("ranks"))
    yield started
    started.close()

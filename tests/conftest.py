"""Fixtures that several wings use."""

from collections.abc import Iterator

import pytest
from ranks import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Four processes for all tests of several ranks: to start them takes longer than most of these tests."""
    started = Ranks(tmp_path_factory.mktemp("ranks"))
    yield started
    started.close()

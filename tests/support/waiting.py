"""Waits of tests: for a condition, never for a time, so that a busy machine fails nothing."""

import time
from collections.abc import Callable

END_S = 600  # no wait that is not stuck takes as long


def wait_until(condition: Callable[[], object], *, end_s: float = END_S) -> None:
    """Return when a condition holds; fail if it still does not after ``end_s`` seconds.

    Args:
        condition: Asked every two milliseconds.
        end_s: When to give up.
    """
    end = time.monotonic() + end_s
    while not condition():
        assert time.monotonic() < end, f"the condition did not hold within {end_s} s"
        time.sleep(0.002)

"""The background thread: there is one, whatever interrupts its start."""

import random
import signal
import sys
import threading
from contextlib import suppress

import pytest

from polyak.background import one_thread


class Interrupted(BaseException):
    pass


def threads() -> set[threading.Thread]:
    """Return those that run. One whose start was interrupted early is listed, but was never begun."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("a-test") and thread.ident}


def gone() -> None:
    for thread in threads():
        thread.join(60)
    assert not threads()


def test_jobs_run_in_their_order_on_one_thread() -> None:
    executor, ran = one_thread("a-test"), []
    for n in range(20):
        executor.submit(lambda n=n: ran.append((n, threading.get_ident())))
    executor.shutdown()
    assert [n for n, _ in ran] == list(range(20))
    assert len({thread for _, thread in ran}) == 1


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupt_while_the_thread_starts_leaves_no_thread(monkeypatch, when) -> None:
    real = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if when == "after":
            real(thread)
        raise Interrupted

    with monkeypatch.context() as patches, suppress(Interrupted):
        patches.setattr(threading.Thread, "start", start)
        one_thread("a-test")
    gone()


def test_an_interrupt_at_any_line_of_the_start_leaves_one_thread_or_none() -> None:
    for n in range(1, 50):
        lines, executor = 0, None

        def trace(frame, kind, argument, n=n):
            del argument
            nonlocal lines
            if not frame.f_code.co_filename.endswith("polyak/background.py"):
                return None
            lines += kind == "line"
            if kind == "line" and lines == n:
                raise Interrupted
            return trace

        sys.settrace(trace)
        try:
            executor = one_thread("a-test")
        except Interrupted:
            pass
        finally:
            sys.settrace(None)
        if executor is not None:
            assert len(threads()) == 1
            executor.shutdown()
            break
        gone()
    assert n > 3


def test_a_signal_at_any_moment_of_the_start_leaves_one_thread_or_none() -> None:
    def interrupt(*_: object) -> None:
        raise Interrupted

    chance = random.Random(0)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(200):
            executor = None
            # A Condition of Python's that is interrupted while it takes its lock again raises a RuntimeError instead.
            with suppress(Interrupted, RuntimeError):
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-6, 3e-4))
                executor = one_thread("a-test")
                executor.submit(int).result()
                assert len(threads()) == 1
                signal.setitimer(signal.ITIMER_REAL, 0)
            if executor is not None:
                executor.shutdown()
            del executor
            gone()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

"""The background thread: at most one exists, whatever interrupts its start or the waits for it."""

import gc
import subprocess
import sys
import threading
from contextlib import suppress

import pytest
from waiting import END_S, wait_until

from polyak.background import Worker, running


class Interrupted(BaseException):
    pass


def gone(name: str) -> None:
    """Wait until no thread with this name runs: a thread ends when its owner is freed."""
    gc.collect(1)  # the owner is young; to look at all that pytest has takes a hundred times as long
    if running(name):
        gc.collect()
    wait_until(lambda: not running(name))


def test_jobs_run_in_their_order_on_one_thread() -> None:
    worker, ran = Worker("a test"), []
    for n in range(20):
        worker.submit(lambda n=n: ran.append(n))
    worker.close()
    assert ran == list(range(20))
    assert not running("a test")
    worker.close()


def test_finish_raises_the_error_of_its_job_and_the_thread_continues() -> None:
    worker, ran = Worker("a test"), []
    with pytest.raises(ZeroDivisionError):
        worker.finish(lambda: 1 / 0)
    worker.submit(lambda: 1 / 0)
    worker.finish(lambda: ran.append(1))
    worker.close()
    assert ran == [1]


def test_the_thread_ends_when_its_worker_is_freed() -> None:
    worker = Worker("a test")
    worker.finish(int)
    assert running("a test") == 1
    del worker
    gone("a test")


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupt_while_the_thread_starts_leaves_no_thread(monkeypatch, when) -> None:
    real, started = threading.Thread.start, []

    def start(thread: threading.Thread) -> None:
        if when == "after":
            real(thread)
            started.append(thread)
        raise Interrupted

    with monkeypatch.context() as patches, suppress(Interrupted):
        patches.setattr(threading.Thread, "start", start)
        Worker("a test")
    gc.collect()
    for thread in started:
        thread.join(END_S)
        assert not thread.is_alive()
    assert not running("a test")


def test_an_interrupt_that_became_an_error_of_pythons_lock_is_raised_as_the_interrupt(monkeypatch) -> None:
    def start(thread: threading.Thread) -> None:
        lock = threading.Lock()
        with lock:
            lock.release()  # as Condition.wait does, interrupted before it takes the lock again
            raise Interrupted

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(Interrupted):
        Worker("a test")


def test_an_interrupt_at_any_line_leaves_a_worker_that_works_or_none() -> None:
    for n in range(1, 200):
        lines, worker, ran, done = 0, None, [], False

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
            worker = Worker("a test")
            worker.submit(lambda ran=ran: ran.append(1))
            worker.finish(lambda ran=ran: ran.append(2))
            done = True
        except Interrupted:
            pass
        finally:
            sys.settrace(None)
        if worker is not None:
            assert running("a test") == 1
            worker.finish(lambda ran=ran: ran.append(3))
            worker.close()
            assert ran == sorted(set(ran)), n
            assert ran[-1] == 3
        gone("a test")
        if done:
            break
    assert n > 15


SIGNALS = """
import faulthandler, random, signal, time
from contextlib import suppress
from polyak.background import Worker, running

faulthandler.dump_traceback_later(580, exit=True)

class Interrupted(BaseException):
    pass

def interrupt(*_):
    raise Interrupted

chance = random.Random(0)
signal.signal(signal.SIGALRM, interrupt)
for _ in range(400):
    worker, ran, asked = None, [], 0
    with suppress(Interrupted):
        signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-6, 3e-4))
        worker = Worker("a test")
        while True:
            asked += 1
            worker.submit(lambda n=asked: ran.append(n))
            worker.finish(int)
    if worker is not None:
        assert running("a test") == 1
        worker.finish(int)
        assert ran in (list(range(1, asked + 1)), list(range(1, asked))), (ran, asked)
        worker.close()
    del worker
    while running("a test"):
        time.sleep(0.0001)
"""


def alone(program: str) -> None:
    """Run a program; check that it prints nothing and exits with 0."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=END_S)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_signal_at_any_moment_leaves_a_worker_that_works_or_none() -> None:
    # In a separate process: here, a signal could also interrupt finalizers of other tests.
    alone(SIGNALS)


def test_a_process_waits_for_its_jobs_and_a_forked_one_for_none() -> None:
    alone("""
import os, sys, time
from polyak.background import Worker
worker = Worker("a test")
worker.finish(int)
worker.submit(lambda: (time.sleep(0.2), os.write(write, b".")))
read, write = os.pipe()
if not os.fork():
    worker.close()
    sys.exit(0)  # with all that is done at exit
assert os.wait()[1] == 0
if not os.fork():
    del worker
    os.close(write)
    assert os.read(read, 9) in (b"", b".")
    sys.exit(0)
os.close(read)
""")

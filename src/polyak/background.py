"""A background thread that runs one job after the other, of which there is never a second, whatever interrupts it.

``concurrent.futures`` and ``threading.Thread`` wait by locks that are written in Python: a Ctrl-C at the wrong
moment leaves an executor with a thread that it does not know of, so that it starts a second one, or a lock that
is never released. The locks here are written in C: a signal comes before they are taken or after.
"""

import atexit
import os
import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue

Job = Callable[[], object]


class _Task:
    """A job, and whether it was done."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.error: BaseException | None = None
        self.done = threading.Lock()
        self.done.acquire()

    def run(self) -> None:
        try:
            self._job()
        except BaseException as error:
            self.error = error
        finally:
            self.done.release()


class _Thread:
    """What the thread knows. It does not know its ``Worker``, and so ends when nobody has that any more."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.process = os.getpid()
        self.tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self.over = False
        self._ended = threading.Lock()
        self._ended.acquire()

    def run(self) -> None:
        try:
            while (task := self.tasks.get()) is not None:
                task.run()
                del task  # before the next one is waited for, so that what it holds is freed
        finally:
            _RUNNING.discard(self)
            self.over = True
            self._ended.release()

    def end(self) -> None:
        """Wait until all is done. A forked process has no such thread."""
        if self.process == os.getpid():
            self.tasks.put(None)
            while not self.over:
                self._ended.acquire(timeout=1.0)  # held by a second one who waits, or by one who was interrupted


_RUNNING = set[_Thread]()


class Worker:
    """A thread that runs jobs in their order. It ends with this object, and the process waits for it.

    Args:
        name: What it is for.

    Example:
        >>> worker, done = Worker("example"), []
        >>> for n in range(3):
        ...     worker.submit(lambda n=n: done.append(n))
        >>> worker.finish(lambda: done.append("last"))
        >>> worker.close()
        >>> done
        [0, 1, 2, 'last']
    """

    def __init__(self, name: str) -> None:
        self._closed = False
        self._thread = _Thread(name)
        weakref.finalize(self, self._thread.tasks.put, None)
        # Python does not wait for it at exit, but `_end_all` does once it has started. An interrupt before that leaves
        # a thread that nobody has: it ends as it has nothing to do, or it never gets out of `Thread.start`.
        threading.Thread(target=self._thread.run, name=name, daemon=True).start()
        _RUNNING.add(self._thread)

    def submit(self, job: Job) -> None:
        """Have a job run; return immediately. What it raises is lost.

        Args:
            job: What to do.
        """
        self._put(_Task(job))

    def finish(self, job: Job) -> None:
        """Run a job after all others, and wait for it; raise what it raises.

        Args:
            job: What to do.
        """
        task = _Task(job)
        self._put(task)
        task.done.acquire()
        if task.error is not None:
            raise task.error

    def close(self) -> None:
        """Wait until all jobs are done, and end the thread. If this was interrupted, it may be called again."""
        self._closed = True
        self._thread.end()

    def _put(self, task: _Task) -> None:
        assert not self._closed, "a closed worker runs no jobs"
        self._thread.tasks.put(task)


def running(name: str) -> int:
    """Return how many threads of a name there are.

    Args:
        name: As given to ``Worker``.
    """
    return sum(thread.name == name for thread in list(_RUNNING))


@atexit.register
def _end_all() -> None:
    for thread in list(_RUNNING):
        thread.end()

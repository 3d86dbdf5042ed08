"""A background thread that runs one job after another. An interrupt never leads to a second thread.

``concurrent.futures`` and ``threading.Thread`` wait by locks that are written in Python: a Ctrl-C at the wrong moment
leaves an executor with a thread that it does not know, so that it starts a second one, or a lock that is never
released. The locks of this module are written in C: a signal comes before they are taken or after.
"""

import atexit
import os
import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue

Job = Callable[[], object]


class _Task:
    """A job, its error, and a lock that is held until it is done."""

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
    """What the thread refers to: not its ``Worker``, so that it ends when nothing refers to that any more."""

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
                del task  # so that what it refers to is freed before the wait for the next one
        finally:
            _RUNNING.discard(self)
            self.over = True
            self._ended.release()

    def end(self) -> None:
        """Wait until all jobs are done. A forked process has no such thread."""
        if self.process == os.getpid():
            self.tasks.put(None)
            while not self.over:
                self._ended.acquire(timeout=1.0)  # another caller may hold it, or one that was interrupted


_RUNNING = set[_Thread]()


class Worker:
    """A thread that runs jobs in order. It ends with this object, and the process waits for it at exit.

    Args:
        name: The name of the thread.

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
        # At exit Python does not wait for a daemon, but `_end_all` does once it has started. An interrupt before that
        # leaves a thread that nothing refers to: it has no jobs and ends, or it never gets out of `Thread.start`.
        try:
            threading.Thread(target=self._thread.run, name=name, daemon=True).start()
        except RuntimeError as error:
            # An interrupt of the wait for its start can become one about the lock of that wait.
            raise error.__context__ or error from None
        _RUNNING.add(self._thread)

    def submit(self, job: Job) -> None:
        """Have a job run; return immediately. An error in it is lost.

        Args:
            job: What to run.
        """
        self._put(_Task(job))

    def finish(self, job: Job) -> None:
        """Run a job after all others, and wait for it; raise its error.

        Args:
            job: What to run.
        """
        task = _Task(job)
        self._put(task)
        task.done.acquire()
        if task.error is not None:
            raise task.error

    def close(self) -> None:
        """Wait until all jobs are done, and end the thread. After an interrupt, this may be called again."""
        self._closed = True
        self._thread.end()

    def _put(self, task: _Task) -> None:
        assert not self._closed, "a closed worker runs no jobs"
        self._thread.tasks.put(task)


def running(name: str) -> int:
    """Return how many threads of a name are running.

    Args:
        name: As given to ``Worker``.
    """
    return sum(thread.name == name for thread in list(_RUNNING))


@atexit.register
def _end_all() -> None:
    for thread in list(_RUNNING):
        thread.end()

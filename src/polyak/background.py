"""A background thread that runs one job after the other, and of which there is never a second."""

from concurrent.futures import ThreadPoolExecutor


def one_thread(name: str) -> ThreadPoolExecutor:
    """Return an executor whose only thread runs already.

    An executor counts a thread once ``Thread.start`` has returned. An interrupt before that leaves it with a thread
    that it does not know of, and its next job would start a second one. So the thread is started here, and an executor
    that was interrupted meanwhile is never used.

    Args:
        name: Of the thread, in lists of threads.

    Example:
        >>> executor = one_thread("example")
        >>> executor.submit(max, 2, 3).result()
        3
        >>> executor.shutdown()
    """
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
    try:
        executor.submit(int).result()
    except BaseException:
        executor.shutdown(wait=False)  # ends a thread that did start; Python waits for it when it exits
        raise
    return executor

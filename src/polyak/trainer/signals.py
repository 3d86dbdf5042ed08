"""Signals that wait for a moment."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def signals_held() -> Iterator[None]:
    """Let the handlers of an interrupt and of a termination run after the block instead of inside it.

    Only the main thread runs handlers, so in other threads nothing is done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # One inside the other: where one handler is put back, the other signal is still held.
    with _held(signal.SIGINT), _held(signal.SIGTERM):
        yield


@contextmanager
def _held(number: int) -> Iterator[None]:
    handler = signal.getsignal(number)
    if not callable(handler):
        yield
        return
    came: list[FrameType | None] = []
    try:
        signal.signal(number, lambda _, frame: came.append(frame))
        yield
    finally:
        signal.signal(number, handler)
        if came:
            handler(number, came[0])

"""``Between``: a ``with`` block between two events, in which the model may hold an average."""

import weakref
from collections.abc import Callable
from types import TracebackType

from polyak.averaging.swap import swap_of
from polyak.events import Event, State


class Between:
    """Fires one event before a ``with`` block and another after it, even if the block raises.

    An average that the first event swaps in belongs to the block. If an interrupt skips the second event, this object
    no longer exists, and the next access to the weights restores the training weights.

    Args:
        fire: Fires an event.
        state: The state of the loop.
        start: Before the block.
        end: After it.
    """

    def __init__(self, fire: Callable[[Event], None], state: State, start: Event, end: Event) -> None:
        self._fire, self._state, self._start, self._end = fire, state, start, end

    def __enter__(self) -> None:
        """Fire the first event. If it raises, fire the second one too."""
        try:
            before = swap_of(self._state.model)
            self._fire(self._start)
            swap = swap_of(self._state.model)
            if swap is not None and swap is not before:
                swap.scope = weakref.ref(self)
        except BaseException:
            self._fire(self._end)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Fire the second event. If it is interrupted, fire it once more."""
        try:
            self._fire(self._end)
        except BaseException:
            self._fire(self._end)
            raise

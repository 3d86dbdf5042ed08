"""Metrics as text: on the console, and as JSON lines in a file."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from polyak.trainer.loggers.base import Destination


class ConsoleLogger(Destination):
    """Prints metrics, one line for each call.

    Args:
        stream: To print to; standard output by default.
        only: The prefix of the metrics to print, such as ``"eval"``; by default all.
    """

    def __init__(self, stream: TextIO | None = None, only: str = "") -> None:
        self._stream = stream
        self._only = only

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Print a line.

        Args:
            metrics: Values by name.
            step: The number of batches so far.
        """
        shown = [f"{name} {value:.4g}" for name, value in metrics.items() if name.startswith(self._only)]
        if shown:
            (self._stream or sys.stdout).write(f"[{step}ba] {'  '.join(shown)}\n")


class JSONLinesLogger(Destination):
    """Appends metrics to a file, one JSON object in a line with the batch as ``"batch"``.

    A resumed run truncates the file to its size at the checkpoint, so that no line comes twice. A new run empties it.

    Args:
        path: The path of the file; its folder is created if it is missing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()  # it stays the same if the program changes its directory
        self._size: int | None = None

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Append a line.

        Args:
            metrics: Values by name.
            step: The number of batches so far.
        """
        if self._size is None:
            self._begin(0)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"batch": step, **metrics}) + "\n")
            self._size = file.tell()

    def _begin(self, size: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        # A file shorter than the checkpoint says was moved or edited: keep its content.
        self._size = min(size, self.path.stat().st_size)
        os.truncate(self.path, self._size)

    def state_dict(self) -> dict[str, Any]:
        """Return the size of the file."""
        return {"size": self._size or 0}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Truncate the file to its size when the state was saved.

        Args:
            state: The saved state.
        """
        self._begin(int(state["size"]))

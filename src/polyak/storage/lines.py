"""``Lines``: a file of JSON objects, one per line, which a killed process leaves with complete lines."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from polyak.storage.atomic import flush
from polyak.storage.lock import Lock


class Lines:
    """A file of JSON objects that one process at a time appends to.

    Args:
        path: The file, which is made with its folder if it does not exist.
        busy: Returns the error if another process has it open, given who that is.

    Attributes:
        found: The complete lines that it had. An incomplete one, of a killed process, is removed.
    """

    def __init__(self, path: Path, busy: Callable[[str], Exception]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file, self._lock = path.open("a+b"), None
        try:
            self._lock = Lock(path, busy)
            self._file.seek(0)
            self.found = complete_lines(self._file.read())
            self._file.truncate(sum(map(len, self.found)))
        except BaseException:
            self.close()
            raise

    def add(self, plain: Mapping[str, Any]) -> None:
        """Append an object; it is on disk afterwards.

        Args:
            plain: Without NaN and infinities.
        """
        self._file.write(json.dumps(plain, ensure_ascii=False, allow_nan=False).encode(errors="surrogatepass") + b"\n")
        flush(self._file)

    def close(self) -> None:
        """Close the file, and let the next process open it. It may be called again."""
        self._file.close()
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def complete_lines(content: bytes) -> list[bytes]:
    """Return the lines that end with a newline, with it.

    Args:
        content: The content of a file.
    """
    return content[: content.rfind(b"\n") + 1].splitlines(keepends=True)

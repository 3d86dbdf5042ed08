"""The SHA-256 of the files of checkpoints, computed on another thread while they are averaged."""

import hashlib
import secrets
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

from polyak.checkpoints.opening import Checkpoint
from polyak.errors import CheckpointError

_CHUNK_BYTES = 1 << 20


class Digests:
    """The hashes of files. Each has a placeholder of the same length until it is known.

    Args:
        checkpoints: Whose files are hashed.
        pool: The thread that hashes them.
    """

    def __init__(self, checkpoints: Sequence[Checkpoint], pool: ThreadPoolExecutor) -> None:
        self._stopped = Event()
        self._placeholders = {path: secrets.token_hex(32) for one in checkpoints for path in one.files.paths}
        self._found: dict[Path, Future[str]] = {path: pool.submit(self._hash, path) for path in self._placeholders}

    def placeholder(self, path: Path) -> str:
        """Return what stands for the hash of a file.

        Args:
            path: Of the file.
        """
        return self._placeholders[path]

    def write_into(self, path: Path) -> None:
        """Replace the placeholders in the header of a safetensors file, once all hashes are known.

        Args:
            path: Of the file.

        Raises:
            CheckpointError: If a file could not be read.
            OSError: If the disk refuses.
        """
        with path.open("r+b") as file:
            header = file.read(int.from_bytes(file.read(8), "little"))
            for of, text in self._placeholders.items():
                header = header.replace(text.encode(), self._result(of).encode())
            file.seek(8)
            file.write(header)

    def _result(self, path: Path) -> str:
        try:
            return self._found[path].result()
        except OSError as error:
            raise CheckpointError(
                f"a checkpoint must stay readable ({path}: {error.strerror}); save it again"
            ) from None

    def stop(self) -> None:
        """Hash no more."""
        self._stopped.set()

    def _hash(self, path: Path) -> str:
        digest = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            while not self._stopped.is_set() and (chunk := file.read(_CHUNK_BYTES)):
                digest.update(chunk)
        return digest.hexdigest()


@contextmanager
def hashing(checkpoints: Sequence[Checkpoint]) -> Iterator[Digests]:
    """Hash the files of checkpoints during a ``with`` block. After an error it stops.

    Args:
        checkpoints: Whose files are hashed.
    """
    with ThreadPoolExecutor(1, "polyak-sha256") as pool:
        digests = Digests(checkpoints, pool)
        try:
            yield digests
        finally:
            digests.stop()

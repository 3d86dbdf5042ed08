"""The SHA-256 of the files of checkpoints, computed on other threads while they are averaged."""

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from polyak.checkpoints.opening import Checkpoint
from polyak.errors import CheckpointError

_CHUNK_BYTES = 1 << 20


def files_of(checkpoints: Sequence[Checkpoint]) -> list[Path]:
    """Return the files that hold the weights of checkpoints.

    Args:
        checkpoints: The checkpoints.
    """
    return [path for one in checkpoints for path in one.files.paths]


def placeholder(path: Path, fingerprint: str) -> str:
    """Return what stands for the hash of a file until it is known: as long, and the same in each run of a plan.

    Args:
        path: The path of the file.
        fingerprint: The fingerprint of the plan.
    """
    return hashlib.sha256(f"{fingerprint}{path.absolute()}".encode(errors="surrogateescape")).hexdigest()


class Digests:
    """Hashes files next to a reader of all of them, so that each is read from the disk once.

    Args:
        paths: The paths of the files.
        pools: Of one thread each. A file is hashed by one thread; a disk may be faster than that.
    """

    def __init__(self, paths: Sequence[Path], pools: Sequence[ThreadPoolExecutor]) -> None:
        self._pools = {path: pools[i % len(pools)] for i, path in enumerate(paths)}
        self._hashes = {path: hashlib.sha256() for path in paths}
        self._at = dict.fromkeys(paths, 0)
        self._waiting = list[Future[None]]()

    def advance(self, share: float) -> None:
        """Hash up to a share of each file.

        Args:
            share: How much the reader has read; 1 for all.
        """
        self._waiting = [one for one in self._waiting if not one.done() or one.exception()]
        self._waiting += [pool.submit(self._hash, path, share) for path, pool in self._pools.items()]

    def results(self) -> Mapping[Path, str]:
        """Return the hashes, once all files are hashed.

        Raises:
            CheckpointError: If a file could not be read.
        """
        self.advance(1)
        for one in self._waiting:
            one.result()
        return {path: digest.hexdigest() for path, digest in self._hashes.items()}

    def _hash(self, path: Path, share: float) -> None:
        try:
            with path.open("rb", buffering=0) as file:
                end = path.stat().st_size if share >= 1 else int(path.stat().st_size * share)
                file.seek(self._at[path])
                while (left := end - self._at[path]) > 0 and (chunk := file.read(min(left, _CHUNK_BYTES))):
                    self._hashes[path].update(chunk)
                    self._at[path] += len(chunk)
        except OSError as error:
            raise CheckpointError(
                f"a checkpoint must stay readable ({path}: {error.strerror}); save it again"
            ) from None


def fill(path: Path, hashes: Mapping[str, str]) -> None:
    """Replace the placeholders in the header of a safetensors file.

    Args:
        path: The path of the file.
        hashes: The hashes, by their placeholders.

    Raises:
        OSError: If the disk refuses.
    """
    with path.open("r+b") as file:
        header = file.read(int.from_bytes(file.read(8), "little")).decode()
        file.seek(8)
        file.write(filled(header, hashes).encode())


def filled(text: str, hashes: Mapping[str, str]) -> str:
    """Return a text with hashes in place of their placeholders.

    Args:
        text: The text.
        hashes: The hashes, by their placeholders.
    """
    for stands, found in hashes.items():
        text = text.replace(stands, found)
    return text

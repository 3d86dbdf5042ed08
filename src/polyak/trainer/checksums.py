"""The SHA-256 of a checkpoint file, in the comment at the end of the zip archive that ``torch.save`` writes.

``torch.load`` and ``unzip`` skip the comment. The hash is one of all bytes before it.
"""

import hashlib
import zipfile
from pathlib import Path
from typing import BinaryIO

_LABEL = b"polyak sha256 "
_HEX = 64
_COMMENT = len(_LABEL) + _HEX
# The last entry of an archive; its last two bytes are the length of the comment that follows.
_END = b"PK\x05\x06"
_END_BYTES = 22
_CHUNK_BYTES = 1 << 20


def append(file: BinaryIO) -> None:
    """Append the hash to an archive.

    Args:
        file: Open for reading and writing, with a complete archive.

    Raises:
        OSError: If the disk refuses.
    """
    end = file.seek(-_END_BYTES, 2)
    assert file.read(len(_END)) == _END, "torch.save must write an archive without a comment"
    file.seek(end + _END_BYTES - 2)
    file.write(_COMMENT.to_bytes(2, "little") + _LABEL)
    file.write(_hexdigest(file, end + _END_BYTES + len(_LABEL)))


def verify(path: Path) -> bool:
    """Check a file against the hash at its end; return whether it has one.

    A file without one is checked against the checksums of the archive, which leave out the bytes between its entries.

    Args:
        path: The path of the file.

    Raises:
        ValueError: If the file differs from what was written.
        OSError: If it cannot be read.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _COMMENT))
        comment = file.read()
        if comment.startswith(_LABEL) and len(comment) == _COMMENT:
            if _hexdigest(file, size - _HEX) != comment[len(_LABEL) :]:
                raise ValueError("it does not have the SHA-256 that it ends with")
            return True
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if (bad := archive.testzip()) is not None:
                raise ValueError(f"{bad!r} in it does not have its checksum")
    return False


def _hexdigest(file: BinaryIO, size: int) -> bytes:
    """Return the SHA-256 of the first bytes of a file."""
    digest = hashlib.sha256()
    file.seek(0)
    while size and (chunk := file.read(min(size, _CHUNK_BYTES))):
        digest.update(chunk)
        size -= len(chunk)
    return digest.hexdigest().encode()

"""A hash at the end of a checkpoint file, in the comment of the zip archive that ``torch.save`` writes.

There it changes nothing for whoever reads the file: ``torch.load`` and ``unzip`` skip it. Every byte before it counts.
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
        file: Open for reading and writing; all of the archive was written to it.

    Raises:
        OSError: If the disk refuses.
    """
    end = file.seek(-_END_BYTES, 2)
    assert file.read(len(_END)) == _END, "torch.save must write an archive without a comment"
    file.seek(end + _END_BYTES - 2)
    file.write(_COMMENT.to_bytes(2, "little") + _LABEL)
    file.write(_hexdigest(file, end + _END_BYTES + len(_LABEL)))


def verify(path: Path) -> bool:
    """See that a file has the hash that it ends with; return whether it ends with one.

    A file without one is compared with the archive's own checksums, which leave out what lies between the entries.

    Args:
        path: Of the file.

    Raises:
        ValueError: If it is not what was written.
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

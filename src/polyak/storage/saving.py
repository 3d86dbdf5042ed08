"""What a disk that refuses looks like while ``torch.save`` writes: as to all other writers, an ``OSError``."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Turn the errors of ``torch.save`` in a ``with`` block into errors of the system.

    On a full disk it raises a ``RuntimeError`` about positions in its archive, after the error of the file if that has
    one.

    Args:
        path: What is saved, for the error.

    Raises:
        OSError: In place of a ``RuntimeError``.
    """
    try:
        yield
    except RuntimeError as error:
        reason, cause = error.__context__, "torch.save could not write all of it: the disk may be full"
        number, words = (reason.errno, reason.strerror) if isinstance(reason, OSError) else (errno.EIO, cause)
        raise OSError(number, words, str(path)) from error

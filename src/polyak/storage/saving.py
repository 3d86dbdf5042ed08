"""What a disk that refuses looks like while ``torch.save`` writes: as to all other writers, an ``OSError``."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def saving() -> Iterator[None]:
    """Turn the errors of ``torch.save`` in a ``with`` block into errors of the system.

    On a full disk it raises a ``RuntimeError`` about positions in its archive, after the error of the file if that has
    one.

    Raises:
        OSError: In place of a ``RuntimeError``.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise OSError(errno.EIO, "torch.save could not write all of it: the disk may be full") from error

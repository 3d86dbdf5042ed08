"""Safe writes: a file or folder is complete or as it was before, whatever ends the process meanwhile.

The content goes to a temporary name in the same folder and is flushed to the disk, then the temporary gets its final
name in one step, then the folder is flushed. Nothing else in polyak renames or flushes what it writes.
"""

import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from polyak.errors import ExistsError

# The end of the name of everything that is not complete yet.
TEMPORARY = ".tmp"
_MOST_BYTES = 255  # of a name, on almost all file systems


def temporary_path(path: Path, *, process: int | None = None) -> Path:
    """Return the temporary name for what will be ``path``, in the same folder: hidden, and ending in ``.tmp``.

    Args:
        path: The final name.
        process: The writer's id, where several processes may write to ``path``; None where a lock excludes others, so
            that what a killed process left is overwritten.

    Example:
        >>> temporary_path(Path("run/manifest.json")).name, temporary_path(Path("a.pt"), process=12).name
        ('.manifest.json.tmp', '.a.pt.12.tmp')
    """
    of_process = "" if process is None else f".{process}"
    name = f".{path.name}{of_process}{TEMPORARY}"
    if len(os.fsencode(name)) > _MOST_BYTES:
        name = f".{zlib.crc32(os.fsencode(path.name)):08x}{of_process}{TEMPORARY}"
    return path.with_name(name)


@contextmanager
def replacing(path: Path, *, folder: bool = False, exclusive: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write to. It becomes ``path`` if the ``with`` block ends without an error.

    After an error nothing temporary remains, and ``path`` is as it was.

    Args:
        path: The final name. A file that has it is replaced; a folder must be empty.
        folder: Whether the temporary is a folder, which is made here, or a file, which the block makes.
        exclusive: Whether nobody else writes to ``path``, because of a lock. See ``temporary_path``.

    Raises:
        OSError: If the disk refuses.

    Example:
        >>> with replacing(Path("notes.txt")) as temporary:
        ...     _ = temporary.write_text("complete")
        >>> Path("notes.txt").read_text()
        'complete'
    """
    temporary = temporary_path(path, process=None if exclusive else os.getpid())
    try:
        if folder:
            new_folder(temporary)
        else:
            remove(temporary)
        yield temporary
        put(temporary, path)
    except BaseException:
        with suppress(OSError):
            remove(temporary)
        raise


def require_new(path: Path, *, overwrite: bool) -> None:
    """Check that nothing is lost when ``path`` is written.

    Args:
        path: The path of a file, or of a folder, which may be empty.
        overwrite: Whether the user has asked to replace it.

    Raises:
        ExistsError: If there is something that the user has not asked to replace, or a folder with files.
    """
    if path.is_dir() and any(path.iterdir()):
        raise ExistsError(f"the output must be new (got {path}, a folder that has files); choose another")
    if not overwrite and path.exists() and not path.is_dir():
        raise ExistsError(
            f"the output must be new (got {path}, which is there); choose another, or replace it by overwrite=True"
        )


def new_folder(path: Path) -> None:
    """Make an empty folder and its parents; remove what had its name.

    Args:
        path: Its temporary name.

    Raises:
        OSError: If the disk refuses.
    """
    remove(path)
    path.mkdir(parents=True)


def put(temporary: Path, path: Path, *, over_folder: bool = False) -> None:
    """Flush a file or folder to the disk and give it its final name. After an error, nothing has changed.

    Args:
        temporary: Its temporary name, in the same folder.
        path: Its final name. A file is replaced in one step, and so is an empty folder.
        over_folder: Whether ``path`` may also be a folder with content, or a file in place of which a folder comes.
            These cannot be replaced in one step: the old one has a temporary name until the new one is in place.

    Raises:
        OSError: If the disk refuses, or ``path`` is such a folder or file and ``over_folder`` is False.
    """
    _flush_all(temporary)
    old = temporary_path(path.with_name(f"{path.name}.old"))
    moved = over_folder and (path.is_dir() or (temporary.is_dir() and path.exists()))
    try:
        if moved:
            remove(old)
            path.replace(old)
        temporary.replace(path)
    except BaseException:
        if moved and old.exists() and not path.exists():
            old.replace(path)
        raise
    # It is in place, and an error would say that it is not. All that is open is whether a power cut would undo it.
    with suppress(OSError):
        flush_folder(path.parent)
        if moved:
            remove(old)


def remove(path: Path) -> None:
    """Delete a file, link or folder with all that is in it; do nothing if it is absent.

    Args:
        path: Any path.

    Raises:
        OSError: If the disk refuses.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_whole(path: Path) -> None:
    """Delete a file or folder so that no part of it stays under its name, even if it is interrupted.

    Args:
        path: Any path.

    Raises:
        OSError: If the disk refuses.
    """
    if path.is_dir():
        temporary = temporary_path(path)
        remove(temporary)
        path = path.replace(temporary)
    remove(path)


def flush(file: IO[bytes] | IO[str]) -> None:
    """Flush what was written to an open file to the disk.

    Args:
        file: Open for writing.

    Raises:
        OSError: If the disk refuses.
    """
    file.flush()
    os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, if the system can.

    Args:
        folder: Any folder.

    Raises:
        OSError: If the disk refuses.
    """
    if os.name == "nt":
        return  # Windows cannot open a folder
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_all(path: Path) -> None:
    if path.is_dir():
        for inner in path.iterdir():
            _flush_all(inner)
        flush_folder(path)
    else:
        with path.open("r+b") as file:  # Windows flushes only what is open for writing
            os.fsync(file.fileno())

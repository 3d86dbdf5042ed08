"""Compile the C kernel beside its sources.

Installing the package does this (``hatch_build.py`` at the root of the repository, which loads this file by its path,
since torch is not there yet), and so does ``python -m polyak.kernels``. It needs a C compiler, the ``cc`` on the path
or what ``CC`` names, and nothing else: the library knows neither Python nor torch. With ``POLYAK_SANITIZE`` in the
environment another library is built and used, which checks each access to memory (``make sanitize``).
"""

import os
import shlex
import subprocess
import tempfile
import zlib
from pathlib import Path

FOLDER = Path(__file__).parent
_SANITIZED = bool(os.environ.get("POLYAK_SANITIZE"))
LIBRARY = FOLDER / ("_cpu_sanitized.so" if _SANITIZED else "_cpu.so")
_SOURCES = ("cpu.c", "fingerprint.c", "lerp.h")
_FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC", "-pthread")
_SANITIZERS = ("-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


class BuildError(Exception):
    """The kernel could not be compiled; the one in torch does the same."""


def sources_id() -> int:
    """Return a number that tells the sources of one library from those of another. Never 0."""
    return zlib.crc32(b"".join((FOLDER / name).read_bytes() for name in _SOURCES)) or 1


def build() -> Path:
    """Compile the kernel, and return where it is.

    Raises:
        BuildError: If there is no compiler, or it fails.
    """
    compiler = shlex.split(os.environ.get("CC") or "cc")
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        draft = Path(folder) / LIBRARY.name
        files = [str(FOLDER / name) for name in _SOURCES if name.endswith(".c")]
        flags = (*_FLAGS, *_SANITIZERS) if _SANITIZED else _FLAGS
        command = [*compiler, *flags, f"-DSOURCES={sources_id()}", "-o", str(draft), *files]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise BuildError(f"a C compiler must be on the path, or named by CC ({error})") from error
        if done.returncode:
            raise BuildError(f"{shlex.join(command)} failed:\n{done.stderr[-2000:]}")
        # Another process may have the old one mapped: it keeps it.
        draft.replace(LIBRARY)
    return LIBRARY

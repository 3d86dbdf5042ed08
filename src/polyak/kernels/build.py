"""Compiles the C kernel, next to its sources.

Installing the package does this (``hatch_build.py`` at the root of the repository, which loads this file by its path,
since a build has no torch), and so does ``python -m polyak.kernels``. It needs a C compiler, ``cc`` on the path or what
``CC`` names, and nothing else: the library uses neither Python nor torch. With ``POLYAK_SANITIZE`` in the environment
it builds another library, which checks each access to memory (``make sanitize``).
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
    """The C kernel could not be compiled. The kernel in torch gives the same results."""


def sources_id() -> int:
    """Return a number that identifies the sources. It is never 0."""
    return zlib.crc32(b"".join((FOLDER / name).read_bytes() for name in _SOURCES)) or 1


def build() -> Path:
    """Compile the kernel, and return the path of the library.

    Raises:
        BuildError: If there is no compiler, or it fails.
    """
    compiler = shlex.split(os.environ.get("CC") or "cc")
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        compiled = Path(folder) / LIBRARY.name
        files = [str(FOLDER / name) for name in _SOURCES if name.endswith(".c")]
        flags = (*_FLAGS, *_SANITIZERS) if _SANITIZED else _FLAGS
        command = [*compiler, *flags, f"-DSOURCES={sources_id()}", "-o", str(compiled), *files]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise BuildError(f"a C compiler must be on the path, or named by CC ({error})") from error
        if done.returncode:
            raise BuildError(f"{shlex.join(command)} failed:\n{done.stderr[-2000:]}")
        # A process that has the old library mapped keeps it.
        compiled.replace(LIBRARY)
    return LIBRARY

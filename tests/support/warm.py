"""Runs Python programs in new processes that have torch already: they are forked from a process that has imported it.

``run("-m", "polyak", "env")`` does what ``subprocess.run([sys.executable, "-m", "polyak", "env"])`` does, without the
two seconds of a processor that ``import torch`` takes. The server that forks starts with the first program. It has one
thread, has imported nothing of polyak, and ends with the process that started it.
"""

import atexit
import functools
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

_PATHS = "PYTHONPATH"
_COMMAND = '#!/bin/sh\nexec "{python}" -IS "{file}" call "{folder}/socket" -m polyak "$@"\n'


class Process:
    """A program that runs, as a ``subprocess.Popen`` whose streams are captured as text.

    Args:
        arguments: Those of ``python``: ``-m`` and a module, ``-c`` and code, or a file, and what the program is given.
        cwd: Its working directory; by default this one.
        env: Its environment; by default this one.
    """

    def __init__(self, *arguments: object, cwd: Path | str = ".", env: Mapping[str, str] | None = None) -> None:
        self.returncode: int | None = None
        self._out, self._err = (tempfile.TemporaryFile() for _ in range(2))  # noqa: SIM115  until `communicate`
        self._call = _Call(f"{folder()}/socket", [0, self._out.fileno(), self._err.fileno()])
        self.pid = self._call.begin([str(one) for one in arguments], os.path.realpath(cwd), env or os.environ)

    def poll(self) -> int | None:
        """Return the exit status if the program has ended: minus the number of the signal that ended it."""
        if self.returncode is None and self._call.has_ended():
            self.returncode = self._call.end()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait until the program ends; return what it wrote to stdout and to stderr.

        Args:
            timeout: In seconds.
        """
        assert self.returncode is not None or self._call.has_ended(timeout), "the program did not end in time"
        self.poll()
        self._call.close()
        return _text(self._out), _text(self._err)

    def send_signal(self, number: int) -> None:
        """Send a signal to the program, if it has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL to the program, if it has not ended."""
        self.send_signal(signal.SIGKILL)


def run(
    *arguments: object, cwd: Path | str = ".", env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program until it ends, as ``subprocess.run`` with captured streams.

    Args:
        arguments: See ``Process``.
        cwd: See ``Process``.
        env: See ``Process``.
    """
    process = Process(*arguments, cwd=cwd, env=env)
    out, err = process.communicate()
    return subprocess.CompletedProcess(arguments, process.poll() or 0, out, err)


@functools.cache
def folder() -> Path:
    """Return a folder with an executable ``polyak`` that runs the command like ``run``; start the server."""
    owner, temporary = os.getpid(), tempfile.TemporaryDirectory()
    made = Path(temporary.name)
    (made / "polyak").write_text(_COMMAND.format(python=sys.executable, file=__file__, folder=made))
    (made / "polyak").chmod(0o755)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{made}/socket")
    listener.listen(64)
    fd, null = listener.fileno(), subprocess.DEVNULL
    environment = {name: value for name, value in os.environ.items() if name != _PATHS} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "serve", str(fd)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=null, env=environment, pass_fds=[fd])
    listener.close()

    def stop() -> None:
        if os.getpid() == owner:  # and not in a process that was forked from this one
            assert server.stdin is not None
            server.stdin.close()
            server.wait()
            temporary.cleanup()

    atexit.register(stop)
    return made


class _Call:
    """A connection to the server: it takes a program and three streams, and answers with a process and its status."""

    def __init__(self, path: str, streams: list[int]) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        socket.send_fds(self._socket, [b"+"], streams)
        self._file = self._socket.makefile("rw")

    def begin(self, arguments: list[str], cwd: str, env: Mapping[str, str]) -> int:
        self._file.write(json.dumps([arguments, cwd, dict(env)]) + "\n")
        self._file.flush()
        return int(self._file.readline())

    def has_ended(self, timeout: float | None = 0) -> bool:
        return bool(select.select([self._socket], [], [], timeout)[0])

    def end(self) -> int:
        return int(self._file.readline())

    def close(self) -> None:
        self._file.close()
        self._socket.close()


def _text(file: BinaryIO) -> str:
    with file:
        file.seek(0)
        return file.read().decode()


def _serve(listener: socket.socket) -> None:
    """Fork a process for each connection, and return in that process when it has run its program."""
    import torch._dynamo  # noqa: F401  the first optimizer imports it

    gc.collect()
    gc.freeze()  # so that the pages of these objects stay shared
    while True:
        if 0 in select.select([0, listener], [], [])[0]:  # the process that started this one has ended
            os._exit(0)
        connection, _ = listener.accept()
        if not os.fork():
            listener.close()
            return _answer(connection)
        connection.close()
        with suppress(ChildProcessError):  # all have ended
            while any(os.waitpid(-1, os.WNOHANG)):
                pass


def _answer(connection: socket.socket) -> None:
    """Fork the process that runs the program; wait for it and report its status."""
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    file = connection.makefile("rw")
    arguments, cwd, env = json.loads(file.readline())
    pid = os.fork()
    if pid:
        for status in (lambda: pid, lambda: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])):
            file.write(f"{status()}\n")
            file.flush()
        os._exit(0)
    file.close()
    connection.close()
    for number, (stream, name) in enumerate(zip(streams, ("stdin", "stdout", "stderr"), strict=True)):
        os.dup2(stream, number)
        os.close(stream)
        _reopen(number, name)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    _python(arguments, [one for one in env.get(_PATHS, "").split(os.pathsep) if one])


def _reopen(number: int, name: str) -> None:
    """Let a stream of ``sys`` begin with the file that its descriptor has now, which may be of another kind."""
    made = getattr(sys, name)
    buffering = 1 if made.line_buffering else -1
    new = open(number, made.mode, buffering, made.encoding, made.errors, closefd=False)  # noqa: SIM115  until the end
    setattr(sys, name, new)
    setattr(sys, f"__{name}__", new)


def _python(arguments: list[str], paths: list[str]) -> None:
    """Run a program as the interpreter does."""
    first, *rest = arguments
    start = {"-c": "", "-m": str(Path.cwd())}.get(first, str(Path(first).resolve().parent))
    sys.path[:1] = [start, *paths]
    sys.argv[:] = ["-c", *rest[1:]] if first in {"-c", "-m"} else arguments
    if first == "-m":
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(main))
    else:
        runpy.run_path(first, run_name="__main__")


def _forward(path: str, *arguments: str) -> int:
    """Run a program with the streams of this process; return its exit status as a shell shows it."""
    call = _Call(path, [0, 1, 2])
    pid = call.begin(list(arguments), str(Path.cwd()), os.environ)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os.kill(pid, number))
    status = call.end()
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    if sys.argv[1] == "call":
        sys.exit(_forward(*sys.argv[2:]))
    _serve(socket.socket(fileno=int(sys.argv[2])))

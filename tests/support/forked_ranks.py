"""Ranks for tests of engines, which take longer to import than most of these tests take: imported once, and forked."""

import importlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

from ranks import Ranks, _work


class Origin:
    """A process that imports some modules, and forks ranks.

    Args:
        *modules: What is imported, by name, in this order.
    """

    def __init__(self, *modules: str) -> None:
        self._control, theirs = socket.socketpair()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, __file__, str(theirs.fileno()), *modules]
        with theirs:
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)

    def fork(self) -> tuple[int, Connection]:
        """Return the number of a new rank, and a connection to it."""
        ours, theirs = multiprocessing.Pipe()
        with theirs:
            socket.send_fds(self._control, [b"\0"], [theirs.fileno()])
        number = self._control.recv(8)
        assert number, "the process with the imports died; see its messages above"
        return int.from_bytes(number, "big"), ours

    def __enter__(self) -> "Origin":
        return self

    def __exit__(self, *args: object) -> None:
        self._control.close()
        self._process.wait()


class ForkedRanks(Ranks):
    """As ``Ranks``, in forks of one process. To start them again after a test that kills them costs nothing.

    Args:
        folder: For the files of their rendezvous.
        origin: What forks them.
        most: Number of processes.
    """

    def __init__(self, folder: Path, origin: Origin, most: int = 4) -> None:
        self._origin = origin
        super().__init__(folder, most)

    def _start(self) -> None:
        forked = [self._origin.fork() for _ in range(self._most)]
        self._numbers, self._ends = [number for number, _ in forked], [end for _, end in forked]

    def close(self) -> None:
        """End the processes."""
        for end in self._ends:
            end.close()
        for number in self._numbers:
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)


def main() -> None:
    """Import modules, then fork a rank for each connection that is received."""
    control = socket.socket(fileno=int(sys.argv[1]))
    for name in sys.argv[2:]:
        importlib.import_module(name)
    while True:
        _, received, *_ = socket.recv_fds(control, 1, 1)
        if not received:
            with suppress(ChildProcessError):  # all have ended
                while os.wait():
                    pass
            return
        # Not waited for, so that its number stays its own until this process ends.
        number = os.fork()
        if number == 0:
            control.close()
            _be_a_rank(Connection(received[0]))
        os.close(received[0])
        control.send(number.to_bytes(8, "big"))


def _be_a_rank(end: Connection) -> None:
    try:
        _work(end)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    main()

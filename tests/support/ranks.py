"""Real processes in gloo groups. Tests share them, since each takes seconds to start."""

import io
import multiprocessing
import traceback
import uuid
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from waiting import END_S

TRIES = 5

# What jobs import, and what torch imports where it is first used: Dynamo with the first optimizer.
PRELOADED = [
    *("torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor.parallel"),
    *("torch.distributed.tensor.debug", "torch.distributed.device_mesh", "torch.nn.parallel", "safetensors.torch"),
    *("polyak.trainer", "polyak.record", "polyak.sharding", "polyak.export", "polyak.sweeping"),
]


def processes(method: str = "forkserver") -> Any:
    """Return a context of ``multiprocessing``; a forkserver has imported torch, which takes seconds."""
    context = multiprocessing.get_context(method)
    context.set_forkserver_preload(PRELOADED)
    return context


class Ranks:
    """Up to four processes; each job runs in a new group of the first of them.

    Args:
        folder: For the files of their rendezvous.
        most: Number of processes.
        backend: ``gloo``, or ``nccl`` where each rank has a GPU.
        method: How processes start. With ``fork`` they have all that this one has imported, such as frameworks.
    """

    def __init__(self, folder: Path, most: int = 4, backend: str = "gloo", method: str = "forkserver") -> None:
        self._folder, self._backend = folder, backend
        # CUDA works in no fork of a process that may have used it.
        self._context = processes("spawn" if torch.cuda.is_available() else method)
        self._most = most
        self._start()

    def _start(self) -> None:
        self._ends, self._processes = [], []
        for _ in range(self._most):
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._ends.append(ours)
            self._processes.append(process)

    def run(self, size: int, job: Callable[..., Any], *args: Any) -> list[Any]:
        """Run ``job(*args)`` in a group of ``size`` processes, and return what each returned; raise if one raised."""
        results = self.attempt(size, job, *args)
        raised = [f"rank {rank} of {size} raised:\n{one.text}" for rank, one in enumerate(results) if _failed(one)]
        assert not raised, raised[0]
        return results

    def attempt(self, size: int, job: Callable[..., Any], *args: Any) -> list[Any]:
        """Do the same as ``run``, and return a ``_Raised`` with a ``text`` for a rank that raised."""
        for _ in range(TRIES):
            if self._connect(size):
                break
            # On a busy machine gloo's connections are sometimes closed while they are made.
            self.close()
            self._start()
        else:
            raise AssertionError(f"{size} processes made no group in {TRIES} tries; see their messages above")
        for end in self._ends[:size]:
            end.send((job, args))
        try:
            received = [end.recv_bytes() for end in self._ends[:size]]
        except (EOFError, ConnectionError):
            self.close()
            self._start()  # for the tests that follow
            raise AssertionError("a rank died without an error; see its messages above") from None
        return [torch.load(io.BytesIO(one), weights_only=False) for one in received]

    def _connect(self, size: int) -> bool:
        """Make a group of the first processes; return whether all are in it, as soon as that is known."""
        meeting = self._folder / uuid.uuid4().hex
        waiting = self._ends[:size]
        try:
            for rank, end in enumerate(waiting):
                end.send((self._backend, rank, size, str(meeting)))
        except ConnectionError:
            return False
        while waiting:
            for end in wait(waiting):
                waiting.remove(end)
                if not _answer(end):
                    return False
        return True

    def close(self) -> None:
        """End the processes."""
        for end in self._ends:
            end.close()
        for process in self._processes:
            process.kill()
            process.join()


def _failed(result: Any) -> bool:
    return isinstance(result, _Raised)


class _Raised:
    def __init__(self, text: str) -> None:
        self.text = text


def _answer(end: Connection) -> bool:
    try:
        return end.recv()
    except (EOFError, ConnectionError):  # the process died
        return False


def _work(end: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            backend, rank, size, meeting = end.recv()
        except (EOFError, ConnectionError):
            return
        if backend == "nccl":
            torch.cuda.set_device(rank)
        try:
            dist.init_process_group(
                backend, init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=timedelta(seconds=END_S)
            )
        except Exception:
            traceback.print_exc()
            end.send(False)
            return
        end.send(True)
        job, args = end.recv()
        try:
            result = job(*args)
        except BaseException:
            result = _Raised(traceback.format_exc())
        finally:
            dist.destroy_process_group()
        buffer = io.BytesIO()
        torch.save(result, buffer)
        end.send_bytes(buffer.getvalue())

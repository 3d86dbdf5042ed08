"""Real processes in gloo groups. Tests share them, since each takes seconds to start."""

import io
import multiprocessing
import traceback
import uuid
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from waiting import END_S


class Ranks:
    """Up to four processes; each job runs in a new group of the first of them.

    Args:
        folder: For the files of their rendezvous.
        most: Number of processes.
        backend: ``gloo``, or ``nccl`` where each rank has a GPU.
    """

    def __init__(self, folder: Path, most: int = 4, backend: str = "gloo") -> None:
        self._folder, self._backend = folder, backend
        context = multiprocessing.get_context("spawn")
        self._ends, self._processes = [], []
        for _ in range(most):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
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
        meeting = self._folder / uuid.uuid4().hex
        for rank in range(size):
            self._ends[rank].send((self._backend, rank, size, str(meeting), job, args))
        received = [self._ends[rank].recv_bytes() for rank in range(size)]
        return [torch.load(io.BytesIO(one), weights_only=False) for one in received]

    def close(self) -> None:
        """End the processes."""
        for end, process in zip(self._ends, self._processes, strict=True):
            end.close()
            process.join(timeout=5)
            process.kill()


def _failed(result: Any) -> bool:
    return isinstance(result, _Raised)


class _Raised:
    def __init__(self, text: str) -> None:
        self.text = text


def _work(end: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            backend, rank, size, meeting, job, args = end.recv()
        except EOFError:
            return
        if backend == "nccl":
            torch.cuda.set_device(rank)
        dist.init_process_group(
            backend, init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=timedelta(seconds=END_S)
        )
        try:
            result = job(*args)
        except BaseException:
            result = _Raised(traceback.format_exc())
        finally:
            dist.destroy_process_group()
        buffer = io.BytesIO()
        torch.save(result, buffer)
        end.send_bytes(buffer.getvalue())

"""Kill writers of a record at random moments, and check the records that they leave.

To be run in a process without threads, which may fork: to start Python for each kill would take minutes.
"""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch

from polyak.record import Edge, Record, Writer
from polyak.storage.safetensors import TensorInfo
from polyak.time import Timestamp

OPERATIONS = 60
TENSORS = {
    "weight": TensorInfo(torch.float32, (64, 64), averaged=True),
    "count": TensorInfo(torch.int64, (), averaged=False),
}


def edge(updates: int) -> Edge:
    return Edge(updates, Timestamp().to_next_batch(steps=updates))


def operations() -> list[Callable[[Writer], object]]:
    """Return appends, with some pins and raw weights. Each results in a different manifest."""
    result: list[Callable[[Writer], object]] = []
    appended = 0
    for i in range(OPERATIONS):
        if i % 5 == 4:
            result.append(lambda writer, i=i: writer.pin(f"at {i}"))
        elif i % 10 == 7:
            result.append(lambda writer, i=i: writer.unpin(f"at {i - 3}"))
        elif i % 10 == 2:
            result.append(lambda writer, i=i: writer.keep_raw({"weight": torch.full((64, 64), i / 3)}))
        else:
            result.append(lambda writer, n=appended: append(writer, n))
            appended += 1
    return result


def append(writer: Writer, n: int) -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(n))
    writer.append({"weight": weight, "count": torch.tensor(n)}, edge(3 * n), edge(3 * n + 3))


def manifest(folder: Path) -> str | None:
    path = folder / "manifest.json"
    return path.read_text() if path.exists() else None


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}


def read(folder: Path) -> None:
    record = Record(folder)
    record.verify()
    for segment in record.segments:
        with record.open(segment) as file:
            assert file.read("weight").isfinite().all()


def write(folder: Path, done: int, pipe: int) -> None:
    with Writer(folder, TENSORS, per_level=2) as writer:
        for operation in operations()[done:]:
            operation(writer)
            os.write(pipe, b".")


def finish(folder: Path, done: int, reference: Path) -> None:
    with Path(os.devnull).open("wb") as null:
        write(folder, max(0, done), null.fileno())
    assert content(folder) == content(reference)
    shutil.rmtree(folder)


def main(root: Path, kills: int, dtype: torch.dtype) -> None:
    """Kill a writer so many times."""
    TENSORS["weight"] = TensorInfo(dtype, (64, 64), averaged=True)
    chance = random.Random(0)
    with Writer(root / "reference", TENSORS, per_level=2) as writer:
        before_and_after = [None, manifest(root / "reference")]
        began = time.monotonic()
        for operation in operations():
            operation(writer)
            before_and_after.append(manifest(root / "reference"))
        took_s = time.monotonic() - began
    assert len(set(before_and_after)) == OPERATIONS + 2

    folder = root / "record"
    done, killed, half_written = -1, 0, 0  # -1: not even an empty record
    while killed < kills or (not half_written and killed < 20 * kills):
        reader, pipe = os.pipe()
        child = os.fork()
        if not child:
            write(folder, max(0, done), pipe)
            os._exit(0)
        os.close(pipe)
        acknowledged = max(0, done)
        for _ in range(chance.randrange(11)):  # after some of the operations, however long they take
            acknowledged += len(os.read(reader, 1))
        time.sleep(chance.uniform(0, 2 * took_s / OPERATIONS))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        while dots := os.read(reader, 4096):
            acknowledged += len(dots)
        os.close(reader)

        killed += os.WIFSIGNALED(status)
        done = before_and_after.index(manifest(folder)) - 1
        assert done in {acknowledged, acknowledged + 1} or (done == -1 and not acknowledged)
        if done >= 0:
            read(folder)
        half_written += any(folder.glob("*.tmp"))
        if done == OPERATIONS:
            finish(folder, done, root / "reference")
            done = -1
    finish(folder, done, root / "reference")
    assert half_written

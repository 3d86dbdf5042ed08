"""Kill one or all of the ranks that write a record at random moments, and check the records that they leave.

To be run in a process without threads, which may fork: to start Python for each rank would take minutes.
"""

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch._dynamo  # what the ranks import, once and before they fork
import torch.distributed as dist
import torch.distributed.checkpoint
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from waiting import END_S

import polyak.record.shards
from polyak.record import Edge, Record, Writer
from polyak.sharding import Ranks
from polyak.storage.safetensors import TensorInfo
from polyak.time import Timestamp

OPERATIONS = 40
TENSORS = {
    "weight": TensorInfo(torch.float32, (50, 40), averaged=True),
    "count": TensorInfo(torch.int64, (), averaged=False),
}


def edge(updates: int) -> Edge:
    return Edge(updates, Timestamp().to_next_batch(steps=updates))


def spread(tensor: Tensor, mesh: DeviceMesh | None) -> Tensor:
    if mesh is None:
        return tensor
    own = [*tensor.chunk(mesh.size()), *[tensor[:0]] * mesh.size()][mesh.get_local_rank()]
    return DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=tensor.shape, stride=tensor.stride())


def operations(mesh: DeviceMesh | None) -> list[Callable[[Writer], object]]:
    """Return appends, with some pins and raw weights."""
    result: list[Callable[[Writer], object]] = []
    appended = 0
    for i in range(OPERATIONS):
        if i % 5 == 4:
            result.append(lambda writer, i=i: writer.pin(f"at {i}"))
        elif i % 10 == 7:
            result.append(lambda writer, i=i: writer.unpin(f"at {i - 3}"))
        elif i % 10 == 2:
            result.append(lambda writer, i=i: writer.keep_raw({"weight": spread(torch.full((50, 40), i / 3), mesh)}))
        else:
            result.append(lambda writer, n=appended: append(writer, n, mesh))
            appended += 1
    return result


def append(writer: Writer, n: int, mesh: DeviceMesh | None) -> None:
    weight = torch.randn(50, 40, generator=torch.Generator().manual_seed(n))
    writer.append({"weight": spread(weight, mesh), "count": torch.tensor(n)}, edge(3 * n), edge(3 * n + 3))


def stands(folder: Path) -> tuple[object, ...] | None:
    """Return the contents of the record, without its division into parts; None if there is none yet."""
    if not (folder / "manifest.json").exists():
        return None
    pins = polyak.record.load_manifest(folder).pins
    record = Record(folder)
    record.verify()
    found: list[object] = [{name: len(pin.files) for name, pin in pins.items()}]
    for segment in record.segments:
        with record.open(segment) as file:
            values = [file.read(name).double().sum().item() for name in record.tensors]
        found.append((segment.start.updates, segment.end.updates, segment.level, values))
    raw = record.raw_weights()["weight"].double().sum().item() if record.raw else None
    return repr(found), len(record.segments), raw


def write(folder: Path, meeting: Path, rank: int, size: int, done: int, pipe: int) -> None:
    ranks = mesh = None
    if size > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=timedelta(seconds=END_S)
        )
        mesh = init_device_mesh("cpu", (size,))
        assert dist.group.WORLD is not None
        ranks = Ranks(dist.group.WORLD, torch.device("cpu"), replicas=False).separate()
    os.write(pipe, b"r")  # killed before this, a rank would leave the others waiting for the timeout of the group
    with Writer(folder, TENSORS, per_level=1, ranks=ranks) as writer:
        for operation in operations(mesh)[done:]:
            operation(writer)
            if rank == 0:
                os.write(pipe, b".")


def run(folder: Path, meeting: Path, size: int, done: int, pipe: int) -> list[int]:
    children = []
    for rank in range(size):
        child = os.fork()
        if not child:
            code = 1
            try:
                with suppress(Exception):  # another rank was killed
                    write(folder, meeting, rank, size, done, pipe)
                    code = 0
            finally:
                os._exit(code)
        children.append(child)
    return children


def main(root: Path, kills: int) -> None:
    """Kill ranks so many times."""
    chance = random.Random(0)
    with Writer(root / "reference", TENSORS, per_level=1) as writer:
        before_and_after = [None, stands(root / "reference")]
        for operation in operations(None):
            operation(writer)
            before_and_after.append(stands(root / "reference"))
    assert len(set(before_and_after)) == OPERATIONS + 2

    folder, number = root / "record", 0
    done, killed, survivors = -1, 0, 0  # -1: not even an empty record
    while killed < kills or done < OPERATIONS:
        if done == OPERATIONS:
            folder, done = root / f"record {number}", -1
        number += 1
        size = chance.choice([1, 2, 2, 3, 3])
        reader, pipe = os.pipe()
        children = run(folder, root / f"meeting {number}", size, max(0, done), pipe)
        os.close(pipe)
        said, ready = b"", 0
        while ready < len(children):
            if not (one := os.read(reader, 1)):  # all have ended
                break
            ready, said = ready + (one == b"r"), said + one
        if killed < kills:
            for _ in range(chance.randrange(8)):  # after some of the operations, however long they take
                said += os.read(reader, 1)
            time.sleep(chance.uniform(0, 0.05))
            for child in children if chance.random() < 0.4 else [chance.choice(children)]:
                os.kill(child, signal.SIGKILL)
        ends = [os.waitpid(child, 0)[1] for child in children]
        while more := os.read(reader, 4096):
            said += more
        acknowledged = max(0, done) + said.count(b".")
        os.close(reader)
        killed += any(map(os.WIFSIGNALED, ends))
        survivors += any(map(os.WIFSIGNALED, ends)) and not all(map(os.WIFSIGNALED, ends))
        done = before_and_after.index(stands(folder)) - 1
        assert done in {acknowledged, acknowledged + 1} or (done == -1 and not acknowledged), (done, acknowledged)
    assert survivors

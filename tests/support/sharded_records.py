"""What the processes of ``ranks.Ranks`` do with a ``Recorder``."""

import contextlib
import dataclasses
import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sharded import Reference, spread, train, weights
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from waiting import wait_until

import polyak.record.output
import polyak.record.shards
from polyak import Event, Record, Recorder, attach
from polyak.record import Edge, Writer
from polyak.sharding import Ranks
from polyak.storage.safetensors import TensorInfo
from polyak.tensors.slots import slots, unwrap
from polyak.time import Timestamp
from polyak.training.loop import Loop
from polyak.training.state import LoopState


class Whole:
    """A recorder in one process, of a full copy of a sharded model; on rank 0 alone."""

    def __init__(self, model: torch.nn.Module, recorder: Recorder) -> None:
        self.model = Reference(unwrap(model), None)._model
        self.loop = Loop([recorder], LoopState(self.model))
        self.begun = False

    @torch.no_grad()
    def take(self, values: dict[str, torch.Tensor]) -> None:
        for slot in slots(self.model):
            slot.tensor.copy_(values[slot.name])
        if not self.begun:
            self.loop.fire(Event.FIT_START)
            self.begun = True
        self.loop.end_batch()


class Run:
    """A model in training, its recorder, and another of the whole."""

    def __init__(self, kind: str, folder: str, interval: str = "2ba", per_level: int = 1, **options: Any) -> None:
        self.folder, self.model = Path(folder), spread(kind)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.02)
        self.recorder = Recorder(self.folder / "sharded" / "record", interval, per_level, **options)
        self.attached = attach(self.recorder, self.model, self.optimizer)
        whole = Recorder(self.folder / "whole" / "record", interval, per_level, **options)
        self.whole = Whole(self.model, whole)

    def train(self, steps: range) -> None:
        for step in steps:
            train(self.model, self.optimizer, range(step, step + 1))
            values = weights(self.model)
            if dist.get_rank() == 0:
                self.whole.take(values)

    def save(self, name: str) -> None:
        planner = DefaultSavePlanner(dedup_save_to_lowest_rank=True)
        state = {"recorder": self.recorder, "clock": self.attached.timestamp.state_dict()}
        dcp.save(state, checkpoint_id=self.folder / name, planner=planner)
        if dist.get_rank() == 0:
            torch.save(self.whole.loop.state_dict(), self.folder / f"{name}.pt")

    def load(self, name: str) -> None:
        state = {"recorder": self.recorder, "clock": self.attached.timestamp.state_dict()}
        dcp.load(state, checkpoint_id=self.folder / name)
        self.attached._loop.state.timestamp = Timestamp.from_state_dict(state["clock"])
        self.whole.loop.load_state_dict(torch.load(self.folder / f"{name}.pt", weights_only=True))

    def end(self) -> None:
        self.attached.detach()
        if dist.get_rank() == 0:
            self.whole.loop.fire(Event.FIT_END)


def records(kind: str, folder: str, stop: int, steps: int, options: dict[str, Any]) -> None:
    """Record; save on the way, and go on, so that the record is ahead of the checkpoint."""
    run = Run(kind, folder, **options)
    if stop == 0:
        run.attached.loop.begin()
        if dist.get_rank() == 0:
            run.whole.loop.fire(Event.FIT_START)
            run.whole.begun = True
    run.train(range(stop))
    run.save("state")
    run.train(range(stop, steps))
    run.end()


def resumes(
    kind: str, folder: str, stop: int, steps: int, options: dict[str, Any], stop_again: int | None = None
) -> int:
    """Load what ``records`` saved, and record on; save on the way, where that is asked for."""
    run = Run(kind, folder, **options)
    run.load("state")
    if stop_again is not None:
        run.train(range(stop, stop_again))
        run.save("state")
        stop = stop_again
    run.train(range(stop, steps))
    run.end()
    return run.recorder.num_updates


def keeps_a_mean(folder: str) -> tuple[bool, bool, list[str]]:
    """Return whether this rank of DDP has a mean and a writer, and what is in its state."""
    run = Run("ddp", folder)
    run.train(range(3))
    recording = run.recorder._recording
    found = recording._mean is not None, recording.queue.appender is not None
    if dist.get_rank() == 0:
        run.recorder.state_dict()  # the first may take it alone
    state = run.recorder.state_dict()
    run.end()
    return *found, sorted(state)


def fails_on(rank: int, kind: str, folder: str, how: str = "full") -> str:
    """Let what one rank writes be refused by the disk, or go elsewhere; return the error of this rank."""
    run = Run(kind, folder, per_level=4)
    run.train(range(3))
    run.recorder._recording.queue.wait()
    module = polyak.record.output if kind == "ddp" else polyak.record.shards
    real = module.write_tensors

    def fails(path: Path, *args: Any) -> Any:
        if how == "full":
            raise OSError(28, "No space left on device")
        return real(Path(folder) / "elsewhere", *args)

    if dist.get_rank() == rank:
        module.write_tensors = fails
    try:
        for step in range(3, 10):
            train(run.model, run.optimizer, range(step, step + 1))
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    else:
        said = "no error"
    finally:
        module.write_tensors = real
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.attached._loop.fire(Event.EXCEPTION)
    return said


def is_refused(what: str, kind: str, folder: str) -> str:
    """Return the error where one rank is unlike the others, or the recorder cannot work."""
    odd, here = dist.get_rank() == 1, Path.cwd()
    options: dict[str, Any] = {}
    if what == "interval" and odd:
        options["interval"] = "3ba"
    if what == "dtype" and odd:
        options["dtype"] = torch.bfloat16
    if what == "seconds":
        options["interval"] = "4sec"
    if what == "folder":  # of one name, on disks that are not shared
        own = Path(folder) / f"disk {dist.get_rank()}"
        own.mkdir()
        os.chdir(own)
        folder = "."
    try:
        run = Run(kind, folder, **options)
        train(run.model, run.optimizer, range(1))
        if what == "updates":
            segment = run.recorder._recording.queue.open
            segment.start = dataclasses.replace(segment.start, updates=segment.start.updates + odd)
            train(run.model, run.optimizer, range(1, 4))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        os.chdir(here)
    return "no error"


def raises_on(rank: int, kind: str, folder: str) -> list[str]:
    """Leave training by an error on one rank, and on the others when that one has left; return their warnings."""
    run, left = Run(kind, folder), Path(folder) / "left"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with contextlib.suppress(KeyError), run.attached:
            for step in range(3):
                train(run.model, run.optimizer, range(step, step + 1))
            if dist.get_rank() != rank:
                wait_until(left.exists)
            raise KeyError
    left.touch()
    return [str(one.message) for one in caught]


def has_another_clock(folder: str) -> str:
    """Return what the state of this rank, whose clock differs, says of the record."""
    run = Run("fsdp", folder)
    run.train(range(1))
    run.attached._loop.state.timestamp = run.attached.timestamp.to_next_batch(steps=0, seconds=1.0 + dist.get_rank())
    run.train(range(1, 5))
    said = run.recorder.state_dict()["record"]
    run.end()
    return said


def writes_again(folder: str) -> None:
    """Rewind a record and write the same once more, while a pin keeps it and after it was deleted in part."""
    assert dist.group.WORLD is not None
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    ranks = Ranks(dist.group.WORLD, torch.device("cpu"), replicas=False).separate()
    with Writer(folder, {"weight": TensorInfo(torch.float32, (9, 4), averaged=True)}, ranks=ranks) as writer:

        def append(n: int) -> None:
            weight = torch.full((9, 4), float(n))
            edges = [Edge(i, Timestamp().to_next_batch(steps=i)) for i in (n, n + 1)]
            writer.append({"weight": distribute_tensor(weight, mesh, [Shard(0)])}, *edges)

        append(0)
        state = writer.state_dict()
        append(1)
        there = Path(folder) / writer.segments[1].file
        writer.pin("kept")
        for damaged in (False, True):
            writer.rewind(state)
            before = there.stat().st_ino
            if damaged and dist.get_rank() == 0:
                (there / "00001.safetensors").unlink()
            dist.barrier()
            append(1)
            assert (there.stat().st_ino != before) == damaged  # at no moment was it gone
        if dist.get_rank() == 0:
            Record(folder).verify()
            assert not list(Path(folder).glob("*.tmp"))


def loaded_by_dcp(kind: str, folder: str, segment: str) -> dict[str, torch.Tensor]:
    """Read a segment into the shards of this number of ranks by DCP's own reader."""
    from sharded import full

    model = unwrap(spread(kind))
    tensors = {slot.name: slot.tensor.detach() for slot in slots(model)}
    dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(Path(folder) / segment)))
    return {name: full(tensor) for name, tensor in tensors.items()}

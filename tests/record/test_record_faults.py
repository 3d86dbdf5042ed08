"""The record where disks, folders and processes fail: nothing is lost, and errors say what to do."""

import errno
import gc
import json
import os
import signal
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from forking import fork, forks, in_a_fork
from torch import nn
from torch.utils.data import DataLoader

from polyak import (
    EMA,
    Callback,
    CheckpointSaver,
    HalfLife,
    JSONLinesLogger,
    PlanWarning,
    Record,
    Recorder,
    RecordError,
    Trainer,
    Uniform,
    attach,
)
from polyak.errors import DtypeError
from polyak.record import Writer, load_manifest
from polyak.record.manifest import Manifest
from polyak.sharding import OneProcess
from polyak.storage.safetensors import TensorInfo
from tests.record.test_record import TENSORS, append, content, record, segment_files
from tests.record.test_recorder import Loop, short
from tests.test_background import gone

torch.set_num_threads(1)


def edges(folder: Path) -> list[int]:
    record = Record(folder)
    record.verify()
    return [0, *(segment.end.updates for segment in record.segments)]


# Folders.


def test_a_recorder_keeps_to_its_folder_when_the_program_changes_directory(tmp_path, monkeypatch) -> None:
    for name in ("first", "other"):
        (tmp_path / name).mkdir()
    other = record(tmp_path / "other" / "run", 3)
    before = content(other)
    monkeypatch.chdir(tmp_path / "first")
    with (loop := Loop(short("run"))).attached:
        loop.run(6)
        monkeypatch.chdir(tmp_path / "other")
        loop.run(6).attached.state_dict()
    assert content(other) == before
    assert edges(tmp_path / "first" / "run")[-1] == 12


@pytest.mark.parametrize("make", [Recorder, CheckpointSaver, Record, lambda name: Writer(name, TENSORS)])
def test_every_object_with_a_folder_makes_it_absolute(tmp_path, monkeypatch, make) -> None:
    record(tmp_path / "run", 1)
    monkeypatch.chdir(tmp_path)
    made = make("run")
    monkeypatch.chdir("/")
    assert made.folder == tmp_path / "run"


def test_a_checkpoint_saver_and_a_logger_keep_to_their_folders(tmp_path, monkeypatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)

    class Leave(Callback):
        def batch_end(self, state, logger):
            os.chdir(tmp_path / "elsewhere")

    trainer(callbacks=[CheckpointSaver("saved", "2ba"), Leave()], loggers=JSONLinesLogger("log.jsonl")).fit()
    assert len(list((tmp_path / "saved").iterdir())) == 5
    assert (tmp_path / "log.jsonl").exists()
    assert not list((tmp_path / "elsewhere").iterdir())


def trainer(*, duration: str = "10ba", **options) -> Trainer:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    data = [(torch.randn(4, 4), torch.randint(2, (4,))) for _ in range(20)]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return Trainer(
        model, data, duration, optimizers=optimizer, loss=nn.functional.cross_entropy, progress_bar=False, **options
    )


def delete(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def replace_by_another(folder: Path) -> None:
    folder.rename(folder.with_name("moved"))
    record(folder, 5)


def delete_the_lock(folder: Path) -> None:
    (folder / "lock").unlink()


def replace_the_lock(folder: Path) -> None:
    (folder / "lock").unlink()
    (folder / "lock").touch()


def move(folder: Path) -> None:
    folder.rename(folder.with_name("moved"))


def point_elsewhere(folder: Path) -> None:
    record(folder.with_name("another"), 5)
    folder.unlink()
    folder.symlink_to(folder.with_name("another"))


GONE = [delete, replace_by_another, delete_the_lock, replace_the_lock, move, point_elsewhere]


@pytest.mark.parametrize("happen", GONE, ids=lambda happen: happen.__name__)
@pytest.mark.parametrize("then", ["append", "pin", "rewind"])
def test_a_writer_whose_folder_was_moved_raises_and_changes_nothing(tmp_path, happen, then) -> None:
    folder = tmp_path / "record"
    if happen is point_elsewhere:
        (tmp_path / "real").mkdir()
        folder.symlink_to(tmp_path / "real")
    writer = Writer(folder, TENSORS)
    empty = writer.state_dict()
    append(writer, 0)
    append(writer, 1)
    happen(folder)
    before = content(folder) if folder.exists() else None
    acts = {"append": lambda: append(writer, 2), "pin": lambda: writer.pin("a"), "rewind": lambda: writer.rewind(empty)}
    for _ in range(2):
        with pytest.raises(RecordError, match="must stay in its place.*deleted, moved or replaced.*another folder"):
            acts[then]()
    writer.close()
    assert (content(folder) if folder.exists() else None) == before


def test_a_folder_that_is_moved_back_is_recorded_to_again(tmp_path) -> None:
    with Writer(tmp_path / "record", TENSORS) as writer:
        (tmp_path / "record").rename(tmp_path / "moved")
        with pytest.raises(RecordError, match="must stay in its place"):
            append(writer, 0)
        (tmp_path / "moved").rename(tmp_path / "record")
        append(writer, 0)
    assert edges(tmp_path / "record") == [0, 2]


def test_a_writer_that_was_closed_writes_no_more(tmp_path) -> None:
    writer = Writer(tmp_path, TENSORS)
    writer.close()
    with pytest.raises(RecordError, match="a Writer must be open"):
        append(writer, 0)


# The lock.


@pytest.mark.parametrize("kind", ["symlink", "dangling symlink", "hard link", "directory", "fifo", "content"])
def test_a_lock_that_is_not_a_file_of_polyaks_is_refused_and_left_as_it_is(tmp_path, kind) -> None:
    precious, folder = tmp_path / "precious", tmp_path / "record"
    precious.write_text("12345\n")
    folder.mkdir()
    lock = folder / "lock"
    {
        "symlink": lambda: lock.symlink_to(precious),
        "dangling symlink": lambda: lock.symlink_to(tmp_path / "new"),
        "hard link": lambda: lock.hardlink_to(precious),
        "directory": lock.mkdir,
        "fifo": lambda: os.mkfifo(lock),
        "content": lambda: lock.write_text("my notes"),
    }[kind]()
    with pytest.raises(RecordError):
        Writer(folder, TENSORS)
    assert precious.read_text() == "12345\n"
    assert not (tmp_path / "new").exists()
    assert kind != "content" or lock.read_text() == "my notes"
    assert [path.name for path in folder.iterdir()] == ["lock"]


@forks
def test_a_forked_process_does_not_hold_the_lock_of_a_run_that_ended(tmp_path) -> None:
    writer = Writer(tmp_path / "a", TENSORS)
    others = [Writer(tmp_path / name, TENSORS) for name in "bc"]
    ready, go_on = os.pipe(), os.pipe()
    if not (child := os.fork()):
        os.write(ready[1], b".")
        os.read(go_on[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    try:
        with pytest.raises(RecordError, match=f"process {os.getpid()} is writing"):
            Writer(tmp_path / "a", TENSORS)  # the child has let go of nothing that is not its own
        for one in (writer, *others):
            one._shared._files._lock._lock._close()  # as the end of a process does, which unlocks nothing by itself
        for name in "abc":
            Writer(tmp_path / name, TENSORS).close()
    finally:
        os.write(go_on[1], b".")
        assert os.waitpid(child, 0)[1] == 0


@forks
def test_a_forked_process_writes_nothing_and_leaves_the_lock_to_the_run(tmp_path) -> None:
    loop = Loop(short(tmp_path / "record")).run(6)
    writer = loop.recorder._recording.queue.appender.writer
    for act in (lambda: loop.run(4), loop.attached.state_dict, lambda: writer.pin("a")):
        assert "forked from it" in in_a_fork(act)
    for act in (writer.close, loop.attached.detach, loop.recorder.close, lambda: leave(loop.attached)):
        assert in_a_fork(act) in ("", "SystemExit: 0")
        with pytest.raises(RecordError, match=f"process {os.getpid()} is writing"):
            Writer(tmp_path / "record", TENSORS)
    loop.run(6).attached.detach()
    assert edges(tmp_path / "record") == [0, 4, 8, 12]


def leave(attached) -> None:
    with attached:
        sys.exit(0)


@forks
def test_a_killed_run_is_resumed_while_its_data_loaders_worker_lives(tmp_path) -> None:
    folder = tmp_path / "record"
    reader, writer = os.pipe()

    def live() -> None:
        loop = Loop(short(folder)).run(6)
        torch.save(loop.attached.state_dict(), f"{folder}.pt")
        batches = iter(DataLoader(range(10**6), num_workers=1, multiprocessing_context="fork"))
        next(batches)
        os.write(writer, str(batches._workers[0].pid).encode())
        signal.pause()

    life = fork(live)
    os.close(writer)
    worker = int(os.read(reader, 20))
    os.close(reader)
    os.kill(worker, signal.SIGSTOP)  # it would end when it sees that its parent has
    try:
        life.kill()
        life.join()
        loop = Loop(short(folder))
        loop.attached.load_state_dict(torch.load(f"{folder}.pt", weights_only=True))
        loop.run(6).attached.detach()
        os.kill(worker, 0)
    finally:
        os.kill(worker, signal.SIGKILL)
    assert edges(folder)[-1] == 12


def test_a_writer_that_nobody_closed_lets_the_next_one_in(tmp_path) -> None:
    writer = Writer(tmp_path, TENSORS)
    del writer
    Writer(tmp_path, TENSORS).close()


# Disks.


class Disk:
    """Refuses to flush while it is told to."""

    def __init__(self, monkeypatch) -> None:
        self.error: int | None = None
        real = os.fsync

        def fsync(descriptor: int) -> None:
            if self.error is not None:
                raise OSError(self.error, os.strerror(self.error))
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)


ERRORS = [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG, errno.ESTALE]


@pytest.mark.slow
@pytest.mark.parametrize("error", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("fails_for", [1, 4, 9])
def test_segments_that_a_disk_refuses_for_a_while_are_written_later(tmp_path, monkeypatch, error, fails_for) -> None:
    disk, said = Disk(monkeypatch), []
    loop = Loop(short(tmp_path, per_level=None))
    for i in range(1, 31):
        disk.error = error if 8 <= i < 8 + fails_for else None
        try:
            loop.run(1)
        except RecordError as refused:
            said.append((i, str(refused)))
            loop.history.append({name: t.detach().double() for name, t in loop.model.state_dict().items()})
        # What the thread has to do meets the disk of this update.
        loop.recorder._recording.queue.appender._thread.finish(int)
    loop.attached.detach()
    found = edges(tmp_path)
    assert found[-1] == 30
    assert said[0][0] == 12
    assert max(i for i, _ in said) <= max(12, 8 + fails_for)
    assert all(os.strerror(error) in message and message.endswith("and continue") for _, message in said)
    record = Record(tmp_path)
    for segment in record.segments:  # each has the mean of its updates, also the one that got longer
        with record.open(segment) as file:
            want = loop.mean("0.weight", segment.start.updates, segment.end.updates)
            torch.testing.assert_close(file.read("0.weight").double(), want, rtol=1e-5, atol=1e-6)
    assert not list(tmp_path.glob("*.tmp"))


def test_no_more_than_one_segment_is_in_memory_while_the_disk_is_full(tmp_path, monkeypatch) -> None:
    disk = Disk(monkeypatch)
    loop = Loop(short(tmp_path)).run(4)
    disk.error = errno.ENOSPC
    with suppress(RecordError):
        loop.run(4)
    with pytest.raises(RecordError):
        loop.run(4)
    kept = loop.recorder._recording.queue.open.before
    for _ in range(20):
        with pytest.raises(RecordError):
            loop.run(1)
        assert loop.recorder._recording.queue.open.before is kept
    disk.error = None
    loop.run(1).attached.detach()
    assert edges(tmp_path)[-1] == loop.recorder.num_updates


def test_close_writes_what_the_end_of_a_run_could_not(tmp_path, monkeypatch) -> None:
    disk = Disk(monkeypatch)
    loop = Loop(short(tmp_path)).run(10)
    loop.recorder._recording.queue.wait()
    disk.error = errno.ENOSPC
    with pytest.raises(RecordError, match="No space"):
        loop.attached.detach()
    with pytest.raises(RecordError, match=r"call close\(\)"):
        loop.attached.state_dict()
    with pytest.raises(RecordError, match="No space"):
        loop.recorder.close()
    disk.error = None
    loop.recorder.close()
    loop.recorder.close()
    assert edges(tmp_path) == [0, 4, 8, 10]
    assert loop.recorder.state_dict()["count"] == 0


def test_a_run_that_a_full_disk_ended_is_continued_by_fit(tmp_path, monkeypatch) -> None:
    disk = Disk(monkeypatch)

    class Fill(Callback):
        def batch_end(self, state, logger):
            if state.timestamp.batch.value == 7:
                disk.error = errno.ENOSPC

    run = trainer(algorithms=short(tmp_path), callbacks=Fill())
    with pytest.raises(RecordError, match="No space"), warnings.catch_warnings():
        warnings.simplefilter("ignore", PlanWarning)
        run.fit()
    disk.error = None
    with warnings.catch_warnings():
        # Where the error came with the last batch, there is nothing left to train, and the trainer says so.
        warnings.filterwarnings("ignore", "fit.. has nothing to train", PlanWarning)
        run.fit()
    assert edges(tmp_path)[-1] == 10


def test_a_run_that_an_error_ends_says_that_its_last_segment_is_still_in_memory(tmp_path, monkeypatch) -> None:
    disk = Disk(monkeypatch)
    loop = Loop(short(tmp_path)).run(6)
    loop.recorder._recording.queue.wait()
    warned = pytest.warns(PlanWarning, match=r"kept in memory: close\(\) of the Recorder tries again")
    with warned, pytest.raises(KeyboardInterrupt), loop.attached:
        disk.error = errno.ENOSPC
        raise KeyboardInterrupt
    disk.error = None
    loop.recorder.close()
    assert edges(tmp_path) == [0, 4, 6]


@forks
def test_a_file_size_limit_of_the_system_loses_nothing(tmp_path) -> None:
    def run() -> None:
        import resource  # which Windows does not have

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        loop, refused = Loop(short(tmp_path / "record")), 0
        for i in range(30):
            limit = 700 if 8 <= i < 15 else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                loop.run(1)
            except RecordError:
                refused += 1
        loop.attached.detach()
        assert refused > 0

    assert in_a_fork(run) == ""
    assert edges(tmp_path / "record")[-1] == 30
    assert not list((tmp_path / "record").glob("*.tmp"))


# Interrupts.


class Interrupted(BaseException):
    pass


def interrupted(n: int, ends: tuple[str, ...]):
    """Return a trace function that interrupts this thread at the n-th line that it runs in these files."""
    lines = 0

    def trace(frame, kind, argument):
        nonlocal lines
        del argument
        if not frame.f_code.co_filename.endswith(ends):
            return None
        lines += kind == "line"
        if kind == "line" and lines == n:
            raise Interrupted
        return trace

    return trace


FILES = ("polyak/record/appender.py", "polyak/background.py", "polyak/record/lock.py", "polyak/storage/lock.py")


@pytest.mark.slow
def test_an_interrupt_at_any_line_of_the_recording_leaves_segments_without_gaps(tmp_path) -> None:
    for n in range(1, 400):
        folder = tmp_path / str(n)
        sys.settrace(interrupted(n, FILES))
        done = False
        try:
            with (loop := Loop(short(folder, interval="2ba", per_level=1))).attached:
                loop.run(4)
            done = True
        except Interrupted:
            pass
        finally:
            sys.settrace(None)
        updates = loop.recorder.num_updates
        loop.recorder.close()  # where the interrupt came while it closed
        del loop
        gone("polyak-record")
        if (folder / "manifest.json").exists():
            assert edges(folder)[-1] in (0, updates), n
            Writer(folder, load_manifest(folder).tensors, per_level=1).close()
        if done:
            break
        gc.freeze()  # so that `gone` looks only at what the next round leaves
    assert n > 20


ENDING = ("polyak/record/recording.py", "polyak/record/queue.py", "polyak/record/appender.py")


@pytest.mark.slow
def test_an_interrupt_at_any_line_of_the_end_of_a_segment_ends_it_once(tmp_path) -> None:
    ended = 0
    for n in range(1, 400):
        loop = Loop(short(tmp_path / str(n), per_level=None)).run(3)
        recording = loop.recorder._recording
        before = recording.queue.open
        sys.settrace(interrupted(n, ENDING))
        done = False
        try:
            recording._end_segment(recording.state.timestamp)
            done = True
        except Interrupted:
            pass
        finally:
            sys.settrace(None)
        ended += recording.queue.open is not before
        loop.run(9).attached.detach()
        found = edges(tmp_path / str(n))
        assert found == sorted(set(found)), n
        assert found[-1] == 12, n
        if done:
            break
    assert 10 < n < 399  # it was interrupted in each line, and in the end not any more
    assert 1 < ended < n  # before the segment had ended, and after


# Damage.


def flipped(content: bytes, at: int, bit: int = 0) -> bytes:
    return content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :]


@pytest.mark.slow
def test_verify_finds_a_flipped_bit_anywhere(tmp_path) -> None:
    with Writer(tmp_path, TENSORS, per_level=1) as writer:
        for n in range(3):
            append(writer, n)
        writer.pin("state")
        for n in range(3, 6):
            append(writer, n)
    assert load_manifest(tmp_path).files > {segment.file for segment in Record(tmp_path).segments}
    Record(tmp_path).verify()
    for name in [*segment_files(tmp_path), "manifest.json"]:
        path = tmp_path / name
        whole = path.read_bytes()
        step = 1 if name == "manifest.json" else 7
        for at in range(0, len(whole), step):
            path.write_bytes(flipped(whole, at, at % 8))
            with pytest.raises(RecordError):
                Record(tmp_path).verify()
        path.write_bytes(whole)
    Record(tmp_path).verify()


class LosesARank(OneProcess):
    """Runs what rank 0 runs, then fails as if another rank had been killed before it heard of the result."""

    after: int = 10**6

    def on_rank_0(self, act, doing=""):
        result = act()
        object.__setattr__(self, "after", self.after - 1)
        if self.after < 0:
            raise RuntimeError("connection closed by peer")
        return result


@pytest.mark.slow
@pytest.mark.parametrize("after", range(6))
@pytest.mark.parametrize("do", ["append", "pin", "rewind"])
def test_an_error_after_a_new_manifest_is_on_disk_deletes_nothing_that_it_names(tmp_path, do, after) -> None:
    ranks = LosesARank()
    with Writer(tmp_path / "record", TENSORS, per_level=1, ranks=ranks) as writer:
        for n in range(3):
            append(writer, n)
        earlier = writer.state_dict()
        writer.pin("earlier")
        for n in range(3, 6):
            append(writer, n)
        acts = {
            "append": lambda: append(writer, 6),
            "pin": lambda: writer.pin("now"),
            "rewind": lambda: writer.rewind(earlier),
        }
        object.__setattr__(ranks, "after", after)
        with suppress(RuntimeError):
            acts[do]()
        Record(tmp_path / "record").verify()
        object.__setattr__(ranks, "after", 10**6)
        acts[do]()  # made again, whether or not it had been done
        Record(tmp_path / "record").verify()
        written = writer.segments
    with Writer(tmp_path / "other", TENSORS, per_level=1) as writer:
        for n in range(3 if do == "rewind" else 7 if do == "append" else 6):
            append(writer, n)
        assert written == writer.segments


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_damaged_file_is_merged_into_no_other(tmp_path, which) -> None:
    folder = record(tmp_path / "record", 5, per_level=1)
    names = segment_files(folder)
    assert len(names) == 3
    path = folder / names[which]
    path.write_bytes(flipped(whole := path.read_bytes(), len(whole) - 1))
    refused = 0
    with Writer(folder, TENSORS, per_level=1) as writer:
        for n in range(5, 12):
            try:
                append(writer, n)
            except RecordError as error:
                refused += path.name in str(error)
                damaged = path.read_bytes()
                path.write_bytes(whole)  # restored from a copy
                append(writer, n)
                assert damaged != whole
    assert refused == 1
    assert content(folder) == content(record(tmp_path / "whole", 12, per_level=1))


@pytest.mark.parametrize("read", ["average", "error", "export", "open"])
def test_nothing_is_read_from_a_damaged_file(tmp_path, read) -> None:
    folder = record(tmp_path / "record", 4, per_level=None)
    path = folder / segment_files(folder)[1]
    path.write_bytes(flipped(whole := path.read_bytes(), len(whole) - 9))
    found = Record(folder)

    def opened() -> None:
        with found.open(found.segments[1]) as file:
            file.read("layer.bias")

    reads = {
        "average": lambda: found.average(Uniform()),
        "error": lambda: found.error(HalfLife("3ba", unbiased=True)),  # Uniform is exact, without reading
        "export": lambda: found.export(Uniform(), tmp_path / "x.safetensors"),
        "open": opened,
    }
    with pytest.raises(RecordError, match=rf"{path.name} must have the SHA-256 in the manifest"):
        reads[read]()
    assert not (tmp_path / "x.safetensors").exists()


def test_a_file_is_verified_once_for_all_averages(tmp_path, monkeypatch) -> None:
    found = Record(record(tmp_path, 4, per_level=None))
    found.average(Uniform())
    monkeypatch.setattr("polyak.record.files._check_hash", lambda *_: pytest.fail("it was verified before"))
    found.average(Uniform())
    found.error(HalfLife("6ba", unbiased=True))


def test_a_manifest_of_an_older_version_is_read_and_gets_a_hash(tmp_path) -> None:
    record(tmp_path, 3)
    path = tmp_path / "manifest.json"
    plain = json.loads(path.read_text())
    assert len(plain.pop("sha256")) == 64
    path.write_text(json.dumps(plain, indent=1, ensure_ascii=False) + "\n")
    assert edges(tmp_path) == [0, 2, 4, 6]
    with Writer(tmp_path, TENSORS) as writer:
        append(writer, 3)
    assert "sha256" in json.loads(path.read_text())
    edited = path.read_text().replace('"per_level": 4', '"per_level": 5')
    with pytest.raises(RecordError, match=r"SHA-256 that it ends with.*edited on purpose, remove"):
        Manifest.from_json(edited)


# Ranges.


@pytest.mark.parametrize(
    ("dtype", "value", "of"),
    [
        (torch.float16, 1e39, torch.float64),
        (torch.bfloat16, 3.4e38, torch.float32),
        (torch.float32, 1e39, torch.float64),
    ],
)
def test_a_value_above_the_range_of_a_records_dtype_is_refused_by_name(tmp_path, dtype, value, of) -> None:
    tensors = {"w": TensorInfo(dtype, (2,), averaged=True)}
    with Writer(tmp_path, tensors) as writer, pytest.raises(RecordError, match=r"at most .*in 'w'\): use a dtype"):
        writer.append({"w": torch.tensor([1.0, value], dtype=of)}, *record_edges())
    assert edges(tmp_path) == [0]


def record_edges():
    from tests.record.test_record import edge

    return edge(0), edge(1)


def test_an_average_above_the_range_of_the_dtype_asked_for_is_refused_by_name(tmp_path) -> None:
    with Writer(tmp_path, {"w": TensorInfo(torch.float32, (2,), averaged=True)}) as writer:
        writer.append({"w": torch.tensor([1.0, 7e4])}, *record_edges())
    with pytest.raises(RecordError, match=r"at most 65504 .*got 70000 in 'w'"):
        Record(tmp_path).average(Uniform(), dtype=torch.float16)
    with pytest.raises(RecordError, match=r"at most 65504"):
        Record(tmp_path).export(Uniform(), tmp_path / "x", dtype=torch.float16)
    assert Record(tmp_path).average(Uniform(), dtype=torch.bfloat16)["w"].isfinite().all()


@pytest.mark.parametrize(
    ("dtype", "value", "of"),
    [
        (torch.float16, 7e4, torch.float32),
        (torch.float16, 1e30, torch.bfloat16),
        (torch.bfloat16, 3.4e38, torch.float32),
        (torch.float32, 1e39, torch.float64),
    ],
)
def test_an_average_that_would_begin_above_its_dtypes_range_is_refused_by_name(dtype, value, of) -> None:
    model = nn.Linear(2, 1, dtype=of)
    nn.init.constant_(model.weight, value)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    attached = attach(EMA("2ba", dtype=dtype), model, optimizer)
    with pytest.raises(DtypeError, match=r"averaged in torch.*in 'weight'\): use a dtype"):
        model.weight.grad = torch.zeros_like(model.weight)
        optimizer.step()
        attached.algorithm.ema_model  # noqa: B018


def test_a_dtype_that_no_record_can_keep_is_refused_by_name(tmp_path) -> None:
    with pytest.raises(RecordError, match="cannot keep 'w' as torch.complex128"):
        Writer(tmp_path, {"w": TensorInfo(torch.complex128, (2,), averaged=True)})


# Runs that begin a new record.


class Kill(Callback):
    def batch_end(self, state, logger):
        raise KeyboardInterrupt


def autoresumed(folder: Path, *, duration: str = "10ba", callbacks=(), every: str = "5ba", **options) -> Trainer:
    saver = CheckpointSaver(folder / "checkpoints", every)
    recorder = Recorder(folder / "record", interval="2ba", **options)
    return trainer(duration=duration, algorithms=recorder, callbacks=[saver, *callbacks], autoresume=True)


def stop_after(batches: int) -> Callback:
    class Stop(Callback):
        def batch_end(self, state, logger):
            if state.timestamp.batch.value == batches:
                raise KeyboardInterrupt

    return Stop()


def test_a_run_stopped_before_its_first_checkpoint_begins_a_new_record_and_keeps_the_old_one(tmp_path) -> None:
    folder = tmp_path / "record"
    for life in range(2):
        with pytest.raises(KeyboardInterrupt), warnings.catch_warnings():
            warnings.simplefilter("ignore", PlanWarning)
            autoresumed(tmp_path, callbacks=[stop_after(3 + life)]).fit()
    with pytest.warns(PlanWarning, match=r"left no checkpoint.*is now in .*backup-2"):
        autoresumed(tmp_path).fit()
    assert edges(folder)[-1] == 10
    assert [edges(folder / f"backup-{n}")[-1] for n in (1, 2)] == [3, 4]
    autoresumed(tmp_path, duration="14ba").fit()
    assert edges(folder)[-1] == 14


def test_a_record_without_a_segment_needs_no_backup(tmp_path) -> None:
    with pytest.raises(KeyboardInterrupt):
        autoresumed(tmp_path, callbacks=[Kill()], every="5ba").fit()
    for path in segment_files(tmp_path / "record"):
        (tmp_path / "record" / path).unlink()
    autoresumed(tmp_path, per_level=2).fit()
    assert not list((tmp_path / "record").glob("backup-*"))


def test_a_new_record_also_backs_up_one_that_cannot_be_read_or_is_of_another_model(tmp_path) -> None:
    record(tmp_path / "record", 3)
    (tmp_path / "record" / "manifest.json").write_text("{")
    (tmp_path / "record" / "notes.txt").write_text("mine")
    with pytest.warns(PlanWarning, match="backup-1"):
        autoresumed(tmp_path).fit()
    assert edges(tmp_path / "record")[-1] == 10
    assert len(segment_files(tmp_path / "record" / "backup-1")) == 3
    assert (tmp_path / "record" / "notes.txt").read_text() == "mine"


def test_a_backup_that_was_cut_off_is_completed(tmp_path) -> None:
    folder = record(tmp_path / "record", 3)
    (folder / "backup-1").mkdir()
    (folder / segment_files(folder)[0]).rename(folder / "backup-1" / segment_files(folder)[0])
    with pytest.warns(PlanWarning, match="backup-1"):
        autoresumed(tmp_path).fit()
    assert edges(folder / "backup-1") == [0, 2, 4, 6]


def test_a_record_that_another_run_is_writing_is_not_moved(tmp_path) -> None:
    with Writer(tmp_path / "record", TENSORS) as writer:
        append(writer, 0)
        before = content(tmp_path / "record")
        with pytest.raises(RecordError, match="is writing"):
            autoresumed(tmp_path).fit()
        assert content(tmp_path / "record") == before


def test_without_autoresume_an_existing_record_is_refused(tmp_path) -> None:
    trainer(algorithms=Recorder(tmp_path, "2ba")).fit()
    before = content(tmp_path)
    with pytest.raises(RecordError, match="has a record of 10 updates already"):
        trainer(algorithms=Recorder(tmp_path, "2ba")).fit()
    assert content(tmp_path) == before

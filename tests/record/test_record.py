import errno
import json
import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import record_crasher
import torch
from forking import fork, forks, in_a_fork
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import polyak.record.files
import polyak.storage.lock
from polyak.errors import MismatchError, RecordError
from polyak.profiles import Uniform
from polyak.record import Edge, Record, Writer, load_manifest
from polyak.record.writer import due
from polyak.storage.safetensors import TensorInfo, write_tensors
from polyak.time import Time, Timestamp


def edge(updates: int) -> Edge:
    now = Timestamp(epoch_length=10)
    return Edge(updates, now.to_next_batch(steps=updates, samples=8 * updates, tokens=0, seconds=0.25 * updates))


def weights(n: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(n)
    return {
        "layer.weight": torch.randn(3, 5, generator=generator),
        "layer.bias": torch.randn(5, generator=generator, dtype=torch.float64),
        "layer.steps": torch.tensor(n),
        "layer.mask": torch.tensor([n % 2 == 0, True, False]),
    }


TENSORS = {name: TensorInfo.of(tensor, averaged=tensor.is_floating_point()) for name, tensor in weights(0).items()}


def append(writer: Writer, n: int, *, updates: int = 2) -> None:
    writer.append(weights(n), edge(updates * n), edge(updates * (n + 1)))


def record(folder: Path, n: int, **options) -> Path:
    with Writer(folder, TENSORS, **options) as writer:
        for i in range(n):
            append(writer, i)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}


def segment_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


# The files.


def test_safetensors_own_loader_reads_what_is_written(tmp_path) -> None:
    tensors = {
        "f64": torch.randn(3, dtype=torch.float64),
        "f16": torch.randn(7).half(),
        "bf16": torch.randn(3).bfloat16(),
        "bool": torch.tensor([True, False, True]),
        "u8": torch.arange(5, dtype=torch.uint8),
        "i64": torch.tensor(-(2**40)),
        "complex": torch.randn(2, dtype=torch.complex64),
        "empty": torch.empty(0, 4),
        'a name with "quotes", é and /': torch.ones(1),
        "transposed": torch.randn(4, 3).T,
    }
    infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape), averaged=False) for name, tensor in tensors.items()}
    path = tmp_path / "all.safetensors"
    size_bytes, _ = write_tensors(path, infos, tensors.__getitem__, {"é": "1"})
    assert path.stat().st_size == size_bytes
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_every_tensor_in_a_file_is_aligned(tmp_path) -> None:
    path = tmp_path / record(tmp_path, 1).joinpath(segment_files(tmp_path)[0])
    raw = path.read_bytes()
    header_bytes = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + header_bytes])
    assert header_bytes % 8 == 0
    assert all(header[name]["data_offsets"][0] % TENSORS[name].dtype.itemsize == 0 for name in TENSORS)


def test_the_same_tensors_give_the_same_bytes_whatever_their_order(tmp_path) -> None:
    a = write_tensors(tmp_path / "a", TENSORS, weights(1).__getitem__, {})
    b = write_tensors(tmp_path / "b", dict(reversed(TENSORS.items())), weights(1).__getitem__, {})
    assert a == b


# Appending and merging.


def test_a_record_returns_what_was_appended(tmp_path) -> None:
    record(tmp_path, 3, max_duration=Time.from_input("2ep"), aliases={"tied": "layer.weight"})
    read = Record(tmp_path)
    assert read.tensors == TENSORS
    assert read.aliases == {"tied": "layer.weight"}
    assert read.max_duration == Time.from_input("2ep")
    assert [(s.start, s.end, s.level, s.num_updates) for s in read.segments] == [
        (edge(2 * i), edge(2 * i + 2), 0, 2) for i in range(3)
    ]
    with read.open(read.segments[1]) as file:
        for name, tensor in weights(1).items():
            assert torch.equal(file.read(name), tensor.to(TENSORS[name].dtype))
    read.verify()


@settings(deadline=None, max_examples=15)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=25), per_level=st.integers(1, 3))
def test_merged_segments_are_the_exact_means_weighted_by_updates(tmp_path_factory, lengths, per_level) -> None:
    folder = tmp_path_factory.mktemp("record")
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(sum(lengths), 4, generator=generator, dtype=torch.float64)
    infos = {"w": TensorInfo(torch.float32, (4,), averaged=True), "n": TensorInfo(torch.int64, (), averaged=False)}
    with Writer(folder, infos, per_level=per_level) as writer:
        at = 0
        for length in lengths:
            end = at + length
            writer.append({"w": steps[at:end].mean(0), "n": torch.tensor(end)}, edge(at), edge(end))
            at = end
    read = Record(folder)
    levels = [segment.level for segment in read.segments]
    assert all(levels.count(level) <= per_level + 1 for level in levels)
    assert read.segments[-1].end == edge(sum(lengths))
    for segment in read.segments:
        with read.open(segment) as file:
            mean = steps[segment.start.updates : segment.end.updates].mean(0)
            torch.testing.assert_close(file.read("w").double(), mean, rtol=0, atol=2e-6)
            assert file.read("n") == segment.end.updates


def test_a_merge_rounds_once(tmp_path) -> None:
    infos = {"w": TensorInfo(torch.float32, (1000,), averaged=True)}
    steps = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    with Writer(tmp_path, infos, per_level=1) as writer:
        for mean, start, end in zip(steps, (0, 1, 3, 4), (1, 3, 4, 5), strict=True):
            writer.append({"w": mean}, edge(start), edge(end))
    read = Record(tmp_path)
    with read.open(read.segments[0]) as file:
        assert torch.equal(file.read("w"), ((steps[0].double() + 2 * steps[1].double()) / 3).float())


@pytest.mark.parametrize(
    ("per_level", "appended", "most", "at_the_end"),
    [
        (2, 512, 22, 17),
        (4, 128, 23, 21),
        (4, 512, 33, 29),
        (4, 1024, 38, 33),
        (4, 16_384, 58, 49),
        (8, 512, 52, 49),
        (4, 131_072, 73, 61),
    ],
)
def test_the_number_of_files_is_that_of_the_table(per_level, appended, most, at_the_end) -> None:
    levels: list[int] = []
    largest = 0
    for _ in range(appended):
        levels, level = [*levels, 0], 0
        while (i := due(levels, level, per_level)) is not None:
            levels = [*levels[:i], level + 1, *levels[i + 2 :]]
            level += 1
        largest = max(largest, len(levels))
    assert (largest, len(levels)) == (most, at_the_end)


def test_a_folder_holds_no_more_files_than_the_record_has_segments(tmp_path) -> None:
    with Writer(tmp_path, TENSORS, per_level=2) as writer:
        for n in range(40):
            append(writer, n)
            assert segment_files(tmp_path) == sorted(segment.file for segment in writer.segments)
    assert {path.name for path in tmp_path.iterdir()} == {"manifest.json", "lock", *segment_files(tmp_path)}


def test_without_per_level_nothing_merges(tmp_path) -> None:
    assert len(Record(record(tmp_path, 20, per_level=None)).segments) == 20


def test_memory_is_bounded_by_the_largest_tensor(tmp_path, monkeypatch) -> None:
    """Counted in tensors of a record that are alive at a time, while a merge and an average are made."""
    infos = {f"layer.{i}": TensorInfo(torch.float32, (100,), averaged=True) for i in range(20)}
    alive = most = 0

    class Counted:
        def __init__(self) -> None:
            nonlocal alive, most
            alive += 1
            most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    original = polyak.record.files.SegmentFile.read

    def read(self, name, box=None, before=None):
        tensor = original(self, name, box, before).clone()
        tensor.counted = Counted()
        return tensor

    monkeypatch.setattr(polyak.record.files.SegmentFile, "read", read)
    with Writer(tmp_path, infos, per_level=1) as writer:
        for n in range(4):
            writer.append({name: torch.full((100,), float(n)) for name in infos}, edge(n), edge(n + 1))
        assert len(writer.segments) == 3
    assert (alive, most) == (0, 1)
    most = 0
    Record(tmp_path).export(Uniform(), tmp_path / "average")
    assert (alive, most) == (0, 3)  # one of each segment, for the error


@pytest.mark.parametrize(
    ("start", "end", "message"),
    [
        (edge(1), edge(4), r"must start where .* ends, after 2 updates \(got 1\): rewind"),
        (edge(4), edge(6), r"must start where .* ends, after 2 updates \(got 4\): rewind"),
        (edge(2), edge(2), "must end after it starts"),
        (edge(2), Edge(4, Timestamp()), "must not go back in time"),
    ],
)
def test_a_segment_that_leaves_a_gap_is_refused_and_leaves_nothing(tmp_path, start, end, message) -> None:
    record(tmp_path, 1)
    before = content(tmp_path)
    with Writer(tmp_path, TENSORS) as writer, pytest.raises(RecordError, match=message):
        writer.append(weights(1), start, end)
    assert content(tmp_path) == before


def test_a_segment_starts_where_the_last_ended_even_if_the_loop_calls_it_the_next_epoch(tmp_path) -> None:
    ended = Edge(1, Timestamp(epoch_length=1).to_next_batch())
    with Writer(tmp_path, TENSORS) as writer:
        writer.append(weights(0), edge(0), ended)
        begun = Edge(1, ended.timestamp.to_next_epoch())
        writer.append(weights(1), begun, Edge(2, begun.timestamp.to_next_batch()))
        assert writer.segments[1].start == ended


def test_other_tensors_are_refused_by_name(tmp_path) -> None:
    others = weights(0) | {"new": torch.ones(1), "layer.bias": torch.ones(2)}
    del others["layer.mask"]
    with Writer(tmp_path, TENSORS) as writer, pytest.raises(MismatchError) as caught:
        writer.append(others, edge(0), edge(1))
    assert (caught.value.missing, caught.value.unexpected) == (["layer.mask"], ["new"])
    assert caught.value.misshaped == {"layer.bias": ((5,), (2,))}
    with pytest.raises(MismatchError, match=r"missing: layer.mask"):
        Writer(tmp_path, {name: info for name, info in TENSORS.items() if name != "layer.mask"})
    with pytest.raises(RecordError, match=r"per_level must be that of the record in .*, 4 \(got 2\)"):
        Writer(tmp_path, TENSORS, per_level=2)
    half = {
        name: TensorInfo.of(tensor, averaged=TENSORS[name].averaged, dtype=torch.float16)
        for name, tensor in weights(0).items()
    }
    with pytest.raises(RecordError, match="use the same dtype"):
        Writer(tmp_path, half)


# Rewinding and pins.


def test_a_rewound_record_continues_as_if_it_had_never_been_ahead(tmp_path) -> None:
    never_stopped = record(tmp_path / "a", 30, per_level=2)
    resumed = record(tmp_path / "b", 11, per_level=2)
    with Writer(resumed, TENSORS, per_level=2) as writer:
        state = writer.state_dict()
        writer.pin("checkpoint")
        for n in range(11, 26):
            append(writer, n)
    torch.save(state, tmp_path / "checkpoint.pt")
    with Writer(resumed, TENSORS, per_level=2) as writer:
        writer.rewind(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
        assert len(segment_files(resumed)) == len(writer.segments)
        writer.unpin("checkpoint")
        for n in range(11, 30):
            append(writer, n)
    assert content(resumed) == content(never_stopped)


def test_what_a_pin_refers_to_stays_until_it_is_let_go(tmp_path) -> None:
    with Writer(tmp_path, TENSORS, per_level=1) as writer:
        for n in range(5):
            append(writer, n)
        pinned, state = segment_files(tmp_path), writer.state_dict()
        writer.pin("checkpoint")
        for n in range(5, 20):
            append(writer, n)
        assert set(pinned) < set(segment_files(tmp_path))
    with Writer(tmp_path, TENSORS, per_level=1) as writer:  # another one, later
        assert set(pinned) < set(segment_files(tmp_path))
        writer.unpin("checkpoint")
        assert segment_files(tmp_path) == sorted(segment.file for segment in writer.segments)
        with pytest.raises(RecordError, match=r"pinned to \[\]: resume from one of these, or record to another folder"):
            writer.rewind(state)


def test_a_pin_goes_with_its_checkpoint(tmp_path) -> None:
    checkpoint = tmp_path / "checkpoints" / "ep1.pt"
    checkpoint.parent.mkdir()
    checkpoint.touch()
    with Writer(tmp_path / "record", TENSORS) as writer:
        append(writer, 0)
        writer.pin("ep1", checkpoint)
        writer.pin("by hand")
        writer.unpin_gone()
        assert writer.pins["ep1"].path == "../checkpoints/ep1.pt"
        checkpoint.unlink()
        writer.unpin_gone()
        assert set(writer.pins) == {"by hand"}
    assert set(load_manifest(tmp_path / "record").pins) == {"by hand"}


# What can go wrong.


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
@forks
def test_a_writer_killed_at_any_moment_leaves_the_record_before_or_after(tmp_path, dtype) -> None:
    process = fork(lambda: record_crasher.main(tmp_path, 30, dtype))
    process.join()
    assert process.exitcode == 0


# Appending and merging once call what FullDisk refuses this often until the new manifest is in its place: open, fsync
# and replace for each of three files, and fsync for the folder before the last. After that, a refusal comes too late.
COMMITTED = 11


class FullDisk:
    """Refuses the n-th call of any of the functions by which a writer changes the disk."""

    def __init__(self, monkeypatch, n: int) -> None:
        self.left = n
        for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "open")):
            monkeypatch.setattr(owner, name, self.refusing(getattr(owner, name), name))

    def refusing(self, function, name):
        def call(*args, **kwargs):
            if name == "open" and (len(args) < 2 or "w" not in args[1]):
                return function(*args, **kwargs)
            self.left -= 1
            if self.left == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*args, **kwargs)

        return call


@pytest.mark.parametrize("n", range(1, 20))
def test_a_full_disk_leaves_the_record_before_or_after_and_the_append_can_be_repeated(tmp_path, monkeypatch, n) -> None:
    expected = content(record(tmp_path / "expected", 5, per_level=1))
    folder = record(tmp_path / "record", 4, per_level=1)
    before = content(folder)
    with Writer(folder, TENSORS, per_level=1) as writer:
        with monkeypatch.context() as patches, pytest.raises(RecordError) if n < COMMITTED else nullcontext() as caught:
            FullDisk(patches, n)
            append(writer, 4)
        if caught is not None:
            assert "No space left" in str(caught.value)
            assert "make room on the disk and continue" in str(caught.value)
            assert content(folder) == before
            append(writer, 4)
    assert content(folder) == expected


def test_a_file_cut_short_by_a_full_disk_is_removed(tmp_path) -> None:
    def full(name: str) -> Tensor:
        if name == "layer.bias":
            raise OSError(errno.ENOSPC, "No space left on device")
        return weights(0)[name]

    with pytest.raises(OSError, match="No space"):
        write_tensors(tmp_path / "file", dict(reversed(TENSORS.items())), full, {})
    assert not list(tmp_path.iterdir())


def test_a_really_full_device_is_reported(tmp_path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with Writer(tmp_path, TENSORS) as writer:
        (tmp_path / "stretch.tmp").symlink_to("/dev/full")
        with pytest.raises(RecordError, match=r"No space left on device.*make room on the disk and continue"):
            append(writer, 0)
        append(writer, 0)
    Record(tmp_path).verify()


@forks
def test_a_second_writer_is_refused_and_told_who_is_writing(tmp_path) -> None:
    with Writer(tmp_path, TENSORS):
        with pytest.raises(RecordError, match=f"process {os.getpid()} is writing"):
            Writer(tmp_path, TENSORS)
        assert f"process {os.getpid()} is writing" in in_a_fork(lambda: Writer(tmp_path, TENSORS))
        assert Record(tmp_path).segments == ()  # reading needs no lock
    Writer(tmp_path, TENSORS).close()


def test_a_folder_that_cannot_be_written_is_reported_and_can_be_read(tmp_path, monkeypatch) -> None:
    record(tmp_path, 2)

    def read_only(path, flags, *_args, **_kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    with monkeypatch.context() as patches:
        patches.setattr(polyak.storage.lock.os, "open", read_only)
        with pytest.raises(RecordError, match=r"Read-only file system.*record to a disk that can be written"):
            Writer(tmp_path, TENSORS)
    (tmp_path / "lock").unlink()
    if os.geteuid():
        tmp_path.chmod(0o500)
        with pytest.raises(RecordError, match=r"Permission denied.*make the folder writable"):
            Writer(tmp_path, TENSORS)
    before = sorted(tmp_path.iterdir())
    assert Record(tmp_path).average(Uniform()).keys() == TENSORS.keys()
    assert sorted(tmp_path.iterdir()) == before
    tmp_path.chmod(0o700)


def test_a_file_in_place_of_the_folder_is_reported(tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RecordError, match=r"opening .* to record failed"):
        Writer(tmp_path / "file", TENSORS)


def test_files_of_a_killed_writer_are_deleted_and_other_files_are_not(tmp_path) -> None:
    record(tmp_path, 2)
    before = content(tmp_path)
    orphans = [f"{2:010d}-{4:010d}-{'0' * 16}.safetensors", "stretch.tmp", "manifest.json.tmp"]
    for name in [*orphans, "model.safetensors", "notes.tmp"]:
        (tmp_path / name).touch()
    Writer(tmp_path, TENSORS).close()
    assert content(tmp_path) == before | {"model.safetensors": b"", "notes.tmp": b""}


def test_segments_without_a_manifest_are_not_deleted(tmp_path) -> None:
    record(tmp_path, 2)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(RecordError, match=r"must have a manifest.json for its 2 segments"):
        Writer(tmp_path, TENSORS)
    assert len(segment_files(tmp_path)) == 2
    with pytest.raises(RecordError, match="there is none in"):
        Record(tmp_path)


@pytest.mark.parametrize("keep_bytes", [0, 7, 100, -1])
def test_a_truncated_file_is_reported(tmp_path, keep_bytes) -> None:
    record(tmp_path, 2)
    path = tmp_path / segment_files(tmp_path)[1]
    path.write_bytes(path.read_bytes()[:keep_bytes])
    with pytest.raises(RecordError, match=r"must have \d+ bytes \(got \d+\): it is damaged, restore it"):
        Record(tmp_path).average(Uniform())


def test_a_missing_file_is_reported(tmp_path) -> None:
    record(tmp_path, 2)
    (tmp_path / segment_files(tmp_path)[1]).unlink()
    with pytest.raises(RecordError, match=r"open the record again; otherwise restore"):
        Record(tmp_path).average(Uniform())


def test_a_foreign_file_of_the_same_size_is_reported(tmp_path) -> None:
    record(tmp_path, 2)
    path = tmp_path / segment_files(tmp_path)[1]
    original = path.read_bytes()
    path.write_bytes(original.replace(b"layer.weight", b"other.weight"))
    with pytest.raises(RecordError, match=r"\['layer.weight', 'other.weight'\]\): restore it"):
        Record(tmp_path).average(Uniform())
    path.write_bytes(b"x" * len(original))
    with pytest.raises(RecordError, match="must be a safetensors file"):
        Record(tmp_path).average(Uniform())
    path.write_bytes(original[:-1] + b"x")
    with pytest.raises(RecordError, match="SHA-256"):
        Record(tmp_path).verify()


def plain(tmp_path: Path) -> dict:
    return json.loads((record(tmp_path, 3) / "manifest.json").read_text())


def put(manifest: dict, path: str, value: object) -> None:
    *parents, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    for part in parents:
        manifest = manifest[part]
    manifest[last] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *[("stretches/1/file", name) for name in ("../x.safetensors", "/etc/passwd", "a/b", "..", "", "x", None, 3)],
        *[("pins", {"a": {"files": [name], "path": None}}) for name in ("../x.safetensors", "/etc/passwd", "lock", 1)],
        ("pins", {"a": {"files": [], "path": "/tmp/x"}}),
        ("pins", {"a": {"files": "x", "path": None}}),
        ("pins", []),
        ("version", 3),
        ("version", None),
        ("format", "other"),
        ("per_level", 0),
        ("per_level", True),
        ("max_duration", "10 fortnights"),
        ("max_duration", "0.5dur"),
        ("aliases", {"layer.bias": "layer.weight"}),
        ("aliases", {"tied": "nowhere"}),
        ("more", 1),
        ("tensors/layer.weight/dtype", "object"),
        ("tensors/layer.weight/shape", [3, -5]),
        ("tensors/layer.weight/shape", 3),
        ("tensors/layer.weight/averaged", 1),
        ("tensors/layer.mask/averaged", True),
        ("stretches", {}),
        ("stretches/1", "x"),
        ("stretches/1/level", -1),
        ("stretches/1/level", 1),
        ("stretches/1/size_bytes", 1.5),
        ("stretches/1/size_bytes", True),
        ("stretches/1/sha256", "0" * 63),
        ("stretches/1/sha256", "../" * 21 + "x"),
        ("stretches/1/start/updates", 1),
        ("stretches/1/end/updates", 5),
        ("stretches/1/end/batch", "4"),
        ("stretches/1/end/batch", float("nan")),
        ("stretches/1/end/batch", 1),
        ("stretches/1/end/epoch_length", 0.5),
        ("stretches/1/end/more", 1),
        ("stretches/0/start/updates", 1),
    ],
)
def test_a_manifest_with_anything_wrong_in_it_is_refused(tmp_path, path, value) -> None:
    manifest = plain(tmp_path)
    put(manifest, path, value)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RecordError, match="cannot be read as the manifest of a record"):
        Record(tmp_path)
    with pytest.raises(RecordError, match="cannot be read as the manifest of a record"):
        Writer(tmp_path, TENSORS)


def test_a_manifest_with_a_gap_is_refused(tmp_path) -> None:
    manifest = plain(tmp_path)
    del manifest["stretches"][1]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RecordError, match=r"must start where .* ends"):
        Record(tmp_path)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b"null", b'{"format": "polyak-record"}'])
def test_a_file_that_is_no_manifest_is_refused(tmp_path, text) -> None:
    (tmp_path / "manifest.json").write_bytes(text)
    with pytest.raises(RecordError, match="cannot be read as the manifest of a record"):
        Record(tmp_path)


def test_a_manifest_holds_no_absolute_paths(tmp_path) -> None:
    with Writer(tmp_path, TENSORS) as writer:
        writer.pin("a", (tmp_path / "checkpoint.pt").resolve())
    assert str(tmp_path) not in (tmp_path / "manifest.json").read_text()

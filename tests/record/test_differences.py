"""A record in int8: differences between neighboring segments, in steps of a scale for each row."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from polyak import HalfLife, MismatchError, Record, Recorder, RecordError, Uniform, Window, attach, sweep
from polyak.cli import main
from polyak.compat.files import load
from polyak.errors import CheckpointError
from polyak.record import Edge, Segment, Writer, load_manifest, output
from polyak.record.differences import LONGEST
from polyak.storage.safetensors import TensorInfo
from polyak.sweeping.held import held
from polyak.time import Timestamp
from tests.record.test_recorder import Loop, segments

torch.set_num_threads(1)
I8, F16, F32 = torch.int8, torch.float16, torch.float32
EIGHTH = 1 / 8  # of the distance from the mean before: what may be lost of a mean


def edge(updates: int) -> Edge:
    return Edge(updates, Timestamp().to_next_batch(steps=updates))


def walk(steps: int, *shape: int, seed: int = 0, size: float = 1e-2, drift: float = 0.0) -> list[Tensor]:
    """Return the means of weights that move as in a random walk."""
    generator = torch.Generator().manual_seed(seed)
    begin, direction = torch.randn(2, *shape, generator=generator)
    moves = size * torch.randn(steps, *shape, generator=generator) + drift * direction
    return list(begin + moves.cumsum(0))


def written(folder: Path, means: list[Tensor], dtype: torch.dtype = I8, **options) -> Record:
    """Write a record of these means, each of one update."""
    with Writer(folder, {"w": TensorInfo(dtype, tuple(means[0].shape), averaged=True)}, **options) as writer:
        for n, mean in enumerate(means):
            writer.append({"w": mean}, edge(n), edge(n + 1))
    return Record(folder)


def read(record: Record, segment: Segment, name: str = "w") -> Tensor:
    with record.open(segment) as file:
        return file.read(name).clone()


def dtypes(record: Record, name: str = "w") -> list[torch.dtype]:
    found = []
    for segment in record.segments:
        with record.open(segment) as file:
            found.append(file.dtype(name))
    return found


def truth(means: list[Tensor], segment: Segment) -> Tensor:
    return torch.stack(means[segment.start.updates : segment.end.updates]).double().mean(0)


def errors(record: Record, means: list[Tensor]) -> list[float]:
    """Return the error of each segment, relative to the smallest distance between its mean and those next to it."""
    true = [truth(means, segment) for segment in record.segments]
    apart = [float((a - b).norm()) for a, b in pairwise(true)]
    nearest = [min(pair) for pair in zip([*apart[:1], *apart], [*apart, *apart[-1:]], strict=True)]
    lost = [float((read(record, one).double() - mean).norm()) for one, mean in zip(record.segments, true, strict=True)]
    return [a / b for a, b in zip(lost, nearest, strict=True)]


def size_bytes(record: Record) -> int:
    return sum(segment.size_bytes for segment in record.segments)


# What is kept.


def test_a_record_in_int8_is_smaller_and_as_accurate(tmp_path) -> None:
    means = walk(70, 40, 60)
    wide, narrow = written(tmp_path / "float32", means, F32), written(tmp_path / "int8", means)
    assert size_bytes(narrow) < size_bytes(wide) / 2
    assert dtypes(narrow).count(I8) > len(narrow.segments) / 2
    assert max(errors(narrow, means)) < EIGHTH
    true = torch.stack(means).double()
    for profile, exact in ((Uniform(), true.mean(0)), (Window("20ba"), true[-20:].mean(0))):
        average = narrow.average(profile)["w"]
        assert average.dtype == F32
        assert float((average.double() - exact).norm() / (exact - true[-1]).norm()) < 0.03
    narrow.verify()


@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 1000),
    size=st.sampled_from([1e-6, 1e-4, 1e-2, 1.0]),
    drift=st.sampled_from([0.0, 1e-3, 1.0]),
    shape=st.sampled_from([(7, 5), (3,), (1, 300), (4, 2, 3, 2), (64, 1), ()]),
    per_level=st.sampled_from([1, 2, 4, None]),
    count=st.integers(1, 24),
)
def test_no_segment_loses_more_than_it_may(tmp_path_factory, seed, size, drift, shape, per_level, count) -> None:
    folder = tmp_path_factory.mktemp("record")
    means = walk(count, *shape, seed=seed, size=size, drift=drift)
    record = written(folder, means, per_level=per_level)
    # The errors of the segments that one was merged from, and of a base that was written again, add up at most so far.
    scale = max(float((a - b).norm()) for a, b in pairwise([means[0], *means]))
    for segment in record.segments:
        lost = float((read(record, segment).double() - truth(means, segment)).norm())
        first = 2**-10 * float(means[0].norm()) if segment.start.updates == 0 or not scale else 0.0
        assert lost <= (1 + segment.level) * 2 * EIGHTH * scale + first + 1e-6 * float(means[0].norm())
    shutil.rmtree(folder)


def test_a_constant_tensor_is_exact(tmp_path) -> None:
    still = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    record = written(tmp_path, [still] * 5, per_level=None)
    assert dtypes(record) == [F32, *[I8] * 4]
    assert all(torch.equal(read(record, segment), still) for segment in record.segments)


def test_a_row_that_moves_much_takes_nothing_from_the_others(tmp_path) -> None:
    means = walk(6, 10, 50, size=1e-3)
    for n, mean in enumerate(means):
        mean[3] += 100.0 * n
    record = written(tmp_path, means, per_level=None)
    assert I8 in dtypes(record)
    for segment, mean in zip(record.segments[1:], means[1:], strict=True):
        assert float((read(record, segment) - mean)[:3].abs().max()) < 1e-3 / 16


def test_a_tensor_whose_differences_need_more_bits_is_kept_in_float32_by_itself(tmp_path) -> None:
    generator = torch.Generator().manual_seed(0)
    infos = {name: TensorInfo(I8, (1, 40_000), averaged=True) for name in ("even", "spiked", "huge")}
    with Writer(tmp_path, infos, per_level=None) as writer:
        even = torch.randn(1, 40_000, generator=generator)
        for n in range(3):
            even = even + torch.randn(1, 40_000, generator=generator)
            spiked = even.clone()
            spiked[0, 0] += 1000.0 * (n % 2)  # a step of the row is then larger than what the others move
            huge = even.clone()
            huge[0, 7] += 1e30 * n
            writer.append({"even": even, "spiked": spiked, "huge": huge}, edge(n), edge(n + 1))
    record = Record(tmp_path)
    assert dtypes(record, "even") == [F32, I8, I8]
    assert dtypes(record, "spiked") == [F32] * 3
    assert torch.equal(read(record, record.segments[-1], "spiked"), spiked)
    torch.testing.assert_close(read(record, record.segments[-1], "huge"), huge, rtol=1e-2, atol=1e28)


def test_nan_and_inf_are_kept_as_they_are(tmp_path) -> None:
    means = walk(5, 4)
    means[1], means[2] = means[1].clone().fill_(torch.nan), torch.tensor([1.0, torch.inf, -torch.inf, 2.0])
    record = written(tmp_path, means, per_level=None)
    assert dtypes(record) == [F32, F32, F32, F32, I8]
    for segment, mean in list(zip(record.segments, means, strict=True))[:4]:
        torch.testing.assert_close(read(record, segment), mean, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("value", [65536.0, -1e6, 1e38, 3e38])
def test_a_value_beyond_float16_is_kept(tmp_path, value) -> None:
    steps = [
        torch.tensor([1.0, 1.0]),
        torch.tensor([2.0, value]),
        torch.tensor([3.0, -value]),
        torch.tensor([3.0, 3.0]),
    ]
    record = written(tmp_path, steps, per_level=None)
    for segment, mean in zip(record.segments, steps, strict=True):
        torch.testing.assert_close(read(record, segment).float()[1], mean[1], rtol=1e-2, atol=abs(value) / 100)


class Mixed(nn.Module):
    """A model with a tensor of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(6, 5))
        self.narrow = nn.Parameter(torch.randn(4, 3, dtype=torch.bfloat16))
        self.wide = nn.Parameter(torch.randn(3, dtype=torch.float64))
        self.pair = nn.Parameter(torch.randn(2, dtype=torch.complex64))
        self.number = nn.Parameter(torch.tensor(0.5))
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.register_buffer("levels", torch.tensor([1, -1], dtype=torch.int8))  # int8, and no difference
        self.register_buffer("count", torch.tensor(0))

    def forward(self) -> Tensor:
        self.count += 1
        total = self.matrix.square().sum() + self.narrow.float().square().sum() + self.number.square()
        return total + self.wide.square().sum() + self.pair.abs().square().sum()


def test_tensors_of_every_kind_are_kept_each_in_its_way(tmp_path) -> None:
    torch.manual_seed(0)
    model = Mixed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    history = []
    with attach(Recorder(tmp_path, "2ba", dtype=I8), model, optimizer):
        for _ in range(40):
            optimizer.zero_grad()
            (model() + torch.randn(()) * model.matrix.sum()).backward()
            optimizer.step()
            history.append({name: t.detach().clone() for name, t in model.state_dict().items()})
    record = Record(tmp_path)
    kinds = {name: info.dtype for name, info in record.tensors.items()}
    assert kinds == {
        **dict.fromkeys(("matrix", "narrow", "number", "empty"), I8),
        **{"wide": torch.float64, "pair": torch.complex64, "levels": I8, "count": torch.int64},
    }
    assert {name for name in kinds if I8 in dtypes(record, name)} >= {"matrix", "narrow", "number"}
    average, raw = record.average(Uniform()), record.raw_weights()
    for name, last in history[-1].items():
        assert torch.equal(raw[name], last)
        if name in {"levels", "count"}:
            assert torch.equal(average[name], last)
        else:
            exact = torch.stack([weights[name].to(torch.complex128) for weights in history]).mean(0)
            close = {"rtol": 1e-12, "atol": 1e-12} if name == "wide" else {"rtol": 1e-2, "atol": 3e-3}
            torch.testing.assert_close(average[name].to(torch.complex128), exact, **close)
    model.load_state_dict(average)
    record.average_into(model, Uniform())
    assert torch.equal(model.matrix, average["matrix"])
    assert main(["inspect", str(tmp_path), "--verify"]) == 0


# How it is read.


def decoded(folder: Path) -> list[Tensor]:
    """Read the means as a program without polyak does."""
    entries = json.loads((folder / "manifest.json").read_text())["stretches"]
    found: list[Tensor] = []
    for entry in entries:
        file = load_file(folder / entry["file"])
        steps = file["w"]
        found.append(found[-1] + steps.float() * file["w:scale"] if steps.dtype == I8 else steps.float())
        assert ("before" in entry) == (steps.dtype == I8)
    return found


def test_the_files_can_be_read_by_any_reader_of_safetensors(tmp_path) -> None:
    record = written(tmp_path, walk(50, 8, 5), per_level=2)
    for mean, segment in zip(decoded(tmp_path), record.segments, strict=True):
        assert torch.equal(mean, read(record, segment).float())


def test_a_part_of_a_segment_has_the_bits_that_it_has_in_the_whole(tmp_path) -> None:
    record = written(tmp_path, walk(12, 9, 7), per_level=None)
    box = (slice(2, 5), slice(1, 7))
    for before, segment in pairwise(record.segments):
        with record.open(segment) as file, record.open(before) as other:
            assert torch.equal(file.read("w", box), file.read("w")[box])
            assert torch.equal(file.read("w", None, other.read("w")), file.read("w"))
            assert torch.equal(file.read("w", box, other.read("w", box)), file.read("w")[box])


def test_chains_of_differences_end(tmp_path) -> None:
    record = written(tmp_path, walk(2 * LONGEST + 4, 6), per_level=None)
    assert max(segment.num_differences for segment in record.segments) == LONGEST
    assert [i for i, segment in enumerate(record.segments) if segment.before is None] == [
        0,
        LONGEST + 1,
        2 * LONGEST + 2,
    ]


def test_every_way_to_read_a_record_gives_the_same_averages_as_of_one_in_float32(tmp_path, capsys) -> None:
    means = walk(60, 8, 5)
    wide, narrow = written(tmp_path / "float32", means, F32), written(tmp_path / "int8", means)
    profiles = [HalfLife("8ba", unbiased=True), HalfLife("20ba", unbiased=True), Uniform()]
    for profile, several in zip(profiles, narrow.averages(profiles), strict=True):
        one, exact = narrow.average(profile)["w"], wide.average(profile)["w"]
        assert torch.equal(several["w"], one)
        assert float((one - exact).norm() / (exact - means[-1]).norm()) < 0.02
        assert narrow.error(profile) == pytest.approx(wide.error(profile), rel=0.05)
        narrow.export(profile, tmp_path / "average.safetensors", overwrite=True)
        assert torch.equal(load_file(tmp_path / "average.safetensors")["w"], one)
    moment = narrow.moments[len(narrow.moments) // 2]
    early = [record.average(Uniform(), moment)["w"] for record in (narrow, wide)]
    torch.testing.assert_close(*early, rtol=0, atol=1e-3)
    results = sweep(narrow.folder, lambda state: float(state["w"].norm()), points=3, refine=0)
    assert len(list(results)) > 2
    assert main(["reconstruct", str(narrow.folder), "--half-life", "8ba", "-o", str(tmp_path / "one.safetensors")]) == 0
    capsys.readouterr()


def test_a_record_that_is_held_is_read_as_it_was_while_the_run_continues(tmp_path) -> None:
    means = walk(40, 6)
    infos = {"w": TensorInfo(I8, (6,), averaged=True)}
    with Writer(tmp_path, infos, per_level=1) as writer:
        for n in range(12):
            writer.append({"w": means[n]}, edge(n), edge(n + 1))
        record = Record(tmp_path)
        before = [read(record, segment) for segment in record.segments]
        with held(record) as kept:
            for n in range(12, 24):
                writer.append({"w": means[n]}, edge(n), edge(n + 1))
            assert not (tmp_path / record.segments[-1].file).exists()
            assert all(torch.equal(read(kept, s), mean) for s, mean in zip(kept.segments, before, strict=True))


def test_a_file_of_differences_is_refused_as_a_checkpoint(tmp_path, capsys) -> None:
    record = written(tmp_path, walk(4, 6), per_level=None)
    path = tmp_path / record.segments[-1].file
    with pytest.raises(CheckpointError, match="has differences from another file of a record"):
        load(path)
    assert main(["inspect", str(path)]) == 2
    assert "give the folder of the record" in capsys.readouterr().err
    load(tmp_path / record.segments[0].file)


# How it is written.


@pytest.mark.slow
@pytest.mark.parametrize("stop", [3, 21, 30])
def test_a_run_that_is_stopped_and_resumed_writes_the_same_record_bit_for_bit(tmp_path, stop) -> None:
    def loop(name: str) -> Loop:
        return Loop(Recorder(tmp_path / name, "2ba", per_level=2, dtype=I8))

    with (whole := loop("whole")).attached:
        whole.run(45)
    first = loop("record").run(stop)
    path = tmp_path / "state.pt"
    saved = [first.model.state_dict(), first.optimizer.state_dict(), first.attached.state_dict(path)]
    torch.save(saved, path)
    first.run(12).attached.detach()  # the record is ahead of the checkpoint: what that refers to was written again
    second = loop("record")
    model, optimizer, attached = torch.load(path, weights_only=True)
    second.model.load_state_dict(model)
    second.optimizer.load_state_dict(optimizer)
    second.attached.load_state_dict(attached)
    second.history = first.history[:stop]
    with second.attached:
        second.run(45 - stop)
    assert segments(tmp_path / "record") == segments(tmp_path / "whole")
    assert I8 in dtypes(Record(tmp_path / "record"), "0.weight")
    Record(tmp_path / "record").verify()


def test_a_resumed_recorder_that_is_given_no_dtype_continues_in_int8(tmp_path) -> None:
    loop = Loop(Recorder(tmp_path, "4ba", dtype=I8)).run(20)
    state = loop.attached.state_dict()
    loop.attached.detach()
    other = Loop(Recorder(tmp_path))
    other.attached.load_state_dict(state)
    other.run(9).attached.detach()
    assert Record(tmp_path).tensors["0.weight"].dtype == I8


def test_what_a_pin_keeps_can_be_read_after_all_of_it_was_merged(tmp_path) -> None:
    means = walk(36, 6)
    infos = {"w": TensorInfo(I8, (6,), averaged=True)}
    with Writer(tmp_path, infos, per_level=2) as writer:
        for n in range(20):
            writer.append({"w": means[n]}, edge(n), edge(n + 1))
        writer.pin("early")
        state = json.loads(json.dumps(writer.state_dict()))
        before = [read(Record(tmp_path), segment) for segment in writer.segments]
        for n in range(20, 36):
            writer.append({"w": means[n]}, edge(n), edge(n + 1))
        writer.rewind(state)
        record = Record(tmp_path)
        record.verify()
        assert all(torch.equal(read(record, s), mean) for s, mean in zip(record.segments, before, strict=True))


def test_the_newest_segment_may_be_written_again_by_a_merge(tmp_path) -> None:
    means = walk(9, 6)
    with Writer(tmp_path, {"w": TensorInfo(I8, (6,), averaged=True)}, per_level=1) as writer:
        for n in range(9):
            made = writer.append({"w": means[n]}, edge(n), edge(n + 1))
            assert made == writer.segments[-1]
            assert writer.append({"w": means[n]}, edge(n), edge(n + 1)) == made
            assert {path.name for path in tmp_path.glob("*.safetensors")} == {one.file for one in writer.segments}


@pytest.mark.parametrize("fails", [1, 2, 3])
def test_an_append_that_the_disk_refuses_halfway_leaves_the_record_and_can_be_made_again(
    tmp_path, monkeypatch, fails
) -> None:
    means = walk(8, 6)
    infos = {"w": TensorInfo(I8, (6,), averaged=True)}
    record = written(tmp_path / "whole", means, per_level=2)
    with Writer(tmp_path / "refused", infos, per_level=2) as writer:
        for n in range(7):
            writer.append({"w": means[n]}, edge(n), edge(n + 1))
        before = {path.name: path.read_bytes() for path in writer.folder.iterdir()}
        write, calls = output.write_tensors, iter(range(1, 4))  # the segment, a mean of two, and the base after it

        def refuse(*arguments):
            if next(calls) == fails:
                raise OSError(28, "No space left on device")
            return write(*arguments)

        monkeypatch.setattr(output, "write_tensors", refuse)
        with pytest.raises(RecordError, match="make room on the disk"):
            writer.append({"w": means[7]}, edge(7), edge(8))
        assert {path.name: path.read_bytes() for path in writer.folder.iterdir()} == before
        monkeypatch.undo()
        writer.append({"w": means[7]}, edge(7), edge(8))
    assert segments(writer.folder) == segments(record.folder)


def test_damage_in_a_file_is_found_when_what_differs_from_it_is_read_or_written(tmp_path) -> None:
    means = walk(8, 600)
    infos = {"w": TensorInfo(I8, (600,), averaged=True)}
    with Writer(tmp_path, infos, per_level=None) as writer:
        for n in range(4):
            writer.append({"w": means[n]}, edge(n), edge(n + 1))
        path = tmp_path / writer.segments[1].file
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(RecordError, match=path.name):
            read(Record(tmp_path), writer.segments[3])
        with pytest.raises(RecordError, match=path.name):
            writer.append({"w": means[4]}, edge(4), edge(5))
        path.write_bytes(good)
        writer.append({"w": means[4]}, edge(4), edge(5))
    assert max(errors(Record(tmp_path), means)) < EIGHTH


def test_a_missing_file_of_a_chain_is_named(tmp_path) -> None:
    record = written(tmp_path, walk(4, 6), per_level=None)
    (tmp_path / record.segments[0].file).unlink()
    with pytest.raises(RecordError, match=record.segments[0].file), record.open(record.segments[3]):
        pass


def test_the_mean_of_a_segment_stays_the_same_while_others_merge(tmp_path) -> None:
    means, seen = walk(40, 5, 4), dict[tuple[int, int], Tensor]()
    with Writer(tmp_path, {"w": TensorInfo(I8, (5, 4), averaged=True)}, per_level=2) as writer:
        for n in range(40):
            writer.append({"w": means[n]}, edge(n), edge(n + 1))
            record = Record(tmp_path)
            for segment in record.segments:
                mean = read(record, segment)
                assert torch.equal(seen.setdefault((segment.start.updates, segment.end.updates), mean), mean)


# The manifest.


def test_only_a_record_with_differences_is_of_the_version_that_earlier_polyaks_refuse(tmp_path) -> None:
    for dtype, version in ((F16, 2), (F32, 2), (I8, 3)):
        written(tmp_path / str(dtype), walk(4, 6), dtype)
        assert json.loads((tmp_path / str(dtype) / "manifest.json").read_text())["version"] == version


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entries: entries[0].update(before=entries[1]["file"]), "before must be the file of the segment before"),
        (lambda entries: entries[2].update(before=entries[0]["file"]), "before must be the file of the segment before"),
        (lambda entries: entries[2].update(before=None), "before must be the file of the segment before"),
        (lambda entries: entries[2].update(level=0, before=entries[1]["file"]), "on the same level"),
    ],
)
def test_a_manifest_whose_differences_lead_elsewhere_is_refused(tmp_path, change, message) -> None:
    written(tmp_path, walk(9, 6), per_level=2)
    path = tmp_path / "manifest.json"
    plain = json.loads(path.read_text())
    del plain["sha256"]
    change(plain["stretches"])
    path.write_text(json.dumps(plain))
    with pytest.raises(RecordError, match=message):
        load_manifest(tmp_path)


def test_differences_without_the_segment_before_are_refused(tmp_path) -> None:
    written(tmp_path, walk(4, 6), per_level=None)
    path = tmp_path / "manifest.json"
    plain = json.loads(path.read_text())
    del plain["sha256"], plain["stretches"][-1]["before"]
    path.write_text(json.dumps(plain))
    record = Record(tmp_path)
    with pytest.raises(RecordError, match="must hold the tensors of its manifest"), record.open(record.segments[-1]):
        pass


def test_a_tensor_with_the_name_of_scales_is_refused(tmp_path) -> None:
    infos = {name: TensorInfo(I8, (2,), averaged=True) for name in ("w", "w:scale")}
    with pytest.raises(RecordError, match="which must not be the name of a tensor"):
        Writer(tmp_path, infos)


def test_a_record_of_another_dtype_is_not_continued_in_int8(tmp_path) -> None:
    written(tmp_path, walk(4, 6), F16)
    with pytest.raises((RecordError, MismatchError), match="must be kept as in the record"):
        Writer(tmp_path, {"w": TensorInfo(I8, (6,), averaged=True)})

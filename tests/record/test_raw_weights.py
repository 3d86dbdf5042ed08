"""The raw weights that a record keeps where its run ends."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from polyak import EMA, Record, Recorder, RecordError, attach
from polyak.cli import main
from polyak.record import Edge, Writer, load_manifest
from polyak.storage.safetensors import TensorInfo
from polyak.time import Timestamp
from tests.record.test_recorder import Loop, segments, short, trainer

torch.set_num_threads(1)


def same(state, model: nn.Module) -> bool:
    held = model.state_dict()
    return held.keys() == state.keys() and all(
        torch.equal(value, state[name]) and value.dtype == state[name].dtype for name, value in held.items()
    )


def raw_file(folder: Path) -> str:
    raw = Record(folder).raw
    assert raw is not None
    return raw.file  # which has the hash of its content


@pytest.mark.parametrize("steps", [1, 10, 12])  # 12: the last segment ended before the run did
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_run_that_ends_leaves_its_raw_weights_bit_for_bit(tmp_path, steps, dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 4)).to(dtype)
    model[3].weight = model[2].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with attach(Recorder(tmp_path, "4ba"), model, optimizer):
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(8, 3, dtype=dtype)).square().mean().backward()
            optimizer.step()
    record = Record(tmp_path)
    record.verify()
    assert same(record.raw_weights(), model)
    assert record.raw is not None
    assert record.raw.start == record.raw.end == record.segments[-1].end


def test_a_record_without_raw_weights_says_why_it_has_none(tmp_path) -> None:
    loop = Loop(short(tmp_path))
    loop.run(9)
    loop.recorder._recording.queue.wait()
    with pytest.raises(RecordError, match="once its run has ended without an error.*the run has not ended so"):
        Record(tmp_path).raw_weights()
    with pytest.raises(ZeroDivisionError), loop.attached:
        raise ZeroDivisionError  # weights after an error may be those of half a step
    assert Record(tmp_path).segments[-1].end.updates == 9
    assert Record(tmp_path).raw is None


def test_a_record_of_the_first_version_is_read_and_continued_and_gets_raw_weights(tmp_path) -> None:
    loop = Loop(short(tmp_path))
    loop.run(9)
    state = loop.attached.state_dict()
    with pytest.raises(ZeroDivisionError), loop.attached:
        raise ZeroDivisionError
    path = tmp_path / "manifest.json"
    plain = json.loads(path.read_text())
    del plain["sha256"], plain["raw"]
    path.write_text(json.dumps({**plain, "version": 1}))
    assert Record(tmp_path).raw is None
    other = Loop(short(tmp_path))
    other.attached.load_state_dict(state)
    with other.attached:
        other.run(3)
    assert same(Record(tmp_path).raw_weights(), other.model)


def test_raw_weights_are_those_of_training_while_an_average_is_in_the_model(tmp_path) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = attach(EMA("10ba"), model, optimizer)
    recorded = attach(Recorder(tmp_path, "2ba"), model, optimizer)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.ones(1, 2)).square().mean().backward()
        optimizer.step()
    training = {name: value.clone() for name, value in model.state_dict().items()}
    with ema.applied():
        assert not torch.equal(model.weight, training["weight"])
        recorded.detach()
    assert same(training, model)
    assert same(Record(tmp_path).raw_weights(), model)


def test_a_run_that_continues_drops_the_raw_weights_of_its_earlier_end(tmp_path) -> None:
    trainer(tmp_path / "whole").fit()
    short_run = trainer(tmp_path / "run", duration="3ep")
    short_run.fit()
    folder = tmp_path / "run" / "record"
    earlier = Record(folder).raw
    assert earlier is not None
    short_run.save_checkpoint(tmp_path / "by-hand.pt")
    state = json.loads(short_run.state.algorithms[1].state_dict()["record"])
    longer = trainer(tmp_path / "run", duration="6ep", load_path=tmp_path / "by-hand.pt")
    longer.fit()
    record = Record(folder)
    assert same(record.raw_weights(), longer.state.model)
    assert (folder / earlier.file).exists()  # the checkpoint's pin keeps it
    # What was interrupted and resumed ends with the raw weights of what was not.
    resumed = trainer(tmp_path / "whole", load_path=sorted((tmp_path / "whole" / "checkpoints").iterdir())[0])
    before = raw_file(tmp_path / "whole" / "record")
    resumed.fit()
    assert raw_file(tmp_path / "whole" / "record") == before
    # Rewound to the end of the shorter run, the record has its raw weights again.
    manifest = load_manifest(folder)
    with Writer(folder, manifest.tensors, per_level=manifest.per_level) as writer:
        writer.rewind(state)
        assert writer.raw == earlier
    Record(folder).verify()


def test_verify_and_reading_find_damage_in_raw_weights(tmp_path) -> None:
    with (loop := Loop(short(tmp_path))).attached:
        loop.run(6)
    record = Record(tmp_path)
    assert record.raw is not None
    path = tmp_path / record.raw.file
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for act in (record.verify, record.raw_weights):
        with pytest.raises(RecordError, match="SHA-256"):
            act()
    path.unlink()
    with pytest.raises(RecordError, match="cannot be opened"):
        Record(tmp_path).raw_weights()


def test_a_manifest_whose_raw_weights_are_of_another_moment_is_refused(tmp_path) -> None:
    with (loop := Loop(short(tmp_path))).attached:
        loop.run(9)
    path = tmp_path / "manifest.json"
    plain = json.loads(path.read_text())
    del plain["sha256"], plain["stretches"][-1]
    path.write_text(json.dumps(plain))
    with pytest.raises(RecordError, match="must be those where the last segment ends"):
        Record(tmp_path)


def test_raw_weights_that_the_disk_refuses_are_written_by_the_next_close(tmp_path, monkeypatch) -> None:
    loop = Loop(short(tmp_path))
    loop.run(6)

    def full(*_: object) -> None:
        raise RecordError("no space left")

    with monkeypatch.context() as patched, pytest.raises(RecordError, match="no space"):
        patched.setattr(Writer, "keep_raw", full)
        loop.attached.detach()
    assert segments(tmp_path)[-1][2] == 6
    assert Record(tmp_path).raw is None
    want = {name: value.clone() for name, value in loop.model.state_dict().items()}
    nn.init.zeros_(loop.model[0].weight)  # a copy was taken where the run ended
    loop.recorder.close()
    assert torch.equal(Record(tmp_path).raw_weights()["0.weight"], want["0.weight"])


def test_a_writer_keeps_raw_weights_until_the_next_segment(tmp_path) -> None:
    edges = [Edge(n, Timestamp().to_next_batch(steps=n)) for n in range(3)]
    tensors = {
        "w": TensorInfo(torch.float16, (1,), averaged=True),
        "n": TensorInfo(torch.int64, (), averaged=False),
    }
    raw = {"w": torch.tensor([1 / 3])}
    with Writer(tmp_path, tensors) as writer:
        with pytest.raises(RecordError, match="must follow a segment"):
            writer.keep_raw(raw)
        writer.append({"w": torch.ones(1), "n": torch.tensor(7)}, edges[0], edges[1])
        with pytest.raises(ValueError, match=r"unexpected: n"):
            writer.keep_raw({**raw, "n": torch.tensor(7)})
        writer.keep_raw(raw)
        first = writer.raw
        writer.keep_raw(raw)
        assert writer.raw == first
        assert torch.equal(Record(tmp_path).raw_weights()["w"], raw["w"])
        assert Record(tmp_path).raw_weights()["n"] == 7
        writer.append({"w": torch.ones(1), "n": torch.tensor(7)}, edges[1], edges[2])
        assert writer.raw is None
        assert len(list(Path(tmp_path).glob("*.safetensors"))) == 2


def test_inspect_counts_no_raw_weights_among_files_that_only_checkpoints_keep(tmp_path, capsys) -> None:
    with (loop := Loop(short(tmp_path))).attached:
        loop.run(6)
    assert main(["inspect", str(tmp_path), "--verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pinned_only_files"] == 0

"""What ``overwrite=True`` does to a record that exists, and what it leaves alone."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from polyak import Record, Recorder, RecordError, attach
from polyak.record import Edge, Writer
from polyak.storage.safetensors import TensorInfo
from polyak.time import Timestamp


def run(folder: Path, steps: int, *, width: int = 2, state=None, **options):
    torch.manual_seed(0)
    model = nn.Linear(width, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attached = attach(Recorder(folder, "2ba", **options), model, optimizer)
    if state is not None:
        attached.load_state_dict(state)
    with attached:
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.ones(1, width)).square().mean().backward()
            optimizer.step()
        return attached.state_dict()


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "lock")


def test_a_record_is_replaced_with_overwrite_and_its_files_are_deleted(tmp_path) -> None:
    run(tmp_path / "a", 10)
    before = files(tmp_path / "a")
    run(tmp_path / "a", 6, overwrite=True)
    assert Record(tmp_path / "a").segments[-1].end.updates == 6
    Record(tmp_path / "a").verify()
    run(tmp_path / "b", 6)
    # The pin of the first run's state is gone, and so are its files.
    assert files(tmp_path / "a") == files(tmp_path / "b") != before


def test_a_record_of_another_model_and_one_that_cannot_be_read_are_replaced_with_overwrite(tmp_path) -> None:
    run(tmp_path, 4)
    run(tmp_path, 4, width=3, overwrite=True)
    assert Record(tmp_path).tensors["weight"].shape == (1, 3)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(RecordError):
        run(tmp_path, 4)
    run(tmp_path, 4, overwrite=True)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(RecordError, match=r"restore it from a copy, .* overwrite=True"):
        run(tmp_path, 4)
    run(tmp_path, 4, overwrite=True)
    assert Record(tmp_path).segments[-1].end.updates == 4


def test_a_resumed_run_continues_its_record_in_spite_of_overwrite(tmp_path) -> None:
    state = run(tmp_path, 5, overwrite=True)
    run(tmp_path, 3, overwrite=True, state=state)
    assert Record(tmp_path).segments[-1].end.updates == 8


def test_errors_about_an_existing_record_name_overwrite(tmp_path) -> None:
    run(tmp_path, 4)
    for options in ({}, {"width": 3}, {"per_level": 2}, {"dtype": torch.bfloat16}):
        with pytest.raises((RecordError, ValueError), match=r"overwrite=True"):
            run(tmp_path, 4, **options)


def test_an_overwrite_that_is_killed_before_its_manifest_is_in_place_changes_nothing(tmp_path, monkeypatch) -> None:
    run(tmp_path, 10)
    before = files(tmp_path)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("polyak.storage.atomic.put", killed)
        run(tmp_path, 1, overwrite=True)
    assert files(tmp_path) == before
    Record(tmp_path).verify()


def test_a_writer_that_overwrites_has_an_empty_record(tmp_path) -> None:
    tensors = {"w": TensorInfo(torch.float32, (1,), averaged=True)}
    start, end = Edge(0, Timestamp()), Edge(1, Timestamp().to_next_batch())
    with Writer(tmp_path, tensors) as writer:
        writer.append({"w": torch.ones(1)}, start, end)
        writer.pin("checkpoint", tmp_path / "c.pt")
    with Writer(tmp_path, tensors, overwrite=True) as writer:
        assert (writer.segments, dict(writer.pins)) == ((), {})
    assert json.loads((tmp_path / "manifest.json").read_text())["pins"] == {}

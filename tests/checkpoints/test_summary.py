"""A summary says what is in a checkpoint, without reading a tensor."""

import checkpoint_files
import pytest
import torch

from polyak import CheckpointError
from polyak.checkpoints import open_checkpoint
from polyak.checkpoints.summary import summarize


@pytest.mark.parametrize("name", list(checkpoint_files.FORMATS))
def test_a_summary_of_a_format_is_what_is_averaged(tmp_path, name) -> None:
    path = checkpoint_files.write(name, tmp_path, 3.0)
    found, opened = summarize(path), open_checkpoint(path)
    (state,) = found.state_dicts
    assert (state.place, state.tensors.keys(), state.unread) == (opened.place, opened.tensors.keys(), {})
    assert (found.format, found.moment, found.metrics) == (opened.format, opened.moment, opened.metrics)
    assert state.size_bytes == opened.size_bytes
    want = checkpoint_files.state(3.0).values()
    assert state.numel == sum(one.numel() for one in want if one.is_floating_point())
    assert state.dtypes == {"float32": 6, "bfloat16": 1, "int64": 1, "bool": 1}


def test_a_summary_has_all_state_dicts_and_what_cannot_be_read(tmp_path) -> None:
    raw = {"w": torch.zeros(3), "s": torch.eye(3).to_sparse()}
    torch.save({"model": raw, "ema": {"module": {"w": torch.zeros(3).half()}}, "epoch": 2}, tmp_path / "it.pt")
    found = summarize(tmp_path / "it.pt")
    assert [one.place for one in found.state_dicts] == ["model", "ema.module"]
    assert [dict(one.unread) for one in found.state_dicts] == [{"s": "a sparse tensor"}, {}]
    assert found.moment == {"ep": 2}


def test_what_has_no_state_dict_has_no_summary(tmp_path) -> None:
    torch.save({"epoch": 3}, tmp_path / "it.pt")
    with pytest.raises(CheckpointError, match=r"it.pt: a checkpoint must have a state dict in it \(it has epoch\)"):
        summarize(tmp_path / "it.pt")

"""``Recorder(None)``: the record of a short run, which exists for as long as something refers to it."""

import copy
import gc
import os
import pickle

import pytest
import torch
from torch import nn

from polyak import HalfLife, Recorder, RecordError, attach, sweep
from polyak.record import Record


def trained(recorder, steps=64):
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with attach(recorder, model, optimizer) as attached:
        train(model, optimizer, steps)
    return attached, model, optimizer


def train(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(torch.randn(8, 3)), torch.randn(8, 1)).backward()
        optimizer.step()


def test_a_record_without_a_folder_gives_the_same_averages_as_one_in_a_folder(tmp_path) -> None:
    in_memory, in_folder = Recorder(interval=2), Recorder(tmp_path / "run", interval=2)
    trained(in_memory), trained(in_folder)
    profile = HalfLife("8ba", unbiased=True)
    found, want = in_memory.record.average(profile), Record(tmp_path / "run").average(profile)
    torch.testing.assert_close(found, want, rtol=0, atol=0)
    (several,) = in_memory.record.averages([profile])
    torch.testing.assert_close(several, want, rtol=0, atol=0)
    in_memory.record.export(profile, tmp_path / "averaged.safetensors")
    assert (tmp_path / "averaged.safetensors").is_file()
    assert in_memory.record.recommend().half_life == in_folder.record.recommend().half_life
    assert sweep(in_memory.record, lambda state: float(state["weight"].norm()), points=3).has_best


def test_the_temporary_folder_is_deleted_with_the_last_reference(tmp_path) -> None:
    recorder = Recorder(interval=2)
    attached, *_ = trained(recorder)
    folder, record = recorder.folder, recorder.record
    recommendation = record.recommend()
    del recorder, attached, record
    gc.collect()
    assert recommendation.average().keys() == {"weight", "bias"}
    del recommendation
    gc.collect()
    assert not folder.exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_does_not_delete_the_temporary_folder() -> None:
    recorder = Recorder(interval=2)
    if (child := os.fork()) == 0:
        recorder._temporary._deleted()
        os._exit(0)
    os.waitpid(child, 0)
    assert recorder.folder.is_dir()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_of_a_recorder_without_a_folder_has_another_temporary_folder(copied) -> None:
    recorder = Recorder(interval=2)
    other = copied(recorder)
    assert other.folder != recorder.folder
    trained(other)
    assert other.record.segments
    assert not list(recorder.folder.iterdir())


def test_a_record_without_a_folder_is_rewound_while_its_recorder_exists() -> None:
    recorder = Recorder(interval=2)
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with attach(recorder, model, optimizer) as attached:
        train(model, optimizer, 20)
        state = attached.state_dict()
        train(model, optimizer, 10)
    attached = attach(recorder, model, optimizer)
    attached.load_state_dict(state)
    with attached:
        train(model, optimizer, 4)
    assert recorder.record.segments[-1].end.updates == 24


def test_resuming_a_record_whose_temporary_folder_is_gone_is_refused() -> None:
    recorder = Recorder(interval=2)
    attached, model, optimizer = trained(recorder)
    state = attached.state_dict()
    with pytest.raises(RecordError, match="was in a temporary folder, which is deleted with its Recorder"):
        attach(Recorder(interval=2), model, optimizer).load_state_dict(state)


def test_a_recorder_has_no_record_before_a_run() -> None:
    with pytest.raises(RecordError, match="a run must have begun before it has a record"):
        _ = Recorder().record


def test_the_record_of_a_run_that_continues_has_the_segments_that_have_ended(tmp_path) -> None:
    recorder = Recorder(tmp_path / "run", interval=4)
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with attach(recorder, model, optimizer):
        train(model, optimizer, 18)
        assert recorder.record.segments[-1].end.updates == 16
    assert recorder.record.segments[-1].end.updates == 18

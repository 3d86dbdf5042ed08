"""The Recorder in the trainer and in plain loops: what it writes, how it goes on, what it does when the disk fails."""

import json
import signal
import threading
from pathlib import Path

import pytest
import torch
from forking import fork, forks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from waiting import wait_until

from polyak import (
    EMA,
    CheckpointError,
    CheckpointSaver,
    HalfLife,
    MismatchError,
    PlanWarning,
    PolyakError,
    Record,
    Recorder,
    RecordError,
    TimeError,
    Trainer,
    Uniform,
    attach,
)
from polyak.record import Writer
from polyak.record.appender import Appender

torch.set_num_threads(1)


class Loop:
    """A plain loop with a model that has every kind of tensor, and all its weights kept in float64."""

    def __init__(self, recorder: Recorder, **counts) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 4))
        self.model[3].weight = self.model[2].weight
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.recorder = recorder
        self.attached = attach(recorder, self.model, self.optimizer, **counts)
        self.history: list[dict[str, torch.Tensor]] = []

    def run(self, steps: int) -> "Loop":
        for _ in range(steps):
            inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(len(self.history)))
            self.optimizer.zero_grad()
            self.model(inputs).square().mean().backward()
            self.optimizer.step()
            self.history.append({name: t.detach().double() for name, t in self.model.state_dict().items()})
        return self

    def mean(self, name: str, start: int, end: int) -> torch.Tensor:
        return torch.stack([weights[name] for weights in self.history[start:end]]).mean(0)


def short(folder: Path, **options) -> Recorder:
    """A recorder of short segments, which are compared with exact means."""
    return Recorder(folder, **{"interval": "4ba", "dtype": torch.float32, **options})


pytestmark = pytest.mark.filterwarnings("ignore:training has waited:polyak.PlanWarning")  # disks differ


def segments(folder: Path) -> list[tuple[str, int, int]]:
    return [(s.file, s.start.updates, s.end.updates) for s in Record(folder).segments]


def test_each_segment_is_the_mean_of_its_weights_and_the_last_value_of_what_is_counted(tmp_path) -> None:
    loop = Loop(short(tmp_path, per_level=2))
    with loop.attached:
        loop.run(50)
    record = Record(tmp_path)
    assert record.segments[-1].num_updates == 2  # the open segment, written on detaching
    assert record.segments[-1].end.updates == 50
    assert max(s.level for s in record.segments) >= 1
    for segment in record.segments:
        start, end = segment.start.updates, segment.end.updates
        with record.open(segment) as file:
            for name in record.tensors:
                want = loop.mean(name, start, end)
                if name == "1.num_batches_tracked":
                    want = loop.history[end - 1][name]
                torch.testing.assert_close(file.read(name).double(), want, rtol=1e-5, atol=1e-6)


def test_the_average_from_the_record_is_that_of_all_weights_and_loads_in_the_model(tmp_path) -> None:
    loop = Loop(short(tmp_path))
    with loop.attached:
        loop.run(60)
    averaged = Record(tmp_path).average(Uniform())
    torch.testing.assert_close(averaged["0.weight"].double(), loop.mean("0.weight", 0, 60), rtol=1e-5, atol=1e-6)
    assert str(loop.model.load_state_dict(averaged)) == "<All keys matched successfully>"


def test_a_segment_is_a_1024th_of_the_run_unless_said_otherwise(tmp_path) -> None:
    loop = Loop(Recorder(tmp_path, per_level=None), max_duration="2048ba")
    with loop.attached:
        loop.run(20)
    assert [s.num_updates for s in Record(tmp_path).segments] == [2] * 10
    with pytest.raises(TimeError, match="give Recorder an interval such as '100ba', or the loop its max_duration"):
        Loop(Recorder(tmp_path / "other")).run(1)


@pytest.mark.parametrize(("interval", "lengths"), [("0.5ep", [5, 5, 5, 5]), ("24sp", [3, 3, 3, 3, 3, 3, 2])])
def test_a_segment_may_be_counted_in_any_unit(tmp_path, interval, lengths) -> None:
    loop = Loop(Recorder(tmp_path, interval, per_level=None), steps_per_epoch=10, samples_per_step=8)
    with loop.attached:
        loop.run(20)
    assert [s.num_updates for s in Record(tmp_path).segments] == lengths


@pytest.mark.parametrize("stop", [21, 24, 3])
def test_a_plain_loop_that_is_stopped_and_resumed_writes_the_same_record_bit_for_bit(tmp_path, stop) -> None:
    whole = Loop(short(tmp_path / "whole", per_level=2))
    with whole.attached:
        whole.run(60)

    first = Loop(short(tmp_path / "record", per_level=2)).run(stop)
    path = tmp_path / "state.pt"
    torch.save(
        {
            "model": first.model.state_dict(),
            "optimizer": first.optimizer.state_dict(),
            "recorder": first.attached.state_dict(path),
        },
        path,
    )
    first.run(20)  # what comes after the checkpoint is lost: the record is ahead of it
    first.attached.detach()

    second = Loop(short(tmp_path / "record", per_level=2))
    state = torch.load(path, weights_only=True)
    second.model.load_state_dict(state["model"])
    second.optimizer.load_state_dict(state["optimizer"])
    second.attached.load_state_dict(state["recorder"])
    second.history = first.history[:stop]
    with second.attached:
        second.run(60 - stop)
    assert segments(tmp_path / "record") == segments(tmp_path / "whole")  # names are hashes of what is in them
    Record(tmp_path / "record").verify()


def trainer(folder: Path, *, duration="6ep", keep=None, callbacks=(), **options) -> Trainer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.1), nn.BatchNorm1d(8), nn.Linear(8, 2))
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(80, 3, generator=generator), torch.randint(2, (80,), generator=generator))
    return Trainer(
        model=model,
        train_dataloader=DataLoader(data, batch_size=8, shuffle=True),
        max_duration=duration,
        algorithms=[EMA(half_life="5ba"), short(folder / "record", interval="3ba", per_level=2)],
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        loss=nn.functional.cross_entropy,
        callbacks=[CheckpointSaver(folder / "checkpoints", "7ba", keep=keep), *callbacks],
        seed=5,
        **options,
    )


def test_in_the_trainer_a_recorder_works_next_to_ema_and_resumes_from_any_checkpoint(tmp_path) -> None:
    trainer(tmp_path / "whole").fit()
    want = segments(tmp_path / "whole" / "record")
    for checkpoint in sorted((tmp_path / "whole" / "checkpoints").iterdir()):
        resumed = trainer(tmp_path / "whole", load_path=checkpoint)
        resumed.fit()
        assert segments(tmp_path / "whole" / "record") == want, checkpoint.name


def test_a_run_resumes_from_a_checkpoint_that_was_saved_by_hand_after_it(tmp_path) -> None:
    trainer(tmp_path / "whole", duration="6ep").fit()
    short = trainer(tmp_path / "run", duration="3ep")
    short.fit()
    short.save_checkpoint(tmp_path / "by-hand.pt")
    longer = trainer(tmp_path / "run", duration="6ep", load_path=tmp_path / "by-hand.pt")
    assert json.loads(longer.state.algorithms[1].state_dict()["record"])["stretches"]
    longer.fit()
    ends = [s.end.updates for s in Record(tmp_path / "run" / "record").segments]
    assert ends[-1] == Record(tmp_path / "whole" / "record").segments[-1].end.updates == 60
    Record(tmp_path / "run" / "record").verify()


def test_files_stay_as_long_as_a_kept_checkpoint_refers_to_them_and_no_longer(tmp_path) -> None:
    trainer(tmp_path, keep=2).fit()
    record, folder = Record(tmp_path / "record"), tmp_path / "record"
    on_disk = {path.name for path in folder.glob("*.safetensors")}
    assert record.raw is not None
    needed = {s.file for s in (*record.segments, record.raw)}
    for path in (tmp_path / "checkpoints").iterdir():
        states = [state for name, state in torch.load(path, weights_only=True)["algorithms"] if name == "Recorder"]
        needed |= {s["file"] for state in states for s in json.loads(state["record"])["stretches"]}
    # The checkpoint that `keep` deleted last is let go at the next.
    pins = json.loads((folder / "manifest.json").read_text())["pins"]
    assert needed <= on_disk
    assert len(pins) <= 3
    assert on_disk == {s.file for s in (*record.segments, record.raw)}.union(*(pin["files"] for pin in pins.values()))


def test_without_paths_the_files_of_the_last_two_states_stay(tmp_path) -> None:
    loop = Loop(short(tmp_path, per_level=1))
    states = []
    for _ in range(5):
        loop.run(9)
        states.append(loop.attached.state_dict())
    loop.attached.detach()
    for state in states[-2:]:
        other = Loop(short(tmp_path, per_level=1))
        other.attached.load_state_dict(state)
        other.run(1).attached.detach()
    other = Loop(short(tmp_path, per_level=1))
    other.attached.load_state_dict(states[0])
    with pytest.raises(RecordError, match="can be rewound only to a checkpoint whose files it still has"):
        other.run(1)


def test_a_record_that_is_there_is_not_written_over(tmp_path) -> None:
    with (loop := Loop(short(tmp_path))).attached:
        loop.run(10)
    before = segments(tmp_path)
    with pytest.raises(
        RecordError, match=r"has a record of 10 updates already.*resume it from its checkpoint, .*overwrite"
    ):
        Loop(short(tmp_path)).run(1)
    assert segments(tmp_path) == before


def test_two_runs_cannot_record_to_one_folder(tmp_path) -> None:
    first = Loop(short(tmp_path)).run(1)
    with pytest.raises(RecordError, match="writ"):
        Loop(short(tmp_path)).run(1)
    first.attached.detach()


def test_training_continues_while_a_segment_is_written_and_waits_if_the_next_one_ends(tmp_path, monkeypatch) -> None:
    release, real = threading.Event(), Writer.append
    threads = set()

    def slow(self, *args):
        threads.add(threading.current_thread().name)
        release.wait(600)
        return real(self, *args)

    wait, waits = Appender.wait, []

    def release_now(self, ended):
        waits.append((ended.written, ended.end.updates))
        release.set()
        wait(self, ended)
        waits.append((ended.written, ended.end.updates))

    monkeypatch.setattr(Writer, "append", slow)
    monkeypatch.setattr("polyak.record.queue._PATIENCE_S", 0.0)
    loop = Loop(Recorder(tmp_path, "4ba"))
    loop.run(7)  # the first segment is being written
    assert not release.is_set()
    monkeypatch.setattr(Appender, "wait", release_now)
    with pytest.warns(PlanWarning, match=r"training has waited \d+\.\d s for the disk: a segment of 4ba"):
        loop.run(1)
    assert waits == [(False, 4), (True, 4)]
    loop.run(12).attached.detach()
    assert threading.current_thread().name not in threads
    assert [s.num_updates for s in Record(tmp_path).segments] == [4] * 5


def test_a_segment_that_is_being_written_is_not_touched_by_the_next_steps(tmp_path, monkeypatch) -> None:
    release, real = threading.Event(), Writer.append

    def slow(self, *args):
        release.wait(600)
        return real(self, *args)

    monkeypatch.setattr(Writer, "append", slow)
    loop = Loop(short(tmp_path, per_level=None)).run(7)
    release.set()
    loop.run(5).attached.detach()
    record = Record(tmp_path)
    with record.open(record.segments[0]) as file:
        torch.testing.assert_close(file.read("0.weight").double(), loop.mean("0.weight", 0, 4), rtol=1e-5, atol=1e-6)


def test_a_record_opened_while_its_recorder_writes_has_all_segments_that_have_ended(tmp_path, monkeypatch) -> None:
    loop = Loop(short(tmp_path, per_level=None)).run(4)
    assert len(Record(tmp_path).segments) == 1
    release, real = threading.Event(), Writer.append

    def slow(self, *args):
        release.wait(600)
        return real(self, *args)

    monkeypatch.setattr(Writer, "append", slow)
    loop.run(4)
    threading.Timer(0.2, release.set).start()
    record = Record(tmp_path)
    assert [s.num_updates for s in record.segments] == [4, 4]
    loop.run(3)  # no segment ends
    assert torch.equal(record.average(Uniform())["0.weight"], Record(tmp_path).average(Uniform())["0.weight"])
    loop.attached.detach()


def test_an_error_in_the_thread_is_raised_at_the_next_call(tmp_path, monkeypatch) -> None:
    def full(*_: object):
        raise RecordError("adding a segment failed: no space left on device")

    loop = Loop(Recorder(tmp_path, "4ba")).run(3)
    monkeypatch.setattr(Writer, "append", full)
    with pytest.raises(RecordError, match="no space left"):
        loop.run(8)


def test_an_exception_ends_the_run_but_not_what_was_recorded(tmp_path) -> None:
    loop = Loop(short(tmp_path))
    with pytest.raises(KeyboardInterrupt), loop.attached:
        loop.run(10)
        raise KeyboardInterrupt
    assert Record(tmp_path).segments[-1].end.updates == 10


def test_a_non_finite_step_is_kept_out_of_the_segment(tmp_path) -> None:
    loop = Loop(short(tmp_path, per_level=None)).run(6)
    kept = loop.model[0].weight.detach().clone()
    with torch.no_grad():
        loop.model[0].weight[0, 0] = float("nan")
    with pytest.warns(UserWarning, match="tensors with NaN or inf"):
        loop.run(3)
        with torch.no_grad():
            for parameter in loop.model.parameters():
                parameter.nan_to_num_()
        loop.attached.detach()
    assert all(bool(t.isfinite().all()) for t in Record(tmp_path).average(Uniform()).values())
    assert kept.isfinite().all()


def test_a_parameter_that_joins_later_is_an_error_and_the_record_is_as_it_was(tmp_path) -> None:
    loop = Loop(short(tmp_path))
    loop.model[0].bias.requires_grad_(False)
    loop.run(4)
    loop.model[0].bias.requires_grad_(True)
    with pytest.raises(MismatchError, match=r"unexpected: 0\.bias"):
        loop.run(8)
    assert Record(tmp_path).segments[-1].end.updates == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_files_may_have_16_bits(tmp_path, dtype) -> None:
    with (loop := Loop(short(tmp_path, dtype=dtype))).attached:
        loop.run(40)
    assert Record(tmp_path).tensors["0.weight"].dtype == dtype
    averaged = Record(tmp_path).average(Uniform())
    torch.testing.assert_close(averaged["0.weight"].double(), loop.mean("0.weight", 0, 40), rtol=0.02, atol=0.01)


def test_the_running_mean_may_be_kept_elsewhere(tmp_path) -> None:
    for name, options in (("here", {}), ("there", {"device": "cpu"})):
        with (loop := Loop(short(tmp_path / name, **options))).attached:
            loop.run(20)
    assert segments(tmp_path / "here") == segments(tmp_path / "there")


def test_bad_arguments_and_foreign_states_are_refused_at_the_door(tmp_path) -> None:
    with pytest.raises(TimeError, match="interval must be above 0"):
        Recorder(tmp_path, "0ba")
    with pytest.raises(RecordError, match="per_level must be at least 1"):
        Recorder(tmp_path, "1ba", per_level=0)
    with pytest.raises(CheckpointError, match="the state must be that of a Recorder"):
        Recorder(tmp_path, "1ba").load_state_dict({"ema_started": True})
    with pytest.raises(CheckpointError, match="must be in its Trainer, or attached"):
        Recorder(tmp_path, "1ba").load_state_dict({"num_updates": 1, "count": 0})


@pytest.mark.slow
@forks
def test_a_run_that_is_killed_resumes_from_its_checkpoint_with_the_same_record(tmp_path) -> None:
    trainer(tmp_path / "whole", duration="20ep").fit()
    killed = tmp_path / "killed"

    def saved() -> int:
        return len(list((killed / "checkpoints").glob("ep*.pt")))

    for _ in range(3):
        enough = saved() + 4
        life = fork(lambda: trainer(killed, duration="20ep", autoresume=True).fit())
        wait_until(lambda life=life, enough=enough: not life.is_alive() or saved() >= enough)
        life.kill()
        life.join()
        assert life.exitcode in (0, -signal.SIGKILL)
    trainer(killed, duration="20ep", autoresume=True).fit()
    assert segments(killed / "record") == segments(tmp_path / "whole" / "record")
    assert Record(killed / "record").error(HalfLife("20ba")) > 0


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"per_level": "4"}, "per_level must be at least 1"),
        ({"per_level": 1.5}, "per_level must be at least 1"),
        ({"per_level": True}, "per_level must be at least 1"),
        ({"dtype": torch.uint8}, "dtype of a Recorder must be torch.float32"),
        ({"dtype": "float16"}, "dtype of a Recorder must be torch.float32"),
        ({"dtype": torch.float8_e4m3fn}, "dtype of a Recorder must be torch.float32"),
        ({"device": "gpu"}, "device of a Recorder must be a device of this machine"),
        ({"policy": "all"}, "policy of a Recorder must be a function"),
        ({"overwrite": "yes"}, "overwrite of a Recorder must be True or False"),
    ],
)
def test_a_wrong_argument_is_refused_by_name_before_a_run(tmp_path: Path, given, says) -> None:
    with pytest.raises(PolyakError, match=says):
        Recorder(tmp_path, interval="5ba", **given)


def test_a_record_of_nothing_but_frozen_weights_is_warned_of(tmp_path: Path) -> None:
    attached = attach(
        Recorder(tmp_path / "r", interval="2ba"), nn.Linear(2, 1).requires_grad_(requires_grad=False), None
    )
    with pytest.warns(PlanWarning, match="nothing to average"):
        attached.step()
    attached.detach()

"""``watch`` in another process than the run, and ``Watch`` inside it."""

import json
import math
import random
import shutil
import threading
import warnings
from types import SimpleNamespace

import numpy
import pytest
import torch
from torch import nn

from polyak import EMA, ArgumentError, PlanWarning, PolyakError, Recorder, RecordError, TimeError, Watch, attach
from polyak.cli import main
from polyak.profiles import Cooldown, HalfLife
from polyak.record import Edge, Record, Writer
from polyak.storage.safetensors import TensorInfo
from polyak.sweeping import EvaluationError
from polyak.time import Time, Timestamp
from polyak.watching import Log, Moment, read_moment, read_moments, watch
from polyak.watching.log import WatchError
from polyak.watching.process import Due

INFOS = {"weight": TensorInfo(torch.float32, (3,), averaged=True)}


class Run:
    """A run that trains when a test wants."""

    def __init__(self, folder, length=200, max_duration=200):
        self.folder = folder
        known = None if max_duration is None else Time(max_duration, "ba")
        self.writer = Writer(folder, INFOS, per_level=4, max_duration=known)
        self.edge, self.length = Edge(0, Timestamp()), length

    def train(self, updates):
        for _ in range(updates):
            end = Edge(self.edge.updates + 1, self.edge.timestamp.to_next_batch())
            self.writer.append({"weight": weights(end.updates)}, self.edge, end)
            self.edge = end

    def finish(self):
        self.writer.keep_raw({"weight": weights(self.edge.updates)})
        self.writer.close()


def weights(update):
    return torch.randn(3, generator=torch.Generator().manual_seed(update))


def loss(state):
    return {"loss": float(state["weight"].norm())}


@pytest.fixture
def run(tmp_path):
    made = Run(tmp_path / "run")
    yield made
    made.writer.close()


def read(run, **options):
    """Watch a run that trains 20 more updates whenever a moment has been read, and ends after 200."""
    found = list[Moment]()
    for moment in watch(run.folder, loss, poll_s=0, **options):
        found.append(moment)
        if run.edge.updates < run.length:
            run.train(20)
            if run.edge.updates == run.length:
                run.finish()
    return found


@pytest.mark.slow
def test_watch_reads_a_live_record_at_each_interval_and_ends_with_the_run(run) -> None:
    run.train(20)
    said = []
    found = read(run, every="20ba", say=said.append)
    assert [one.updates for one in found] == list(range(20, 201, 20))
    assert said == ["the run has ended"]
    assert [one.get("raw") is not None for one in found] == [False] * 9 + [True]


@pytest.mark.parametrize(("batches", "is_due"), [(16, False), (17, False), (31, False), (32, True), (70, True)])
def test_a_record_is_read_again_once_an_interval_has_passed(batches, is_due) -> None:
    def at(batch):
        return Timestamp(batch=batch)

    record = SimpleNamespace(segments=[SimpleNamespace(end=Edge(batches, at(batches)))], raw=None, max_duration=None)
    assert Due(Time.from_timestring("16ba")).at(record, Moment(16, at(16), "loss", False, ())) is is_due


def test_a_moment_has_the_metrics_of_the_averages_of_its_record(run) -> None:
    run.train(160)
    record = Record(run.folder)
    moment = read_moment(record, loss)
    for share, profile in ((1 / 16, HalfLife("10ba", unbiased=True)), (1 / 4, HalfLife("40ba", unbiased=True))):
        assert moment.get("half_life", share).metrics == loss(record.average(profile))
    assert moment.get("cooldown", 0.2).metrics == loss(record.average(Cooldown("32ba")))
    assert moment.sixteenth.metrics == moment.get("half_life", 1 / 16).metrics
    assert moment.value(moment.best) == min(moment.value(one) for one in moment.readings if one.kind == "half_life")
    assert moment.get("newest").metrics == pytest.approx(loss({"weight": weights(160)}), rel=1e-2)


def test_a_moment_is_the_same_after_it_was_written(run, tmp_path) -> None:
    run.train(64)
    moment = read_moment(Record(run.folder), lambda state: {"loss": math.nan, **{"other": loss(state)["loss"]}})
    with Log(tmp_path / "watch.jsonl") as log:
        log.add(moment)
    (found,) = read_moments(tmp_path / "watch.jsonl")
    assert found.best is None
    assert repr(found.to_plain()) == repr(moment.to_plain())


@pytest.mark.slow
def test_watch_continues_a_file_and_reads_nothing_twice(run, tmp_path) -> None:
    run.train(20)
    first = next(watch(run.folder, loss, "20ba", results=tmp_path / "watch.jsonl"))
    with (tmp_path / "watch.jsonl").open("ab") as file:
        file.write(b'{"a line that a killed process')
    found = read(run, every="20ba", results=tmp_path / "watch.jsonl") if run.train(20) is None else []
    assert [one.updates for one in found][:2] == [40, 60]
    assert [one.updates for one in read_moments(tmp_path / "watch.jsonl")] == [first.updates, *range(40, 201, 20)]


def test_moments_of_a_run_that_was_rewound_take_the_place_of_later_ones(run, tmp_path) -> None:
    run.train(20)
    early = read_moment(Record(run.folder), loss)
    run.train(20)
    late = read_moment(Record(run.folder), loss)
    with Log(tmp_path / "watch.jsonl") as log:
        for moment in (early, late, early):
            log.add(moment)
    assert [one.updates for one in read_moments(tmp_path / "watch.jsonl")] == [20]


def test_watch_ends_when_the_record_vanishes(run) -> None:
    run.train(20)
    said = []
    moments = watch(run.folder, loss, "20ba", poll_s=0, say=said.append)
    next(moments)
    run.writer.close()
    shutil.rmtree(run.folder)
    assert list(moments) == []
    assert said == [f"the record in {run.folder} is gone"]


def test_watch_ends_when_the_record_vanishes_while_it_is_read(run) -> None:
    run.train(20)
    said = []

    def vanishing(record, *arguments, **options):
        run.writer.close()
        shutil.rmtree(run.folder)
        raise RecordError("gone")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Record, "averages", vanishing)
        assert list(watch(run.folder, loss, "20ba", poll_s=0, say=said.append, patience_s=0)) == []
    assert said == [f"the record in {run.folder} is gone"]


def test_watch_waits_for_a_record_and_loses_its_patience(tmp_path) -> None:
    said = []
    assert list(watch(tmp_path / "none", loss, "20ba", poll_s=0, patience_s=0, say=said.append)) == []
    assert said[0] == f"waiting for a record in {tmp_path / 'none'}"
    assert said[1].endswith("has not grown for 0 s")


def test_a_damaged_record_is_an_error(run) -> None:
    run.train(20)
    path = next(run.folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(RecordError, match="must have the SHA-256"):
        next(watch(run.folder, loss, "20ba"))


def test_an_interval_that_the_run_does_not_count_is_refused(tmp_path) -> None:
    run = Run(tmp_path / "run", max_duration=None)
    run.train(20)
    with pytest.raises(TimeError, match="the length of this one is not known"):
        next(watch(run.folder, loss))
    with pytest.raises(TimeError, match="it counts no tok"):
        next(watch(run.folder, loss, "1000tok"))
    run.writer.close()


def test_two_watches_do_not_write_one_file(run, tmp_path) -> None:
    with (
        Log(tmp_path / "watch.jsonl"),
        pytest.raises(WatchError, match="one writer at a time"),
        Log(tmp_path / "watch.jsonl"),
    ):
        pass


# On the command line


@pytest.fixture
def here(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evaluate_watch.py").write_text(
        "def loss(state):\n    print('evaluating')\n    return {'loss': float(state['weight'].norm())}\n"
    )
    return run


def test_polyak_watch_prints_a_line_for_each_moment_and_writes_a_page(here, tmp_path, capsys) -> None:
    here.train(64)
    here.finish()
    assert main(["watch", "run", "--evaluate", "evaluate_watch.py:loss"]) == 0
    printed = capsys.readouterr()
    heading = next(line for line in printed.out.splitlines() if "T/16" in line)
    assert heading.split() == ["trained", "raw", "newest", "T/16", "best", "cool", "10%", "cool", "20%"]
    assert "the run has ended" in printed.err
    assert "Watch of run" in (tmp_path / "polyak-watch" / "watch.html").read_text()
    assert main(["watch", "run", "--evaluate", "evaluate_watch.py:loss"]) == 0  # there is nothing more to read
    assert len(read_moments(tmp_path / "polyak-watch" / "watch.jsonl")) == 1


def test_polyak_watch_prints_one_object_per_line_for_programs(here, capsys) -> None:
    here.train(64)
    here.finish()
    assert main(["watch", "run", "--evaluate", "evaluate_watch.py:loss", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert Moment.from_plain(json.loads(line)).updates == 64


def test_ctrl_c_ends_polyak_watch_and_keeps_what_was_read(here, tmp_path, monkeypatch, capsys) -> None:
    here.train(64)

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", interrupt)
    assert main(["watch", "run", "--evaluate", "evaluate_watch.py:loss", "--every", "20ba"]) == 0
    printed = capsys.readouterr()
    assert "64ba" in printed.out
    assert "polyak watch: stopped; the run continues" in printed.err
    assert len(read_moments(tmp_path / "polyak-watch" / "watch.jsonl")) == 1


def test_polyak_watch_does_not_mix_the_moments_of_two_records(here, tmp_path, capsys) -> None:
    here.train(64)
    here.finish()
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    assert main(["watch", "run", "--evaluate", "evaluate_watch.py:loss"]) == 0
    assert main(["watch", "other", "--evaluate", "evaluate_watch.py:loss"]) == 2
    assert "must not have the moments of another record" in capsys.readouterr().err
    assert main(["watch", "other", "--evaluate", "evaluate_watch.py:loss", "--force"]) == 0


# Inside the run


class Metrics:
    def __init__(self):
        self.logged = []

    def log_metrics(self, metrics, step=None):
        self.logged.append((step, dict(metrics)))


def trained(algorithms, steps=100, logger=None, **options):
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with attach(algorithms, model, optimizer, logger=logger, **options):
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(torch.randn(8, 3)), torch.randn(8, 1)).backward()
            optimizer.step()
    return model


def drawing(state):
    """An evaluation that draws random numbers."""
    random.random(), numpy.random.rand(), torch.rand(3)
    return {"loss": float(state["weight"].norm())}


def test_watch_in_a_run_logs_the_metrics_of_each_interval(tmp_path) -> None:
    recorder, logger = Recorder(interval="2ba"), Metrics()
    watching = Watch(recorder, drawing, "25ba", results=tmp_path / "watch.jsonl")
    trained([recorder, watching], logger=logger)
    assert [step for step, _ in logger.logged] == [25, 50, 75, 100]
    names = {"raw", "newest", "sixteenth", "best_half_life", "cooldown_10", "cooldown_20"}
    assert set(logger.logged[-1][1]) == {f"watch/loss/{one}" for one in names} | {"watch/best_half_life_share"}
    assert [one.to_plain() for one in read_moments(tmp_path / "watch.jsonl")] == [
        one.to_plain() for one in watching.moments
    ]


def test_watch_changes_nothing_of_the_training() -> None:
    recorder = Recorder(interval="2ba")
    plain = trained([Recorder(interval="2ba")])
    watched = trained([recorder, Watch(recorder, drawing, "10ba")])
    for one, other in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one, other)


def test_watch_is_given_copies_of_the_training_weights() -> None:
    recorder = Recorder(interval="2ba")

    def spoils(state):
        value = float(state["weight"].norm())
        state["weight"].fill_(1e9)
        return value

    model = trained([recorder, Watch(recorder, spoils, "10ba")])
    assert float(model.weight.detach().abs().max()) < 10


def test_watch_evaluates_the_raw_weights_and_not_a_swapped_average() -> None:
    recorder, seen = Recorder(interval="2ba"), []
    watching = Watch(recorder, lambda state: float(state["weight"].norm()), "20ba")
    model = trained([EMA("10ba"), recorder, watching])
    seen = watching.moments[-1].get("raw")
    assert seen.metrics["value"] == pytest.approx(float(model.weight.detach().norm()), rel=1e-6)


def test_a_first_evaluation_that_fails_is_an_error_and_a_later_one_a_warning() -> None:
    calls = []

    def fails_later(state):
        calls.append(state)
        if len(calls) > 20:
            raise ZeroDivisionError
        return 1.0

    recorder = Recorder(interval="2ba")
    with pytest.raises(EvaluationError, match="ZeroDivisionError"):
        trained([recorder, Watch(recorder, lambda _: 1 / 0, "20ba")])
    recorder = Recorder(interval="2ba")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained([recorder, Watch(recorder, fails_later, "20ba")])
    assert any("were not evaluated" in str(one.message) for one in caught if one.category is PlanWarning)


def test_watch_resumes_when_its_next_evaluation_is_due() -> None:
    recorder = Recorder(interval="2ba")
    watching = Watch(recorder, drawing, "30ba")
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(8, 3)).square().mean().backward()
            optimizer.step()

    with attach([recorder, watching], model, optimizer) as attached:
        train(40)
        state = attached.state_dict()
        train(30)
    attached = attach([recorder, watching], model, optimizer)
    attached.load_state_dict(state)
    assert [one.updates for one in watching.moments] == [30]
    with attached:
        train(15)
        assert len(watching.moments) == 1
        train(5)
        assert len(watching.moments) == 2


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"cooldowns": [10, 20]}, r"cooldowns must be a list of shares .* \(got \[10, 20\]\); for 10 % give 0.1"),
        ({"half_lives": 0.1}, "half_lives must be a list of shares"),
        ({"half_lives": [0]}, "half_lives must be a list of shares"),
        ({"maximize": True, "minimize": True}, "must not both be True"),
        ({"evaluate": None}, "evaluate must be a function"),
    ],
)
def test_wrong_options_are_refused_before_the_first_evaluation(tmp_path, options, error) -> None:
    given = {"evaluate": drawing} | options
    with pytest.raises(PolyakError, match=error):
        Watch(Recorder(interval="2ba"), **given)
    with pytest.raises(PolyakError, match=error):
        next(watch(tmp_path, **given))


def test_watch_must_be_given_the_recorder_of_its_run(tmp_path) -> None:
    with pytest.raises(ArgumentError, match="must be the Recorder of this run"):
        Watch(str(tmp_path), drawing)


def test_watch_reads_the_shares_that_it_is_given() -> None:
    recorder = Recorder(interval="2ba")
    watching = Watch(recorder, drawing, "50ba", half_lives=[0.1], cooldowns=[0.3], metric="loss", minimize=True)
    trained([recorder, watching])
    shares = [(one.kind, one.share) for one in watching.moments[-1].readings if one.share is not None]
    assert shares == [("half_life", 0.1), ("cooldown", 0.3)]


def test_watch_refuses_an_interval_that_the_loop_does_not_count() -> None:
    recorder = Recorder(interval="2ba")
    with pytest.raises(TimeError, match="max_duration is known"):
        trained([recorder, Watch(recorder, drawing)])


def test_watch_reads_while_another_thread_trains(tmp_path) -> None:
    run = Run(tmp_path / "run", length=100)
    thread = threading.Thread(target=lambda: (run.train(100), run.finish()))
    thread.start()
    found = list(watch(run.folder, loss, "20ba", poll_s=0.01))
    thread.join()
    assert found[-1].updates == 100
    assert found[-1].get("raw") is not None


def test_there_is_space_between_very_large_metrics_of_polyak_watch(here, tmp_path, capsys) -> None:
    here.train(64)
    here.finish()
    (tmp_path / "large.py").write_text("def loss(state):\n    return 1.2345e300\n")
    assert main(["watch", "run", "--evaluate", "large.py:loss", "--minimize"]) == 0
    assert "64ba 1.234e+300" in capsys.readouterr().out.replace("1.235e", "1.234e")

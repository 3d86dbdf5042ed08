"""The loggers for Weights & Biases and MLflow, offline, read back from what these libraries wrote."""

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import loops
import mlflow
import pytest
import torch
import wandb
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from wandb.proto import wandb_internal_pb2

from polyak import (
    ArgumentError,
    CheckpointError,
    CheckpointSaver,
    Event,
    MLflowLogger,
    PolyakError,
    Trainer,
    WandBLogger,
)


@pytest.fixture(scope="module", autouse=True)
def ended() -> Any:
    """End W&B's service with the tests."""
    yield
    wandb.teardown()


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_ERROR_REPORTING": "false",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
    }.items():
        monkeypatch.setenv(name, value)
    yield
    if wandb.run is not None:  # a test that failed has left it
        wandb.run.finish()


def build(max_duration: str = "3ba", **options: Any) -> Trainer:
    torch.set_num_threads(1)
    model = loops.perceptron()
    given: dict[str, Any] = {
        "train_dataloader": DataLoader(loops.dataset(4), batch_size=loops.BATCH),
        "optimizers": torch.optim.SGD(model.parameters(), lr=0.1),
        "loss": cross_entropy,
        "progress_bar": False,
    }
    return Trainer(model, max_duration=max_duration, **(given | options))


def losses(max_duration: str) -> dict[int, float]:
    recorder = loops.Recorder()
    build(max_duration, callbacks=recorder).fit()
    return dict(enumerate(recorder.losses, 1))


# Weights & Biases


def records(path: Path) -> list[Any]:
    """Return the records of a file of W&B, which is in LevelDB's log format: blocks of 32 KiB after seven bytes."""
    data, found, at, partial = path.read_bytes(), [], 7, b""
    assert data[:4] == b":W&B"
    while at < len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        partial, at = partial + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # a whole record, or the last of its parts
            record = wandb_internal_pb2.Record()
            record.ParseFromString(partial)
            found.append(record)
            partial = b""
    return found


class Written:
    """What W&B wrote of a run, in all its files in order."""

    def __init__(self, folder: Path) -> None:
        wandb.teardown()  # waits until W&B's process has written all
        self.runs: list[Any] = []
        self.exits: list[int] = []
        self.config: dict[str, Any] = {}
        self.values: list[tuple[int, str, float]] = []
        for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
            for record in records(path):
                kind = record.WhichOneof("record_type")
                if kind == "run":
                    self.runs.append(record.run)
                    self.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
                elif kind == "exit":
                    self.exits.append(record.exit.exit_code)
                elif kind == "history":
                    items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
                    step = record.history.step.num
                    own = {name: json.loads(value) for name, value in items.items() if not name.startswith("_")}
                    self.values += [(step, name, value) for name, value in own.items()]

    def of(self, name: str) -> list[tuple[int, float]]:
        return [(step, value) for step, found, value in self.values if found == name]


@pytest.mark.slow
def test_the_wandb_logger_logs_each_metric_at_its_batch(tmp_path):
    words = ("a project", "a group", "a name", "an entity", ["a", "b"])
    logger = WandBLogger(*words, init_kwargs={"config": {"x": 3}, "dir": tmp_path})
    trainer = build("3ba", loggers=logger, eval_dataloader=DataLoader(loops.dataset(1), batch_size=loops.BATCH))
    assert logger.run is not None
    trainer.fit()
    trainer.close()
    written = Written(tmp_path)
    assert dict(written.of("train/loss")) == pytest.approx(losses("3ba"))
    assert written.of("lr") == [(1, 0.1), (2, 0.1), (3, 0.1)]
    assert [step for step, _ in written.of("eval/loss")] == [3]
    run = written.runs[0]
    assert (run.project, run.run_group, run.display_name, run.entity) == ("a project", "a group", "a name", "an entity")
    assert (sorted(run.tags), run.run_id, written.config["x"]) == (["a", "b"], logger.run_id, 3)
    assert written.exits == [0]
    assert wandb.run is None


def test_a_resumed_trainer_continues_its_wandb_run(tmp_path):
    options = {"save_folder": tmp_path / "saved", "save_interval": "2ba"}
    first = WandBLogger("p", init_kwargs={"dir": tmp_path})
    trainer = build("2ba", loggers=first, **options)
    trainer.fit()
    trainer.close()
    second = WandBLogger("p", init_kwargs={"dir": tmp_path})
    trainer = build("4ba", loggers=second, autoresume=True, **options)
    assert second.run_id == first.run_id
    trainer.fit()
    trainer.close()
    written = Written(tmp_path)
    assert {run.run_id for run in written.runs} == {first.run_id}
    assert len({run.display_name for run in written.runs}) == 1
    assert dict(written.of("train/loss")) == pytest.approx(losses("4ba"))
    anew = WandBLogger("p", init_kwargs={"dir": tmp_path})
    trainer = build("4ba", loggers=anew, load_path=tmp_path / "saved/ep0-ba2.pt", load_ignore_keys=["callbacks"])
    assert anew.run_id != first.run_id
    trainer.close()


def test_an_error_in_training_makes_the_wandb_run_a_failed_one(tmp_path):
    trainer = build(
        loggers=WandBLogger("p", init_kwargs={"dir": tmp_path}),
        callbacks=loops.Raises(Event.BATCH_END, RuntimeError("here"), batch=2),
    )
    with pytest.raises(RuntimeError, match="here"):
        trainer.fit()
    trainer.close()
    assert Written(tmp_path).exits == [1]


def test_a_wandb_run_that_the_user_has_started_is_used_and_not_ended(tmp_path):
    with wandb.init(project="mine", dir=tmp_path) as run:
        logger = WandBLogger()
        trainer = build(loggers=logger)
        assert logger.run is run
        trainer.fit()
        trainer.close()
        run.log({"more": 1.0})
        assert wandb.run is run


# MLflow


def stored(folder: Path, experiment: str = "Default") -> tuple[Any, list[Any]]:
    client = mlflow.MlflowClient(folder.as_uri())
    return client, client.search_runs([client.get_experiment_by_name(experiment).experiment_id])


def history(client: Any, run: Any, name: str) -> list[tuple[int, float]]:
    return sorted((one.step, one.value) for one in client.get_metric_history(run.info.run_id, name))


def test_the_mlflow_logger_logs_each_metric_at_its_batch(tmp_path):
    logger = MLflowLogger("an experiment", "a name", {"a": "b"}, (tmp_path / "runs").as_uri())
    trainer = build("3ba", loggers=logger, eval_dataloader=DataLoader(loops.dataset(1), batch_size=loops.BATCH))
    assert stored(tmp_path / "runs", "an experiment")[1][0].info.status == "RUNNING"
    trainer.fit()
    client, (run,) = stored(tmp_path / "runs", "an experiment")
    assert (run.info.status, run.info.run_name, run.data.tags["a"]) == ("FINISHED", "a name", "b")
    assert run.info.run_id == logger.run_id
    assert dict(history(client, run, "train/loss")) == pytest.approx(losses("3ba"))
    assert history(client, run, "lr") == [(1, 0.1), (2, 0.1), (3, 0.1)]
    assert [step for step, _ in history(client, run, "eval/loss")] == [3]
    assert mlflow.active_run() is None


def test_an_mlflow_run_has_the_name_of_the_trainers_run_and_the_experiment_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "surrounding")
    for _ in range(2):
        build(loggers=MLflowLogger(tracking_uri=tmp_path / "runs"), run_name="mine").close()
    _, runs = stored(tmp_path / "runs", "surrounding")
    assert [(run.info.run_name, run.info.status) for run in runs] == [("mine", "FINISHED")] * 2


def test_a_resumed_trainer_continues_its_mlflow_run(tmp_path):
    options = {"save_folder": tmp_path / "saved", "save_interval": "2ba"}
    error = loops.Raises(Event.BATCH_END, RuntimeError("here"), batch=3)
    trainer = build("4ba", loggers=MLflowLogger(tracking_uri=tmp_path / "runs"), callbacks=error, **options)
    with pytest.raises(RuntimeError, match="here"):
        trainer.fit()
    assert stored(tmp_path / "runs")[1][0].info.status == "FAILED"
    trainer = build("4ba", loggers=MLflowLogger(tracking_uri=tmp_path / "runs"), autoresume=True, **options)
    assert stored(tmp_path / "runs")[1][0].info.status == "RUNNING"
    trainer.fit()
    client, (run,) = stored(tmp_path / "runs")
    assert run.info.status == "FINISHED"
    found = history(client, run, "train/loss")
    assert [step for step, _ in found] == [1, 2, 3, 3, 4]
    assert dict(found) == pytest.approx(losses("4ba"))
    assert found[2] == found[3]


def test_a_second_fit_runs_in_the_same_mlflow_run(tmp_path):
    seen: list[str] = []

    class Look(CheckpointSaver):
        def run_event(self, event: Event, state: Any, logger: Any) -> None:
            if event is Event.BATCH_START:
                seen.append(stored(tmp_path / "runs")[1][0].info.status)

    trainer = build("1ba", loggers=MLflowLogger(tracking_uri=tmp_path / "runs"), callbacks=Look(tmp_path / "saved"))
    trainer.fit()
    trainer.fit(duration="1ba")
    trainer.close()
    client, (run,) = stored(tmp_path / "runs")
    assert seen == ["RUNNING", "RUNNING"]
    assert (run.info.status, [step for step, _ in history(client, run, "lr")]) == ("FINISHED", [1, 2])


def test_a_checkpoint_of_an_mlflow_run_on_another_server_is_refused_with_a_remedy(tmp_path):
    trainer = build("1ba", loggers=MLflowLogger(tracking_uri=tmp_path / "runs"))
    trainer.save_checkpoint(tmp_path / "x.pt")

    def load(**options: Any) -> Trainer:
        logger = MLflowLogger(tracking_uri=tmp_path / "others")
        return build("1ba", loggers=logger, load_path=tmp_path / "x.pt", **options)

    with pytest.raises(CheckpointError, match=r"the MLflow run of the checkpoint must be at .*tracking_uri.*callbacks"):
        load()
    load(load_ignore_keys=["callbacks"])
    assert len(stored(tmp_path / "others")[1]) == 1


# Both


@pytest.mark.parametrize(("build_logger", "extra"), [(WandBLogger, "wandb"), (MLflowLogger, "mlflow")])
def test_a_logger_without_its_library_names_the_extra(build_logger, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, extra, None)
    with pytest.raises(PolyakError, match=rf"{build_logger.__name__} needs {extra}.*pip install 'polyak\[{extra}\]'"):
        build_logger()
    with pytest.raises(ImportError):
        build_logger()


@pytest.mark.parametrize("build_logger", [WandBLogger, MLflowLogger])
def test_a_tracker_that_logs_on_all_ranks_is_refused(build_logger):
    with pytest.raises(ArgumentError, match="rank_zero_only must be True .*leave it out"):
        build_logger(rank_zero_only=False)


def test_importing_polyak_imports_no_tracker():
    code = "import polyak, sys; assert not {'wandb', 'mlflow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

"""The best checkpoints are those with the best metric, wherever libraries keep it."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from polyak import ArgumentError, CheckpointError
from polyak.checkpoints import average_checkpoints, open_checkpoint
from polyak.checkpoints.metrics import metrics_of


def torch_file(path, **content) -> str:
    torch.save({"state_dict": {"w": torch.tensor([content.pop("w", 1.0)])}, **content}, path)
    return str(path)


def lightning(path, step: int, scores: dict[str, float]) -> str:
    """Write a file as Lightning does: the state of its callback has the scores of several files."""
    state = {
        "monitor": "val_loss",
        "current_score": torch.tensor(9.0),
        "best_k_models": {f"/elsewhere/{name}": torch.tensor(score) for name, score in scores.items()},
    }
    key = "ModelCheckpoint{'monitor': 'val_loss', 'mode': 'min'}"
    return torch_file(path, global_step=step, callbacks={key: state, "EarlyStopping": {"wait_count": 3}})


def test_the_metric_of_a_name_is_known(tmp_path) -> None:
    path = torch_file(tmp_path / "epoch=3-step=90-val_loss=0.12-val/acc=-1.5e-3.ckpt".replace("/", "."))
    assert open_checkpoint(tmp_path / path).metrics == {"val_loss": 0.12, "val.acc": -0.0015}


def test_what_the_state_of_lightnings_callback_says_of_the_file_counts_more_than_the_rounded_name(tmp_path) -> None:
    name = "epoch=3-val_loss=0.12.ckpt"
    lightning(tmp_path / name, 9, {name: 0.1234, "epoch=2-val_loss=0.25.ckpt": 0.25})
    assert open_checkpoint(tmp_path / name).metrics["val_loss"] == pytest.approx(0.1234)
    lightning(tmp_path / "last.ckpt", 9, {name: 0.1234})
    assert "val_loss" not in open_checkpoint(tmp_path / "last.ckpt").metrics


def test_the_log_of_transformers_gives_the_metrics_at_the_step_of_the_checkpoint(tmp_path) -> None:
    history = [
        {"eval_loss": 3.0, "step": 100, "epoch": 1.0},
        {"loss": 1.5, "step": 200, "epoch": 2.0},
        {"eval_loss": 2.0, "eval_runtime": 1.0, "step": 200, "epoch": 2.0},
    ]
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 200, "log_history": history}))
    assert open_checkpoint(tmp_path).metrics == {"loss": 1.5, "eval_loss": 2.0, "eval_runtime": 1.0}


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16, np.int64], ids=lambda kind: kind.__name__)
def test_numbers_of_numpy_are_metrics_and_counters(tmp_path, kind) -> None:
    opened = open_checkpoint(tmp_path / torch_file(tmp_path / "it.pt", val_loss=kind(2), global_step=kind(30)))
    assert (opened.metrics, opened.moment) == ({"val_loss": 2.0}, {"ba": 30})


def test_numbers_next_to_the_weights_are_metrics_but_counters_are_not(tmp_path) -> None:
    path = torch_file(tmp_path / "it.pt", epoch=3, val_loss=0.5, train_metrics={"metrics/mAP50(B)": 0.25}, name="x")
    assert open_checkpoint(tmp_path / path).metrics == {"val_loss": 0.5, "metrics/mAP50(B)": 0.25}


@pytest.fixture
def folder(tmp_path):
    """Five checkpoints: the metric is best in the middle, and that of step 40 equals that of step 20."""
    for step, loss in ((10, 3.0), (20, 2.0), (30, 1.0), (40, 2.0), (50, 4.0)):
        torch_file(tmp_path / f"step={step}-val_loss={loss}.ckpt", w=float(step), global_step=step, acc=-loss)
    return tmp_path


def averaged(folder, **options) -> list[float]:
    made = average_checkpoints(sorted(folder.glob("*.ckpt")), folder / "out.safetensors", overwrite=True, **options)
    return [one.moment["ba"] for one in made.checkpoints]


def test_the_best_are_averaged_in_the_order_of_their_steps_and_of_equal_ones_the_newest(folder) -> None:
    assert averaged(folder, best=2, metric="val_loss") == [30, 40]
    assert load_file(folder / "out.safetensors")["w"].item() == 35
    assert averaged(folder, best=3, metric="val_loss") == [20, 30, 40]
    assert averaged(folder, best=1, metric="val_loss", maximize=True) == [50]
    assert averaged(folder, best=1, metric="acc", maximize=True) == [30]
    assert averaged(folder, best=9, metric="acc") == [10, 20, 30, 40, 50]


def test_a_log_gives_metrics_by_step_or_epoch_and_its_last_line_counts(folder) -> None:
    lines = [{"step": step, "wer": str(wer)} for step, wer in ((10, 5), (20, 4), (30, 3), (40, 2), (50, 1), (10, 0))]
    log = folder / "log.jsonl"
    log.write_text("\n".join(map(json.dumps, [{"step": 10, "lr": 0.1}, *lines])) + "\n\n")
    assert averaged(folder, best=2, metric="wer", log=log) == [10, 50]


def test_a_metric_that_is_not_there_is_refused_with_those_that_are(folder) -> None:
    with pytest.raises(ArgumentError, match=r"metric wer \(.*step=10-val_loss=3.0.ckpt has val_loss, acc\); .*--log"):
        averaged(folder, best=2, metric="wer")
    (folder / "log.jsonl").write_text('{"step": 10, "wer": 1}\n{"step": 21, "wer": 1}\n')
    with pytest.raises(ArgumentError, match=r"log.jsonl has nothing at ba 20, that of .*step=20-val_loss=2.0.ckpt\)"):
        averaged(folder, best=2, metric="wer", log=folder / "log.jsonl")
    (folder / "log.jsonl").write_text('{"step": 10, "wer": 1}\nEpoch 2\n')
    with pytest.raises(CheckpointError, match=r"log.jsonl has something else on line 2\)"):
        averaged(folder, best=2, metric="wer", log=folder / "log.jsonl")


@pytest.mark.parametrize(
    "options",
    [
        {"best": 2},
        {"metric": "val_loss"},
        {"best": 0, "metric": "val_loss"},
        {"best": 2, "last": 2, "metric": "val_loss"},
        {"best": 2, "metric": "val_loss", "weights": [1, 1, 1, 1, 1]},
    ],
    ids=str,
)
def test_the_best_need_a_metric_and_exclude_the_last_and_weights(folder, options) -> None:
    with pytest.raises(ArgumentError):
        averaged(folder, **options)


def test_nan_is_worse_than_any_metric_and_none_of_the_best(tmp_path) -> None:
    for epoch, loss in ((1, 0.5), (2, torch.nan), (3, 0.4)):
        torch.save(
            {"model": {"w": torch.full((2,), float(epoch))}, "epoch": epoch, "loss": loss}, tmp_path / f"{epoch}.pt"
        )
    paths = sorted(tmp_path.glob("*.pt"))
    made = average_checkpoints(paths, tmp_path / "two.safetensors", best=2, metric="loss")
    assert [one.path.name for one in made.checkpoints] == ["1.pt", "3.pt"]
    with pytest.raises(ArgumentError, match="best 3 must have numbers for loss .*of 3 checkpoints 2 have one"):
        average_checkpoints(paths, tmp_path / "three.safetensors", best=3, metric="loss")


def test_a_name_says_nan_and_inf_of_a_metric(tmp_path) -> None:
    found = metrics_of(tmp_path / "epoch=1-loss=nan-error=inf-info=infra.ckpt", {}, {})
    assert str(found) == "{'loss': nan, 'error': inf}"

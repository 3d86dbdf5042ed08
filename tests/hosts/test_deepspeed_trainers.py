"""An average under DeepSpeed, where Accelerate or Transformers' ``Trainer`` makes the engine."""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed_trainers as jobs
import pytest
import torch
from forked_ranks import ForkedRanks, Origin

if importlib.util.find_spec("deepspeed") is None:  # which only the ranks import
    pytest.skip("needs DeepSpeed", allow_module_level=True)
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

KINDS = ["fp32, stage 0", "bf16, zero 1", "bf16, zero 2", "bf16, zero 3"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., list[Any]]]:
    with Origin("deepspeed_trainers", "deepspeed", "accelerate", "transformers.trainer", "lightning") as origin:
        ranks = ForkedRanks(tmp_path_factory.mktemp("ranks"), origin, most=2)
        yield lambda job, *args: ranks.run(2, job, *args)
        ranks.close()


def assert_follows(found: dict[str, Any], samples: int) -> None:
    assert found["error"] < 1e-6
    assert found["moved"] > 1e-3
    assert found["harmless"]
    assert found["restored"]
    assert found["counted"] == (6, 6, samples)


@pytest.mark.parametrize("kind", KINDS)
def test_accelerate_with_deepspeed_averages_the_masters_and_resumes_exactly(run, kind, tmp_path: Path) -> None:
    results = run(jobs.accelerate_follows, kind, str(tmp_path))
    for found in results:
        assert_follows(found, 6 * 2 * 8 * 2)
        torch.testing.assert_close(*found["outputs"], rtol=2e-2, atol=2e-2)
        assert found["exported"] == []
        for name, what in {
            "backward": "a backward pass must be made with training weights",
            "save": "a checkpoint must be saved with training weights",
            "load": "a checkpoint must be loaded with training weights",
        }.items():
            assert found["refused"][name].startswith(f"LoanError: {what}"), found["refused"][name]
    for found, resumed in zip(results, run(jobs.accelerate_resumes, kind, str(tmp_path)), strict=True):
        assert resumed["updates"] == 9
        assert jobs.equal(resumed["raw"], found["raw"])
        assert jobs.equal(resumed["later"], found["later"])


@pytest.mark.parametrize(("kind", "gather"), [*((kind, True) for kind in KINDS), (KINDS[-1], False)], ids=str)
def test_a_trainer_with_deepspeed_averages_the_masters_and_resumes_exactly(run, kind, gather, tmp_path: Path) -> None:
    results = run(jobs.transformers_follows, kind, str(tmp_path), gather)
    for found in results:
        assert_follows(found, 6 * 2 * 8 * 2)
        for what in ("losses", "raw losses"):
            assert found[what][0] == pytest.approx(found[what][1], rel=2e-2)
        assert found["in training"] == pytest.approx(found["losses"][0], rel=1e-6)
        assert found["losses"][0] != found["raw losses"][0]
        assert found["saved"] == []
        assert found["names"]
        assert found["exported"]
        assert found["model"].startswith("ShardingError: one rank must have the full average")
    for found, resumed in zip(results, run(jobs.transformers_resumes, kind, str(tmp_path), gather), strict=True):
        assert resumed["updates"] == 6
        assert jobs.equal(resumed["raw"], found["raw"])
        assert jobs.equal(resumed["average"], found["average"])


def test_a_trainer_with_deepspeed_loads_the_average_of_the_best_checkpoint_and_begins_one_without(
    run, tmp_path
) -> None:
    for found in run(jobs.transformers_loads_best, "bf16, zero 2", str(tmp_path)):
        assert found["best"] == {"raw": True, "average": True, "updates": 3}
        assert found["warned"] == 1
        assert found["added"] == (2, 5, 3 * 2 * 8 * 2)  # one step did not move weights; its samples are the next's


def test_a_trainer_with_deepspeed_refuses_what_no_rank_can_do(run, tmp_path) -> None:
    for found in run(jobs.transformers_refuses, str(tmp_path)):
        assert found["recorder"].startswith("ArgumentError: the masters of an engine can be averaged by an EMA alone")
        assert found["early"].startswith("LoanError: the trainer must have begun to train")


def test_lightning_offers_deepspeed_on_gpus_alone_and_an_average_can_be_attached_to_its_engine(run, tmp_path) -> None:
    for found in run(jobs.lightning_runs, str(tmp_path)):
        assert "The DeepSpeed strategy is only supported on CUDA GPUs but `CPUAccelerator` is used" in found["on a CPU"]
        assert found["callback"].startswith("NotImplementedError: the optimizer must step the model's own parameters")
        assert found["whole", "updates"] == found["resumed", "updates"] == 6
        for what in ("raw", "average"):
            assert jobs.equal(found["whole", what], found["resumed", what])

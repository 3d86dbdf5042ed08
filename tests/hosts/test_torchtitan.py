"""An average in torchtitan's trainer: right against float64, harmless, validated, and resumed after a kill."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from waiting import END_S

pytest.importorskip("torchtitan")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SCRIPT = Path(__file__).parents[1] / "support" / "torchtitan_run.py"


def run(folder: Path, *options: str, killed: bool = False) -> dict[str, Any]:
    """Run two processes of the script; return what rank 0 has saved."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [f"--rdzv-conf=timeout={END_S},read_timeout={END_S}", str(SCRIPT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    done = subprocess.run(
        [*command, str(folder), *options], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode != 0) is killed, done.stderr[-3000:]
    return {} if killed else torch.load(folder / "end.pt", weights_only=False)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("whole"))


def test_the_average_is_right_and_training_is_as_without_it(whole, tmp_path) -> None:
    for name, reference in whole["reference"].items():
        assert (whole["average"][name].double() - reference).norm() < 1e-6 * reference.norm() + 1e-12
    assert (whole["updates"], whole["tokens"]) == (8, 8 * 2 * 2 * 32)
    plain = run(tmp_path, "--plain")
    assert equal(plain["raw"], whole["raw"])


def test_validation_has_the_average_and_the_training_weights(whole) -> None:
    found = {(step, name): value for step, name, value in whole["losses"]}
    assert {step for step, _ in found} == {1, 4, 8}
    assert found[1, "validation_metrics/loss"] == found[1, "raw_validation_metrics/loss"]
    assert found[8, "validation_metrics/loss"] > found[8, "raw_validation_metrics/loss"]  # it lags behind
    assert whole["logged"] == ["ema/decay", "ema/distance"]


def test_a_run_that_was_killed_resumes_with_the_bits_of_one_that_was_not(whole, tmp_path) -> None:
    run(tmp_path, "6", killed=True)
    resumed = run(tmp_path)
    assert equal(resumed["raw"], whole["raw"])
    assert equal(resumed["average"], whole["average"])
    assert resumed["losses"] == [one for one in whole["losses"] if one[0] == 8]

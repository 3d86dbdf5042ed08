"""Random models, loops and events with fixed seeds; ``make fuzz`` runs more, with new seeds."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import warm
from paths import ROOT

from polyak import kernels
from polyak.averaging.weights import Shadow
from tests.fuzz.cases import Case, draw
from tests.fuzz.judge import judge

PLAIN = Case(seed=1, blocks=("batch_norm",), steps=4, events=((3, "applied"),))
COUNT = 125  # other cases for each kernel


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "kernel"), [(COUNT * n, name) for n, name in enumerate(kernels.serving_cpu())])
def test_random_models_loops_and_events_give_the_averages_of_the_reference(kernel: str, seed: int) -> None:
    done = warm.run("-m", "tests.fuzz", "--kernel", kernel, "--seed", seed, "--count", COUNT, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_fuzzer_reads_the_cases_that_it_prints() -> None:
    for seed in range(50):
        assert Case.parse(str(draw(seed))) == draw(seed)


@pytest.mark.parametrize("loop", ["hooked", "by hand", "Trainer"])
def test_the_fuzzer_finds_an_average_that_moves_too_far(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(PLAIN, loop=loop)
    assert judge(case).kind == "right"
    update = Shadow.update_
    monkeypatch.setattr(Shadow, "update_", lambda self, weight: update(self, weight * 0.99))
    assert "(averaged)" in judge(case).said


def test_the_fuzzer_finds_training_weights_that_are_not_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    restore = Shadow.restore

    def leave_a_trace(self: Any) -> None:
        restore(self)
        with torch.no_grad():
            self.model.a.bias[0].add_(1e-6)

    monkeypatch.setattr(Shadow, "restore", leave_a_trace)
    assert "a.bias differs" in judge(PLAIN).said

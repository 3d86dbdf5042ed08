"""An average under Megatron-core: right against float64, harmless, and resumed under other parallelism."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import megatron_runs as runs
import pytest
import torch
from forked_ranks import ForkedRanks, Origin
from ranks import Ranks
from safetensors.torch import load_file

if importlib.util.find_spec("megatron") is None:  # which only the ranks import, with a shim
    pytest.skip("needs Megatron-core", allow_module_level=True)
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    models = "megatron.core.models.gpt.gpt_layer_specs"
    with Origin("megatron_runs", "megatron_shim", "megatron.core.optimizer", models, "polyak.hosts.megatron") as origin:
        pool = ForkedRanks(tmp_path_factory.mktemp("ranks"), origin)
        yield pool
        pool.close()


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


_FOLLOWED = dict[str, list[dict[str, Any]]]()


def followed(ranks: Ranks, kind: str) -> list[dict[str, Any]]:
    """Return what each rank found of a run in a layout."""
    if kind not in _FOLLOWED:
        _FOLLOWED[kind] = ranks.run(runs.KINDS[kind].size, runs.follows, kind)
    return _FOLLOWED[kind]


@pytest.mark.parametrize("kind", runs.FOLLOWED)
def test_the_average_is_that_of_the_masters_and_training_is_as_without_it(ranks, kind) -> None:
    results = followed(ranks, kind)
    for found in results:
        assert found["error"] < 1e-6
        assert found["moved"] > 1e-3
        messages, expected = found["messages"]
        assert messages == expected
        assert messages
        assert found["published"]
        assert found["agreed"]
        assert all(found["outputs moved"])
        assert found["outputs restored"]
        assert found["restored"]
        assert found["harmless"]
        assert found["updates"] == 6
        assert found["distance"] == pytest.approx(results[0]["distance"], rel=1e-12)
    assert any(found["outputs moved"] for found in results)


def test_the_distance_counts_each_element_once(ranks) -> None:
    first, second = (found["squares"] for found in followed(ranks, "tp 2"))
    both = [name for name in first if "norm" in name or "position" in name]
    assert both
    assert all(first[name] == pytest.approx(second.pop(name), rel=1e-6) for name in both)
    difference, length = (sum(one[i] for one in (*first.values(), *second.values())) for i in range(2))
    assert followed(ranks, "tp 2")[0]["distance"] == pytest.approx((difference / length) ** 0.5, rel=1e-4)


def test_steps_that_moved_weights_are_counted_and_no_others(ranks) -> None:
    for found in ranks.run(2, runs.counts, "dp 2, fp16"):
        assert found["made"] == [True, True]
        assert found["after 2"] == (2, 2)
        assert found["overflowed"] == [False, False]
        assert found["after an overflow"] == (2, 2)
        assert found["made later"] == [True]
        assert found["after 3"] == 3
        assert found["after detach"] == 3
        assert found["methods"] == []
        assert found["hooks"] == [0]


def test_nothing_trains_or_saves_averaged_weights(ranks, tmp_path) -> None:
    for rank, found in enumerate(ranks.run(2, runs.refuses, "dp 2", str(tmp_path))):
        for name, what in {
            "backward": "a backward pass must be made with training weights",
            "backward of before": "a backward pass must be made with training weights",
            "zero_grad": "a training step must begin with training weights",
            "step": "an optimizer step must be made with training weights",
            "save": "a checkpoint must be saved with training weights",
            "state": "a state must be taken with training weights",
            "sharded state": "a state must be taken with training weights",
            "load": "a state must be loaded with training weights",
            "second": "a model can hold one average at a time",
        }.items():
            assert found[name].startswith(f"LoanError: {what}"), (name, found[name])
        assert found["lost"] == "False"
        assert found["gradients"] == "[]"
        assert found["model"].startswith("ShardingError: one rank must have the full average")
        assert found["copy"].startswith("CopyError: one process must have the full average")
        failed = "OSError: the engine is gone" if rank == 0 else "ShardingError: all ranks must agree on publishing"
        assert found["publish"].startswith(failed), found["publish"]
        assert found["calls"] == ("1" if rank == 0 else "0")
        assert found["by hand"].startswith("ValueError: steps are counted by the engine")
        assert found["recorder"].startswith("ArgumentError: the masters of an engine can be averaged by an EMA alone")
        assert found["unwrapped"].startswith("ArgumentError: the model must be one or more chunks in megatron.core")
        assert found["torch's"].startswith("ArgumentError: the optimizer must be what get_megatron_optimizer returned")
        for name in ("plain", "plain, inner"):
            assert found[name].startswith("OptimizerError: "), found[name]
            assert "polyak.hosts.megatron" in found[name]
        refused = (
            "OptimizerError: the masters must be in memory" if rank == 0 else "ShardingError: all ranks must agree"
        )
        assert found["on one rank"].startswith(refused), found["on one rank"]
        assert "optimizer_cpu_offload" in found["on one rank"]
        assert found["offload"].startswith("OptimizerError: the masters must be in memory, in float32"), found[
            "offload"
        ]
        assert "optimizer_cpu_offload, which steps copies of the masters); turn that off" in found["offload"]
        assert found["without a master"].startswith("OptimizerError: the optimizer must step all parameters")


def gap(losses: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    return max(abs(one.item() - other.item()) for one, other in zip(losses, others, strict=True))


@pytest.mark.parametrize(("kind", "others"), runs.SAVED.items(), ids=str)
def test_a_state_and_an_export_are_those_of_the_full_model(ranks, kind, others, tmp_path) -> None:
    saved = ranks.run(runs.KINDS[kind].size, runs.saves, kind, str(tmp_path))
    averaged = load_file(tmp_path / "averaged32.safetensors")
    assert {tensor.dtype for tensor in averaged.values()} == {torch.float32}
    assert sum(found["written"] for found in saved) == sum(tensor.numel() for tensor in averaged.values())
    for other in others:
        for way in ("dcp", "megatron", *(["later"] if other == others[0] else [])):
            to = str(tmp_path / f"{other} {way}.safetensors")
            updates = ranks.run(runs.KINDS[other].size, runs.loads, other, str(tmp_path), way, to)
            assert updates == [4] * runs.KINDS[other].size
            assert equal(load_file(to), averaged)
    half = load_file(tmp_path / "averaged.safetensors")
    for found in saved:
        assert equal(found["published"], half)
    assert equal(half, {name: tensor.to(half[name].dtype) for name, tensor in averaged.items()})
    assert {half[name].dtype for name in half if not name.endswith("expert_bias")} == {torch.bfloat16}
    if kind not in {"ep 2", "pp 2, experts"}:
        file = str(tmp_path / "averaged.safetensors")
        (losses,) = ranks.run(1, runs.alone, "one, tied" if runs.KINDS[kind].tied else "one", file)
        assert gap(losses, saved[-1]["averaged"]) < 0.005 < gap(losses, saved[-1]["raw"])
        return
    assert sum(".experts." in name for name in averaged) == 2 * 4 * 2
    for stage, found in enumerate(saved if "pp" in kind else []):
        for name, buffer in found["buffers"].items():
            assert torch.equal(averaged[name.replace(".0.", f".{stage}.")], buffer)
        assert found["buffers"]


def test_a_rank_may_have_only_padding(ranks, tmp_path) -> None:
    results = ranks.run(2, runs.is_small, str(tmp_path))
    averaged = load_file(tmp_path / "averaged" / "model.safetensors")
    assert [found["parts"] for found in results] == [1, 0]
    for found in results:
        assert found["error"] < 1e-6
        assert found["updates"] == 4
        assert equal({f"0.{name}": tensor for name, tensor in averaged.items()}, found["weights"])


@pytest.mark.parametrize("kind", runs.KILLED)
def test_a_run_that_was_killed_resumes_with_the_bits_of_one_that_was_not(ranks, kind, tmp_path: Path) -> None:
    (whole := tmp_path / "whole").mkdir()
    (killed := tmp_path / "killed").mkdir()
    ranks.run(2, runs.is_killed, kind, str(whole), 99)
    with pytest.raises(AssertionError, match="a rank died"):
        ranks.run(2, runs.is_killed, kind, str(killed), 3)
    assert [path.name for path in sorted(killed.iterdir())] == ["step1", "step2", "step3"]
    ranks.run(2, runs.is_killed, kind, str(killed), 99)
    for rank in range(2):
        expected, found = (torch.load(folder / f"end {rank}.pt") for folder in (whole, killed))
        for what in ("raw", "average"):
            assert equal(found[what], expected[what])

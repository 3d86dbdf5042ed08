"""An average under DeepSpeed's engine: right against float64, harmless, and resumed on any number of ranks."""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed_runs as runs
import pytest
import torch
from forked_ranks import ForkedRanks, Origin
from safetensors.torch import load_file

if importlib.util.find_spec("deepspeed") is None:  # which only the ranks import
    pytest.skip("needs DeepSpeed", allow_module_level=True)
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


class Pools:
    """A group of processes for each world size: DeepSpeed remembers that of the first."""

    def __init__(self, folder: Path, origin: Origin) -> None:
        self._folder, self._origin, self._pools = folder, origin, dict[int, ForkedRanks]()

    def run(self, size: int, job: Callable[..., Any], *args: Any) -> list[Any]:
        if size not in self._pools:
            self._pools[size] = ForkedRanks(self._folder, self._origin, most=size)
        return self._pools[size].run(size, job, *args)

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pools]:
    with Origin("deepspeed_runs", "deepspeed", "polyak.hosts.deepspeed", "polyak.sharding.dcp") as origin:
        pools = Pools(tmp_path_factory.mktemp("ranks"), origin)
        yield pools
        pools.close()


CELLS = [(kind, size) for kind, sizes in runs.FOLLOWED.items() for size in sizes]


@pytest.mark.parametrize(("kind", "size"), CELLS, ids=str)
def test_the_average_is_that_of_the_masters_and_training_is_as_without_it(ranks, kind, size) -> None:
    results = ranks.run(size, runs.follows, kind)
    for found in results:
        assert found["error"] < 1e-6
        assert found["moved"] > 1e-3
        assert found["messages"] == []
        assert found["harmless"] == []
        assert found["restored"]
        assert found["outputs moved"]
        assert not found["reshaped"]  # what ZeRO-3 keeps gathered is gathered again
        assert found["updates"] == 6
        torch.testing.assert_close(found["output"], found["single"], rtol=2e-2, atol=2e-2)
        assert found["distance"][0] == pytest.approx(found["distance"][1], rel=1e-4)
    if size > 1 and "stage 0" not in kind:
        whole = 37 * 51 + 51 + 51 * 2 + 51 * 3 + 1
        buffers = 2
        assert sum(found["elements"] - buffers for found in results) == whole


@pytest.mark.parametrize("kind", ["bf16, zero 2", "bf16, zero 3", "fp16, stage 0"])
def test_steps_that_moved_weights_are_counted_and_no_others(ranks, kind) -> None:
    for found in ranks.run(2, runs.counts, kind):
        assert found["after 4 batches"] == (2, 2, 2 * 8 * 2 * 2)
        assert found.get("after an overflow", 2) == 2
        assert found["after detach"] == 2
        assert found["methods"] == []


@pytest.mark.parametrize("kind", ["bf16, zero 2", "bf16, zero 3"])
def test_masters_that_the_engine_moves_in_memory_are_followed(ranks, kind) -> None:
    for found in ranks.run(2, runs.moves, kind):
        assert found["error"] < 1e-6
        assert found["updates"] == 6
        if kind.endswith("2"):
            assert found["offloaded"].startswith("OptimizerError: a master must stay on its rank to be averaged")


@pytest.mark.parametrize("kind", ["bf16, zero 2", "bf16, zero 3"])
def test_nothing_trains_or_saves_averaged_weights(ranks, kind, tmp_path) -> None:
    for found in ranks.run(2, runs.refuses, kind, str(tmp_path)):
        for name, what in {
            "backward": "a backward pass must be made with training weights",
            "plain backward": "a backward pass must be made with training weights",
            "backward of the module": "a backward pass must be made with training weights",
            "step": "an optimizer step must be made with training weights",
            "save": "a checkpoint must be saved with training weights",
            "load": "a checkpoint must be loaded with training weights",
            "state": "a state must be taken with training weights",
            "second": "a model can hold one average at a time",
        }.items():
            assert found[name].startswith(f"LoanError: {what}"), (name, found[name])
        assert found["lost"] == "[]"
        assert found["gradients"] == "[]"
        assert found["model"].startswith("ShardingError: one rank must have the full average")
        assert found["copy"].startswith("CopyError: one process must have the full average")
        assert found["by hand"].startswith("ValueError: steps are counted by the engine")
        assert found["recorder"].startswith("ArgumentError: the masters of an engine can be averaged by an EMA alone")
        assert found["engine"].startswith("ArgumentError: the engine must be what deepspeed.initialize returned")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", runs.SAVED)
def test_a_checkpoint_of_the_engine_has_the_average_which_loads_on_other_ranks_too(ranks, kind, tmp_path) -> None:
    first, second = ranks.run(2, runs.saves, kind, str(tmp_path))
    for found in ranks.run(2, runs.resumes, kind, str(tmp_path)):
        assert found["updates"] == 7
        assert equal(found["later"], first["later"])
    for other, size in runs.SAVED[kind]:
        for found in ranks.run(size, runs.loads, other, str(tmp_path)):
            assert equal(found, first["saved"])
    exported, wide = (load_file(tmp_path / f"averaged{bits}.safetensors") for bits in ("", "32"))
    assert exported.keys() == wide.keys() == runs.net().state_dict().keys()
    assert equal(first["published"], exported)
    assert equal(second["published"], exported)
    for name, average in first["saved"].items():
        assert torch.equal(wide[name], average)
        assert torch.equal(exported[name], average.to(exported[name].dtype))
        assert exported[name].dtype == (torch.float32 if kind.startswith("fp32") else torch.bfloat16)
    assert wide["frozen.weight"].dtype == exported["frozen.weight"].dtype


@pytest.mark.parametrize("kind", runs.KILLED)
def test_a_run_that_was_killed_resumes_with_the_bits_of_one_that_was_not(ranks, kind, tmp_path: Path) -> None:
    (whole := tmp_path / "whole").mkdir()
    (killed := tmp_path / "killed").mkdir()
    ranks.run(2, runs.is_killed, kind, str(whole), 99)
    with pytest.raises(AssertionError, match="a rank died"):
        ranks.run(2, runs.is_killed, kind, str(killed), 3)
    assert not (killed / "end.pt").exists()
    ranks.run(2, runs.is_killed, kind, str(killed), 99)
    ends = [torch.load(folder / "end.pt") for folder in (whole, killed)]
    for what in ("raw", "average"):
        assert equal(ends[0][what], ends[1][what])

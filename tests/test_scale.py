"""The model behind ``docs/scale.md``: its output is the page, and it agrees with real records."""

import importlib.util
import json
import pickle
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyak.record import Edge, Writer
from polyak.storage.safetensors import TensorInfo
from polyak.time import Timestamp

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def scale():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        spec = importlib.util.spec_from_file_location("scale", BENCHMARKS / "scale.py")
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "scale", module)  # for its dataclasses
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def costs(scale):
    return scale.Measured.load()


def deploy(scale, costs, model, devices, **assumed):
    return scale.Deployment(model, devices, scale.Assumed(**assumed), costs)


def test_the_page_contains_the_output_of_the_script(scale, costs) -> None:
    page = scale.PAGE.read_text(encoding="utf-8")
    printed = scale.put(page, scale.blocks(scale.Assumed(), costs))
    assert printed == page, "the inputs have changed; run python benchmarks/scale.py --write"


def test_put_refuses_a_page_without_a_marker(scale) -> None:
    with pytest.raises(SystemExit, match="<!-- records --> once"):
        scale.put("# A page", {"records": ["a"]})


class CountingWriter(Writer):
    written = 0

    def _write(self, *args, **options):
        self.written += 1
        return super()._write(*args, **options)


@pytest.mark.parametrize("per_level", [1, 2, 4, None])
def test_a_simulated_record_has_as_many_files_as_a_real_one(scale, tmp_path, per_level) -> None:
    edges = [Edge(n, Timestamp().to_next_batch(steps=n)) for n in range(25)]
    tensors = {"weight": TensorInfo(torch.float32, (2,), averaged=True)}
    with CountingWriter(tmp_path, tensors, per_level=per_level) as writer:
        for one, (start, end) in zip(scale.ageing(24, per_level), pairwise(edges), strict=True):
            before = writer.written
            writer.append({"weight": torch.ones(2)}, start, end)
            assert writer.written - before == 1 + one.merges
            assert len(list(tmp_path.glob("*.safetensors"))) == one.kept


def test_a_simulated_record_writes_as_many_bytes_as_a_measured_recorder(scale) -> None:
    found = json.loads((BENCHMARKS / "results" / "recording_cost.json").read_text(encoding="utf-8"))
    appends = list(scale.ageing(21, found["per_level"]))
    assert appends[-1].kept == found["files"]
    written = sum(1 + one.merges for one in appends) * found["bytes_per_segment"]
    assert found["bytes_written"] == written
    assert found["bytes_per_segment"] == pytest.approx(2 * found["parameters"], rel=1e-2)  # float16, and a header


def test_the_models_have_the_sizes_in_their_names(scale) -> None:
    assert [model.parameters for model in scale.MODELS[:2]] == [1_235_814_400, 70_553_706_496]  # as published
    assert scale.MODELS[2].parameters == pytest.approx(1e12, rel=2e-3)


@settings(deadline=None)
@given(shards=st.integers(1, 40))
def test_the_fullest_shard_is_that_of_rank_0_under_fsdp2(scale, shards) -> None:
    model = scale.Decoder("small", layers=2, width=12, key_width=4, feed_forward=30, vocabulary=37)
    # FSDP2 splits the first dimension as torch.chunk does.
    first = [torch.empty(shape).chunk(shards)[0].numel() for shape in model.shapes]
    assert model.fullest_shard(shards) == sum(first)
    assert model.fullest_shard(shards) * shards >= model.parameters


@settings(deadline=None)
@given(power=st.integers(0, 9))
def test_the_shards_of_all_ranks_add_up_to_one_average_if_the_rows_divide_evenly(scale, costs, power) -> None:
    model = scale.Decoder("even", layers=2, width=1024, key_width=512, feed_forward=2048, vocabulary=4096)
    deployment = deploy(scale, costs, model, 2**power)
    assert deployment.average_bytes * deployment.shards == 4 * model.parameters


@settings(deadline=None)
@given(devices=st.sampled_from([8, 64, 512]), model=st.integers(0, 2))
def test_the_share_of_an_update_in_a_step_depends_neither_on_the_model_nor_on_the_devices(
    scale, costs, devices, model
) -> None:
    one = deploy(scale, costs, scale.MODELS[model], devices)
    other = deploy(scale, costs, scale.MODELS[0], 64)
    assert one.update_s() / one.step_s == pytest.approx(other.update_s() / other.step_s, rel=0.02)  # uneven rows
    replicated = deploy(scale, costs, scale.MODELS[model], 4 * devices, group=devices)
    assert replicated.update_s() / replicated.step_s == pytest.approx(4 * one.update_s() / one.step_s)


@settings(deadline=None)
@given(appends=st.lists(st.floats(0, 100), min_size=1, max_size=30), interval=st.floats(0, 200))
def test_training_waits_as_long_as_in_a_simulation_with_two_clocks(scale, appends, interval) -> None:
    now = free = waited = 0.0  # the clock of training, and when the thread is free
    for append in appends:
        now += interval
        waited += max(0.0, free - now)
        now = max(now, free)
        free = now + append
    assert scale.waits(interval, appends) == pytest.approx(waited, abs=1e-6)


@pytest.mark.parametrize("merges", [0, 1, 6])
def test_an_append_takes_as_long_as_the_slower_of_the_file_system_and_the_threads(scale, costs, merges) -> None:
    deployment = deploy(scale, costs, scale.MODELS[1], 512, operations=float("inf"))
    # A merge reads two segments and writes one.
    append_s = scale.RECORDED_BYTES * 70.554 * (1 + 3 * merges)
    assert deployment.append_s(merges, shared=1e9) == pytest.approx(append_s, rel=1e-4)
    threads = scale.RECORDED_BYTES * deployment.shard * (costs.write_s + merges * costs.merge_s)
    assert deployment.append_s(merges, shared=1e15) == pytest.approx(threads)
    slow = replace(deployment, assumed=scale.Assumed(operations=1))
    assert slow.append_s(merges, shared=1e15) == pytest.approx(threads + 513 * (1 + 5 * merges))


def test_a_run_of_the_length_in_the_table_never_waits_and_a_shorter_one_does(scale, costs) -> None:
    deployment = deploy(scale, costs, scale.MODELS[2], 512)
    worst = max(one.merges for one in scale.ageing(scale.STRETCHES, scale.PER_LEVEL))
    shortest = scale.STRETCHES * deployment.append_s(worst)
    assert deployment.waiting(shortest * 1.001) == 0 < deployment.waiting(shortest * 0.99)
    faster = replace(deployment, assumed=scale.Assumed(shared=1e12))
    assert faster.waiting(shortest / 2) == 0 < deployment.waiting(shortest / 2)


def test_a_plan_takes_as_many_bytes_as_were_counted(scale, costs) -> None:
    plans, results = scale.sent_by(16, 64)
    assert sum(map(len, plans)) / (16 * 64) == pytest.approx(costs.plan_bytes, rel=0.25)  # torch's versions differ
    made, metadata, written = scale.coordinate(plans, results)
    assert len(metadata.storage_data) == sum(len(plan.items) for plan in made) == 16 * 64
    assert pickle.loads(written).storage_data.keys() == metadata.storage_data.keys()


@pytest.mark.parametrize(
    ("value", "written"),
    [(0, "0 B"), (999.4, "999 B"), (999.6, "1 kB"), (4.943e9, "4.94 GB"), (132e12, "132 TB"), (2e18, "2,000 PB")],
)
def test_sizes_have_three_digits_and_a_fitting_unit(scale, value, written) -> None:
    assert scale.size(value) == written

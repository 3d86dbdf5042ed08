"""Which ranks hold a model and must agree on its average, and what they find out."""

import re
from typing import Any

import pytest
import torch
import uneven_ranks as jobs
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from polyak import ArgumentError, ModelParts, Record, Uniform
from polyak.averaging.agreement import sums_of_bits
from polyak.sharding import agreement

pytestmark = pytest.mark.slow  # processes of several ranks


# Parameters that differ by rank.

REMEDY = "must be a DTensor (DTensor.from_local with Shard), or be left out by policy"


@pytest.mark.parametrize("kind", ["fsdp", "fsdp, other shapes"])
def test_plain_experts_under_fsdp2_are_refused_by_name_on_all_ranks(ranks, tmp_path, kind) -> None:
    for found in ranks.run(2, jobs.tries, kind, str(tmp_path)):
        assert found.pop("changed") == "[]"
        for what, said in found.items():
            assert said.startswith(("ShardingError: all ranks must agree on the average:", "CheckpointException")), what
            if kind == "fsdp":
                assert "sum of the bits of experts: rank 0: " in said, what
                assert REMEDY in said, what
            else:
                assert "tensors experts: rank 0: (1, 4, 4) of torch.float32; rank 1: (2, 4, 4)" in said, what
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("kind", ["ddp", "ddp, compiled"])
def test_plain_experts_under_ddp_are_refused_by_name_on_all_ranks(ranks, tmp_path, kind) -> None:
    for found in ranks.run(2, jobs.tries, kind, str(tmp_path)):
        assert found.pop("changed") == "[]"
        for what in ("swap", "export"):
            assert "sum of the bits of experts: rank 0: " in found[what], what
            assert REMEDY in found[what], what
        for what in ("state", "save", "state before", "record"):
            assert "['experts'], which DistributedDataParallel ignores" in found[what], what
            assert "make each a DTensor" in found[what], what
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_rank_can_save_the_state_of_a_model_under_ddp_alone(ranks) -> None:
    assert ranks.run(2, jobs.saves_alone) == [3, None]


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_experts_that_the_policy_leaves_out_are_no_obstacle(ranks, tmp_path, kind) -> None:
    for names in ranks.run(2, jobs.leaves_them_out, kind, str(tmp_path)):
        assert "inp.weight" in names
        assert "experts" not in names


@pytest.mark.parametrize("kind", ["fsdp, frozen", "ddp, frozen"])
def test_frozen_experts_are_refused_by_an_export_which_would_write_those_of_rank_0(ranks, tmp_path, kind) -> None:
    for found in ranks.run(2, jobs.tries, kind, str(tmp_path)):
        assert "sum of the bits of experts: rank 0: " in found["export"]
        assert {found[what] for what in ("swap", "state", "save", "record")} == {"nothing"}
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("kind", ["fsdp, dtensor", "ddp, dtensor"])
def test_experts_as_dtensors_are_saved_exported_and_recorded_whole(ranks, tmp_path, kind) -> None:
    first, other = ranks.run(2, jobs.are_parts, kind, str(tmp_path))
    assert first == {"averaged": [4, 4, 4], "exported": [4, 4, 4], "recorded": [4, 4, 4]}
    assert other == {"averaged": [4, 4, 4]}


def test_a_record_refuses_experts_that_are_equal_at_first_and_differ_later(ranks, tmp_path) -> None:
    for said in ranks.run(2, jobs.drift_apart, str(tmp_path / "record")):
        assert said[:3] == ["nothing"] * 3
        assert "sum of the bits of experts: rank 0: " in said[3]


def test_experts_in_another_order_are_distinguished(ranks) -> None:
    for said in ranks.run(2, jobs.hold_the_same_rows_in_another_order):
        assert "sum of the bits of experts: rank 0: " in said


@pytest.mark.parametrize("kind", ["fsdp", "ddp", "fsdp, numbers", "ddp, numbers"])
def test_declared_experts_are_swapped_saved_exported_and_recorded_as_those_of_the_full_model(
    ranks, tmp_path, kind
) -> None:
    first, second = ranks.run(2, jobs.declares, kind, str(tmp_path))
    assert first["distance"] == second["distance"] > 0
    assert first["distance"] == pytest.approx(first["found distance"], rel=1e-5)
    exported = load_file(tmp_path / "export/model.safetensors")
    mean = Record(tmp_path / "record").average(Uniform())
    assert exported.keys() == mean.keys()
    for rank, (averages, read) in enumerate(zip(first["averages"], first["read"], strict=True)):
        for name in read:
            if "numbers" in kind:
                _, number, rest = name.split(".", 2)
                there = f"experts.{2 * rank + int(number)}.{rest}"
                found, recorded = exported[there], mean[there]
            else:
                found, recorded = exported[name].chunk(2)[rank], mean[name].chunk(2)[rank]
            assert torch.equal(found, averages[name]), name
            assert torch.equal(recorded, read[name]), name


def test_the_state_of_a_bema_of_declared_experts_is_refused(ranks) -> None:
    for said in ranks.run(2, jobs.bema_of_experts):
        assert "must be averaged in one buffer to be saved" in said


def test_each_rank_reads_its_shards_of_a_record_with_the_bits_of_one_process(ranks, tmp_path) -> None:
    for *unequal, said in ranks.run(2, jobs.reads_its_shards, str(tmp_path / "record")):
        assert unequal == []
        assert said.startswith("MismatchError: the model must have the recorded tensors")


def test_experts_that_do_not_fit_together_are_refused_on_all_ranks(ranks) -> None:
    for found in ranks.run(2, jobs.declares_wrongly):
        assert "same names and shapes, or numbers on each rank" in found["shapes"]
        assert "same names and shapes, or numbers on each rank" in found["one"]
        assert "each expert must be on one rank of the mesh (got ['0'] twice)" in found["numbers"]
        assert "there are 2 child modules and 1 numbers" in found["count"]
        assert "have no dimension 1" in found["dim"]
        assert "a mesh of one dimension (got 2)" in found["mesh"]
        assert "['weight', 'bias'] are DTensors, which need no declaration" in found["sharded"]


# Models on part of the ranks.


@pytest.mark.parametrize("kind", ["1-d", "2-d", "2-d, one copy", "ddp"])
def test_a_model_on_part_of_the_ranks_needs_no_others(ranks, tmp_path, kind) -> None:
    idle, *found = ranks.run(3, jobs.on_part, kind, str(tmp_path))
    assert idle == {}
    for one in found:
        assert one["ranks"] == [1, 2]
        assert one["replicas"] == (kind == "ddp")
    shapes = {"0.weight": [5, 4], "0.bias": [5], "2.weight": [3, 5], "2.bias": [3]}
    assert {name: found[0]["whole"][name] for name in shapes} == shapes
    if kind != "ddp":
        assert {name: found[1]["whole"][name] for name in shapes} == {name: [0] for name in shapes}


def test_two_models_side_by_side_do_not_wait_for_each_other(ranks, tmp_path) -> None:
    for rank, found in enumerate(ranks.run(4, jobs.side_by_side, str(tmp_path))):
        assert found == {"ranks": [[0, 1], [2, 3]][rank // 2], "replicas": rank > 1}


def test_a_separate_group_can_be_made_again_by_ranks_that_are_in_other_groups_too(ranks) -> None:
    assert ranks.run(3, jobs.makes_groups, 6) == [[], [3] * 6, [3] * 6]


@pytest.mark.parametrize("kind", ["crossing", "one in another"])
def test_ranks_of_several_meshes_are_all_that_hold_the_model(ranks, kind) -> None:
    assert ranks.run(4, jobs.crossing, kind) == [([0, 1, 2, 3], [10, 11, 12, 13])] * 4


def test_meshes_that_no_rank_connects_are_refused_on_all_ranks(ranks) -> None:
    *said, outside = ranks.run(4, jobs.crossing, "apart")
    assert outside is None
    assert all("ShardingError: the meshes of a model must be connected" in one for one in said)


def test_the_ranks_of_parts_are_those_of_their_ddp(ranks) -> None:
    assert ranks.run(2, jobs.has_parts_in_ddp) == [([0, 1], True)] * 2


# Pipelines.


@pytest.mark.parametrize(
    ("kind", "size"), [("plain", 2), ("ddp", 4), ("fsdp", 4), ("several parts", 2), ("by hand", 2), ("tied", 2)]
)
def test_stages_of_a_pipeline_swap_save_export_and_record_one_model(ranks, tmp_path, kind, size) -> None:
    first, *others = ranks.run(size, jobs.is_a_stage, kind, str(tmp_path))
    assert all(one["distance"] == first["distance"] > 0 for one in others)
    names = {
        *(f"block{i}.layer.{name}" for i in range(4) for name in ("weight", "bias")),
        *(f"block{i}.norm.{name}" for i in (1, 3) for name in ("weight", "bias")),
        *(f"block{i}.norm.{name}" for i in (1, 3) for name in ("running_mean", "running_var", "num_batches_tracked")),
    }
    tied = {"shared.weight", "shared.bias"} if kind == "tied" else set()  # frozen
    averages = first["averages"]
    assert averages.keys() == names
    for file in ("export/model.safetensors", "model.safetensors"):
        exported = load_file(tmp_path / file)
        assert exported.keys() == names | tied
        assert [n for n in names if not torch.equal(exported[n], averages[n].to(exported[n].dtype))] == []
    record = Record(tmp_path / "record")
    assert record.tensors.keys() == record.raw_weights().keys() == names
    mean = record.average(Uniform())
    for name, expected in first["means"].items():
        assert torch.allclose(mean[name].double(), expected, rtol=1e-6, atol=1e-7), name


@pytest.mark.parametrize(("kind", "size"), [("same names", 2), ("same names, fsdp", 4)])
def test_stages_with_the_same_names_are_refused_on_all_ranks_until_they_have_prefixes(
    ranks, tmp_path, kind, size
) -> None:
    for found in ranks.run(size, jobs.has_stages_of_the_same_names, kind, str(tmp_path)):
        assert found.pop("with a prefix") == "nothing"
        for what, said in found.items():
            assert "each stage of a pipeline must have other names (got ['0.layer.bias', " in said, what
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export"]
    assert len(load_file(tmp_path / "export/model.safetensors")) == 18


def test_a_swap_is_refused_on_all_stages_if_one_has_made_another_update(ranks) -> None:
    for said in ranks.run(2, jobs.stages_differ_in_updates):
        assert "number of updates: rank 0: 2; rank 1: 3" in said


def test_a_swap_is_refused_on_all_stages_if_one_has_not_begun_to_average(ranks) -> None:
    for before, one, both in ranks.run(2, jobs.one_stage_begins_later):
        assert "averaging has begun: rank 0: True; rank 1: False" in one
        assert "number of updates: rank 0: 1; rank 1: 0" in both
        assert before == "nothing"


def test_the_parts_of_a_model_must_have_different_names() -> None:
    with pytest.raises(ArgumentError, match=r"different names \(got \['bias', 'weight'\] in parts 0 and 1\)"):
        ModelParts(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
    with pytest.raises(ArgumentError, match="one or more modules"):
        ModelParts()


# What one rank refuses.


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
@pytest.mark.parametrize(
    ("what", "where", "on_others"),
    [
        ("export to a folder", "ExistsError: .* which is not", "the export:\n  error: rank 1: Exists"),
        ("beginning", "", "averaging has begun: rank 1: False; ranks 0, 2: True"),
        (
            "a tensor",
            "MismatchError: .*\n.* 2.bias",
            "the average:\n  error: rank 1: MismatchError.*; ranks 0, 2: nothing",
        ),
        ("another average", "", "swapped in: rank 1: another; ranks 0, 2: nothing"),
    ],
)
def test_what_one_rank_refuses_all_ranks_refuse(ranks, tmp_path, kind, what, where, on_others) -> None:
    for rank, (said, again, same) in enumerate(ranks.run(3, jobs.one_refuses, what, kind, str(tmp_path))):
        assert re.search(where if rank == 1 and where else on_others, said, re.DOTALL), said
        assert again in {"", "nothing"}
        assert same


@pytest.mark.parametrize(
    ("what", "kind"),
    [
        *(("applied", kind) for kind in ("fsdp", "ddp", "pipeline")),
        *(("state", kind) for kind in ("fsdp", "pipeline")),
        ("metrics", "ddp"),
        ("publish", "fsdp"),
    ],
)
def test_another_average_on_one_rank_is_an_error_on_all_ranks_and_nothing_waits(ranks, what, kind) -> None:
    size = 2 if kind == "pipeline" else 3
    for rank, (first, again) in enumerate(ranks.run(size, jobs.one_rank_holds_another_average, what, kind)):
        if what in {"applied", "metrics"} and rank == 1:
            assert first.startswith("LoanError: "), first
        else:
            assert first.startswith("ShardingError: all ranks must agree on "), first
            assert "rank 1: " in first
        assert again == "nothing"


# Publishing.


@pytest.mark.parametrize(("kind", "size"), [("plain", 2), ("ddp", 4), ("fsdp", 4), ("several parts", 2), ("tied", 2)])
def test_the_average_of_all_stages_is_published_under_the_names_of_the_full_model(ranks, tmp_path, kind, size) -> None:
    _is_published(ranks.run(size, jobs.publishes_a_stage, kind, str(tmp_path)), "block3.norm.running_var")


@pytest.mark.parametrize("kind", ["fsdp", "ddp", "fsdp, numbers", "ddp, numbers"])
def test_the_average_of_declared_experts_is_published_as_that_of_the_full_model(ranks, tmp_path, kind) -> None:
    found = ranks.run(2, jobs.publishes_experts, kind, str(tmp_path))
    _is_published(found, "experts.3.1.running_var" if "numbers" in kind else "experts.up")
    if "numbers" not in kind:
        assert found[0]["rank 0"]["experts.up"].shape == (4, jobs.D, jobs.D)


def _is_published(found: list[dict[str, Any]], name: str) -> None:
    for rank, one in enumerate(found):
        want = one["exported"]
        assert name in want
        assert one["every rank"].keys() == want.keys()
        assert [n for n in want if not torch.equal(one["every rank"][n], want[n])] == []
        assert list(one["every rank"]) == list(found[0]["every rank"])
        assert one["rank 0"].keys() == (want.keys() if rank == 0 else set())
        assert "the engine is gone" in one["error"]
        assert one["calls"] == 3
        assert one["restored"]
    assert [n for n, tensor in found[0]["rank 0"].items() if not torch.equal(tensor, found[0]["exported"][n])] == []


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_experts_that_were_not_declared_are_not_published(ranks, kind) -> None:
    for said in ranks.run(2, jobs.publishes_undeclared_experts, kind):
        assert "sum of the bits of experts: rank 0: " in said


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_an_export_that_the_disk_refuses_fails_on_all_ranks_and_can_be_tried_again(ranks, tmp_path, kind) -> None:
    for rank, (said, again, same) in enumerate(ranks.run(3, jobs.one_refuses, "a full disk", kind, str(tmp_path))):
        assert "No space left on device" in said
        assert ("rank 0 must succeed for all ranks" in said) == (rank > 0)
        assert again == "nothing"
        assert same
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.complex64, torch.complex128, torch.int64]


@pytest.mark.parametrize("shape", [(), (3,), (3, 2), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn, torch.uint8], ids=str)
def test_checksums_follow_bits_and_their_order_and_change_nothing(dtype, shape) -> None:
    tensor = torch.arange(1, 1 + torch.Size(shape).numel()).reshape(shape).float().to(dtype)
    before = tensor.clone()
    checksum = sums_of_bits({"": tensor})[""]
    assert torch.equal(tensor.view(torch.uint8) if shape else tensor, before.view(torch.uint8) if shape else before)
    assert sums_of_bits({"": before})[""] == checksum
    if len(shape) > 1:
        laid_out_otherwise = tensor.transpose(0, -1).contiguous().transpose(0, -1)
        assert sums_of_bits({"": laid_out_otherwise})[""] == checksum
        assert sums_of_bits({"": tensor[[1, 0, *range(2, shape[0])]]})[""] != checksum
    other = before.flatten()
    other[-1] = 9
    assert sums_of_bits({"": other.reshape(shape)})[""] != checksum


def test_checksums_of_many_tensors_are_read_together_since_each_read_waits_for_a_device() -> None:
    reads = list[str]()

    class Notes(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            reads.extend([str(function)] * (function is torch.ops.aten._local_scalar_dense.default))
            return function(*args, **(kwargs or {}))

    with Notes():
        sums_of_bits({name: torch.ones(3, 2) for name in "abc"})
    assert reads == []


def test_checksums_of_nothing_and_of_empty_tensors_are_zero() -> None:
    assert sums_of_bits({}) == {}
    assert sums_of_bits({"": torch.empty(0, 3)}) == {"": 0}


# Agreement.


def exchanged(facts: list[dict[str, object]]) -> tuple[list[str], int]:
    """Return the lines that ranks print, and the most characters that one of them sends."""
    flat = [agreement.flat(one) for one in facts]
    sums = torch.stack([agreement.digests(one) for one in flat])
    buckets = (sums != sums[0]).any(0).nonzero().flatten().tolist()[: agreement.MOST_FACTS]
    said = [agreement.in_buckets(one, buckets) for one in flat]
    return agreement.differences(said, range(len(facts))), max(len(str(one)) for one in said)


def test_facts_in_another_order_are_the_same() -> None:
    one, other = {"a": 1, "tensors": {"x": 2, "y": 3}}, {"tensors": {"y": 3, "x": 2}, "a": 1}
    assert agreement.digest(agreement.flat(one)) == agreement.digest(agreement.flat(other))
    assert exchanged([one, other]) == ([], 2)


def test_ranks_in_a_row_are_printed_as_a_range() -> None:
    lines, _ = exchanged([{"step": 7 if rank in {3, 5} else 8} for rank in range(12)])
    assert lines == ["  step: ranks 3, 5: 7; ranks 0-2, 4, 6-11: 8"]


def test_what_ranks_send_and_print_is_bounded_where_thousands_differ_in_everything() -> None:
    tensors = {f"layers.{i}.weight": "x" * 500 for i in range(2000)}
    facts = [
        {"step": rank, "tensors": {name: f"{rank}{value}" for name, value in tensors.items()}} for rank in range(8)
    ]
    lines, characters = exchanged(facts)
    assert lines[0].startswith("  step: rank 0: 0; rank 1: 1; rank 2: 2; rank 7: 7; 4 other values on the rest")
    assert len(lines) <= 2 + agreement.MOST_FACTS
    assert max(map(len, lines)) < 1200
    assert characters < 12_000


def test_the_ranks_that_are_printed_are_bounded_where_every_other_one_differs() -> None:
    (line,), _ = exchanged([{"step": rank % 2} for rank in range(1000)])
    assert line.startswith("  step: ranks 0, 2, 4,")
    assert line.endswith("19, 21, 23, and 488 more: 1")
    assert len(line) < 150


def test_only_the_facts_that_differ_are_sent() -> None:
    tensors = {f"layers.{i}.weight": str(i) for i in range(2000)}
    lines, characters = exchanged([{"tensors": tensors}, {"tensors": tensors | {"layers.7.weight": "8"}}])
    assert lines == ["  tensors layers.7.weight: rank 0: 7; rank 1: 8"]
    assert characters < 500


def test_a_difference_in_the_middle_of_a_long_value_is_told() -> None:
    lines, _ = exchanged([{"plan": "a" * 300}, {"plan": "a" * 150 + "b" + "a" * 149}])
    assert len(lines) == 1
    assert lines[0].count(" ... ") == 2

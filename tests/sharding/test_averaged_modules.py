"""``ema.model`` under FSDP2 and tensor parallelism: what it computes, in a training step, and over which memory."""

from types import SimpleNamespace

import averaged_modules as jobs
import pytest
import sharded

from polyak import ShardingError
from polyak.sharding import fsdp

pytestmark = pytest.mark.slow  # processes of several ranks

FSDP = [kind for kind in sharded.KINDS if "fsdp" in kind]
KINDS = [(kind, max(sharded.KINDS[kind])) for kind in [*FSDP, "hsdp", "tp", "ddp, divided average"]]


@pytest.mark.parametrize(("kind", "size"), KINDS, ids=str)
def test_the_averaged_module_computes_what_the_model_with_the_average_does_after_each_update(ranks, kind, size) -> None:
    for found in ranks.run(size, jobs.computes, kind):
        assert found["apart"] == [0.0] * jobs.STEPS
        assert min(found["moved"]) > 1e-3
        assert found["wrong"] == []
        assert found["elsewhere"] == 0
        assert found["requires a gradient"] is False
        assert found["state"] == []


def test_the_float32_average_of_a_bfloat16_model_computes_in_the_dtype_of_the_policy(ranks) -> None:
    assert ranks.run(2, jobs.has_16_bits) == [[True] * 5] * 2


@pytest.mark.parametrize(
    "kind", ["fsdp, blocks", "fsdp, bfloat16", "fsdp, kept whole", "fsdp and tp", "ddp, divided average"]
)
def test_a_student_of_the_averaged_module_gets_the_bits_of_one_of_the_swapped_model(ranks, kind) -> None:
    size = min(sharded.KINDS[kind])
    learned, want, read, alone = (ranks.run(size, jobs.learns, kind, how)[0] for how in HOW)
    for one, other in zip(learned, want, strict=True):
        assert sharded.unequal(one, other) == []
    assert sharded.unequal(read[0], alone[0]) == []
    assert sharded.unequal(read[0], learned[0]) != []


HOW = ("module", "swap", "read", "without polyak")


@pytest.mark.parametrize("kind", ["fsdp, blocks", "fsdp, from meta"])
def test_the_averaged_module_of_a_resumed_run_is_that_of_the_saved_one(ranks, tmp_path, kind) -> None:
    for found in ranks.run(min(sharded.KINDS[kind]), jobs.resumes, kind, str(tmp_path)):
        assert found == {"loaded": [True, True], "trained on": [True, True]}


@pytest.mark.parametrize("kind", ["fsdp, blocks", "tp"])
def test_the_averaged_module_compiled_has_the_bits_of_the_plain_one_and_follows_updates(ranks, kind) -> None:
    assert ranks.run(2, jobs.is_compiled, kind) == [[True] * 3] * 2


@pytest.mark.parametrize("kind", ["fsdp", "fsdp, blocks"])
def test_a_forward_pass_of_the_averaged_module_after_one_that_failed_sees_the_average(ranks, kind) -> None:
    assert ranks.run(2, jobs.fails, kind) == [[True] * 2] * 2


def test_the_averaged_module_is_gathered_as_the_model_is_with_all_arguments_of_fully_shard(ranks) -> None:
    for found in ranks.run(2, jobs.other_calls):
        assert found["equal"] == [True] * 4
        assert found["placements"] == ["(Shard(dim=1),)", False]
        assert found["tied"]
        assert found["frozen"]
        assert found["hooks of the user"]


def test_the_script_of_a_teacher_under_fsdp2_runs_on_two_ranks(ranks) -> None:
    ranks.run(2, jobs.run_as_on_the_page, "docs/scripts/teachers.md")


def state(**changed: object) -> SimpleNamespace:
    mesh = SimpleNamespace(**{"mesh": "a mesh", "is_spmd_mesh": False, "shard_mesh_dim": 0} | changed)
    group = SimpleNamespace(mesh_info=mesh, fsdp_params=[])
    return SimpleNamespace(_fsdp_param_groups=[group], _modules=(), _mp_policy=None)


def test_a_model_under_calls_of_fully_shard_that_cannot_be_repeated_is_refused_by_name() -> None:
    assert fsdp._unit(state()).mesh == "a mesh"
    two = state()
    two._fsdp_param_groups *= 2
    for one, name in (
        (state(is_spmd_mesh=True), "dp_mesh_dims"),
        (state(shard_mesh_dim=None), r"replicate\(\)"),
        (two, "several meshes in one call"),
    ):
        with pytest.raises(
            ShardingError, match=rf"needs a model of plain calls of fully_shard \(got {name}\); use applied"
        ):
            fsdp._unit(one)

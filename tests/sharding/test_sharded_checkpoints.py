import pytest
import sharded
import torch

pytestmark = pytest.mark.slow  # processes of several ranks


# DDP on two ranks: of three, the order in which gradients are summed depends on how often DDP has laid out its buckets.
@pytest.mark.parametrize(("kind", "size"), [(kind, min(sizes)) for kind, sizes in sharded.KINDS.items()], ids=str)
def test_a_run_resumed_by_dcp_is_as_if_it_had_not_stopped(ranks, tmp_path, kind, size) -> None:
    resumes(ranks, tmp_path, kind, size, 4)


@pytest.mark.parametrize("kind", ["ddp", "ddp, divided average", "fsdp, blocks", "fsdp, offloaded average", "tp"])
def test_a_run_resumed_by_dcp_before_averaging_begins_is_as_if_it_had_not_stopped(ranks, tmp_path, kind) -> None:
    resumes(ranks, tmp_path, kind, 2, 1)


def resumes(ranks, tmp_path, kind, size, steps) -> None:
    whole = ranks.run(size, sharded.saves, kind, str(tmp_path), None, steps)
    for saved, resumed in zip(whole, ranks.run(size, sharded.loads, kind, str(tmp_path), None, steps), strict=True):
        for one, other in zip(saved[:3], resumed[:3], strict=True):
            assert sharded.unequal(one, other) == []
        assert saved[3] == resumed[3] == steps + 3


@pytest.mark.parametrize(
    ("before", "after", "dtype"),
    [(1, 4, None), (4, 2, torch.bfloat16), (2, 3, None), (3, 4, torch.bfloat16), (4, 1, None)],
    ids=str,
)
def test_a_state_of_n_ranks_loads_on_m_bit_for_bit(ranks, tmp_path, before, after, dtype) -> None:
    saved = ranks.run(before, sharded.saves, "fsdp, blocks", str(tmp_path), dtype, 4)[0][0]
    for loaded in ranks.run(after, sharded.loads, "fsdp, blocks", str(tmp_path), dtype, 4):
        assert sharded.unequal(saved, loaded[0]) == []
        assert sharded.unequal(saved, loaded[2]) != []


def test_a_state_goes_from_one_parallelism_to_another(ranks, tmp_path) -> None:
    saved = ranks.run(2, sharded.saves, "ddp", str(tmp_path), None, 4)[0][0]
    for kind, size in (("fsdp", 3), ("ddp, divided average", 2), ("hsdp", 4), ("tp", 2)):
        assert sharded.unequal(saved, ranks.run(size, sharded.loads, kind, str(tmp_path), None, 4)[0][0]) == []


def test_what_is_saved_asynchronously_is_of_the_moment_of_the_call(ranks, tmp_path) -> None:
    saved = ranks.run(2, sharded.saves, "fsdp, blocks", str(tmp_path), None, 4, True)[0]
    loaded = ranks.run(2, sharded.loads, "fsdp, blocks", str(tmp_path), None, 4)[0]
    assert sharded.unequal(saved[0], loaded[0]) == []
    assert sharded.unequal(saved[2], loaded[2]) == []

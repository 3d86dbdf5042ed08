import pytest
import sharded
import torch
from ranks import Ranks

pytestmark = pytest.mark.slow  # processes of several ranks

CELLS = [(kind, size) for kind, sizes in sharded.KINDS.items() for size in sizes]


@pytest.mark.parametrize(("kind", "size"), CELLS, ids=str)
def test_a_sharded_average_is_that_of_the_whole_model_bit_for_bit(ranks, kind, size) -> None:
    follows_the_whole(ranks, kind, size, None)


@pytest.mark.parametrize(
    "kind", ["ddp", "ddp, divided average", "fsdp, blocks", "fsdp, bfloat16", "fsdp, offloaded average", "tp"]
)
def test_a_sharded_average_in_bfloat16_is_that_of_the_whole_model_bit_for_bit(ranks, kind) -> None:
    follows_the_whole(ranks, kind, 2, torch.bfloat16)


def follows_the_whole(ranks, kind, size, dtype) -> None:
    for found in ranks.run(size, sharded.follows_the_whole, kind, dtype):
        assert found["averages"] == []
        assert found["lent"] == []
        assert found["kept"] == []
        assert found["held"] == []
        assert found["restored"] == []
        assert found["moved by the swap"] > 1e-4
        assert found["distance"] == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize(("kind", "size"), [cell for cell in CELLS if cell[1] == max(sharded.KINDS[cell[0]])], ids=str)
def test_training_after_swaps_is_as_without_them(ranks, kind, size) -> None:
    for one, other in ranks.run(size, sharded.trains, kind):
        assert sharded.unequal(one, other) == []


@pytest.mark.parametrize(("kind", "size"), [cell for cell in CELLS if cell[1] == max(sharded.KINDS[cell[0]])], ids=str)
def test_an_update_sends_no_message_and_a_swap_does(ranks, kind, size) -> None:
    for update, swap in ranks.run(size, sharded.communicates, kind):
        assert update == 0
        assert swap > 0


def test_under_ddp_the_averages_of_all_ranks_are_equal_bit_for_bit(ranks) -> None:
    first, *others = ranks.run(3, sharded.is_interrupted, "ddp", False)
    for other in others:
        assert sharded.unequal(first[1], other[1]) == []


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", ["fsdp, blocks", "ddp, divided average"])
def test_a_rank_keeps_the_average_of_its_share_alone(ranks, kind, size) -> None:
    shares = ranks.run(size, sharded.shares, kind)
    buffers = 2 * 51 * 4 + 8
    for own, shards, whole in shares:
        assert (
            own <= -(-whole // size) + 4 * (37 + 51 + 3 + 3) + buffers
        )  # a row more of each, where rows do not divide
        if kind == "fsdp, blocks":
            assert own == shards + buffers


@pytest.mark.parametrize(
    ("about", "says"),
    [
        ("steps", "number of updates: rank 1: 1; ranks 0, 2: 2"),
        ("tensors", "tensors scale: rank 1: nothing; ranks 0, 2: (1,) of torch.float32"),
        ("profile", "algorithm: rank 1: EMA(profile=HalfLife(span=Time(3, 'ba')"),
        ("nan", "tensors with NaN or inf: rank 1: 1; ranks 0, 2: 0"),
        ("values", "sum of the bits of second.weight: rank 1: "),
        ("beginning", "averaging has begun: rank 1: False; ranks 0, 2: True"),
    ],
)
def test_ranks_that_disagree_are_told_on_each_who_and_what(ranks, about, says) -> None:
    for raised in ranks.attempt(3, sharded.disagrees, about):
        assert "ShardingError: all ranks must agree on the average" in raised.text
        assert says in raised.text


def test_nan_in_one_shard_is_known_to_all_ranks(ranks) -> None:
    for warning, saved in ranks.run(3, sharded.sees_a_nan_in_one_shard):
        assert "1 tensors with NaN or inf came in (by rank: [0, 1, 0])" in warning
        assert saved == "1"


@pytest.mark.parametrize(("kind", "size"), [cell for cell in CELLS if cell[1] == min(sharded.KINDS[cell[0]])], ids=str)
def test_an_evaluation_that_fails_leaves_training_as_it_was(ranks, kind, size) -> None:
    for one, other in ranks.run(size, sharded.interrupted_or_not, kind):
        assert sharded.unequal(one[0], other[0]) == []
        assert sharded.unequal(one[1], other[1]) == []


@pytest.mark.parametrize("kind", ["ddp", "tp"])
def test_a_module_over_the_average_teaches_where_ranks_have_full_layers_or_tensor_parallel_ones(ranks, kind) -> None:
    for found in ranks.run(2, sharded.teaches, kind):
        assert found["apart"] < 1e-6
        assert found["moved"] > 1e-4


def test_a_separate_group_can_be_made_again(ranks) -> None:
    assert ranks.run(3, sharded.makes_separate_groups, 20) == [[3] * 20] * 3


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("kind", [kind for kind, sizes in sharded.KINDS.items() if 2 in sizes])
def test_a_sharded_average_is_that_of_the_whole_model_over_nccl(tmp_path, kind) -> None:
    made = Ranks(tmp_path, most=2, backend="nccl")
    try:
        for found in made.run(2, sharded.follows_the_whole, kind, None):
            assert found["averages"] == found["lent"] == found["kept"] == found["held"] == found["restored"] == []
    finally:
        made.close()

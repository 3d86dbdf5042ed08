from functools import partial

import distributed_runs as runs
import loops
import pytest
import torch
from ranks import Ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    made = Ranks(tmp_path_factory.mktemp("ranks"), most=3)
    yield made
    made.close()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of one process, in which each batch is that of all ranks."""
    return runs.trains(None, tmp_path_factory.mktemp("alone"))


def close(one, other) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


CELLS = [(kind, size) for kind in runs.KINDS for size in (2, 3)]


@pytest.mark.parametrize(("kind", "size"), CELLS, ids=str)
def test_a_run_of_several_ranks_is_that_of_one(ranks, alone, tmp_path, kind, size) -> None:
    found = ranks.run(size, partial(runs.trains, kind, tmp_path))
    for one in found:
        assert loops.differences({**found[0], "log": []}, {**one, "log": []}) == []
        assert {**one["clock"], "total_wct": 0} == {**alone["clock"], "total_wct": 0}
        for what in ("weights", "averages", "losses", "metrics"):
            close(one[what], alone[what])
    assert len({one["clock"]["total_wct"] for one in found}) == 1
    close(found[0]["log"], alone["log"])
    assert not list(tmp_path.rglob("*.draft"))


@pytest.mark.parametrize("kind", runs.KINDS)
def test_a_resumed_run_of_several_ranks_equals_one_that_never_stopped(ranks, tmp_path, kind) -> None:
    found = ranks.run(2, partial(runs.resumes, kind, tmp_path, noisy=True))
    assert found == [{}, {}]


def test_an_average_under_fsdp2_is_that_of_the_whole_weights_bit_for_bit(ranks, tmp_path) -> None:
    assert ranks.run(3, partial(runs.follows_itself, tmp_path)) == [[], [], []]


MOVES = [
    ("ddp", 2, "fsdp2", 3),
    ("fsdp2", 3, "ddp", 2),
    ("fsdp2", 2, "fsdp2", 3),
    ("fsdp2", 3, None, 1),
    ("ddp, divided average", 3, "fsdp2", 2),
    (None, 1, "fsdp2", 2),
    (None, 1, "ddp", 2),
    ("ddp", 3, None, 1),
]


@pytest.mark.parametrize(("kind", "size", "other", "other_size"), MOVES, ids=str)
def test_a_run_goes_on_under_another_parallelism_and_number_of_ranks(
    ranks, tmp_path, kind, size, other, other_size
) -> None:
    def run(size, job):
        return [job()] if size == 1 else ranks.run(size, job)

    path = tmp_path / "saved"
    first = run(size, partial(runs.saves, kind, path, tmp_path / "first"))[0]
    for found in run(other_size, partial(runs.loads, other, path, tmp_path / "second")):
        assert loops.differences(first["saved"], found["loaded"]) == []
        close(found["end"], first["end"])
        assert len(found["said"]) == (size != other_size)

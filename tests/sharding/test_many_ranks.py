"""Agreement of more ranks than a test starts processes for: threads in torch's own group of threads, and numbers."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from polyak import ShardingError
from polyak.sharding import Ranks, agreement

threaded = pytest.importorskip("torch.testing._internal.distributed.multi_threaded_pg")


@pytest.fixture
def on_threads() -> Iterator[Callable[[int, Callable[[Ranks], Any]], list[Any]]]:
    """A function that runs a job on as many ranks, each in a thread; it returns what each returned or raised."""
    threaded._install_threaded_pg()
    threaded.ProcessLocalGroup.reset()
    torch._C._distributed_c10d._set_thread_isolation_mode(True)  # each thread has its own groups

    def run(size: int, job: Callable[[Ranks], Any]) -> list[Any]:
        store, found = dist.HashStore(), [None] * size

        def work(rank: int) -> None:
            try:
                dist.init_process_group("threaded", rank=rank, world_size=size, store=store)
                found[rank] = job(Ranks(dist.group.WORLD, torch.device("cpu"), replicas=True))
            except ShardingError as error:  # all ranks raise it
                found[rank] = error
            except BaseException as error:
                found[rank] = error
                threaded.ProcessLocalGroup.exception_handle(error)  # the others do not wait for this one
            finally:
                dist.destroy_process_group()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    yield run
    torch._C._distributed_c10d._set_thread_isolation_mode(False)
    threaded._uninstall_threaded_pg()


def test_twenty_ranks_with_the_same_facts_agree(on_threads) -> None:
    assert on_threads(20, lambda ranks: ranks.agree("it", {"step": 3, "tensors": {"a": (2, 1)}})) == [None] * 20


def test_eight_ranks_that_differ_are_all_shown_who_and_what(on_threads) -> None:
    found = on_threads(8, lambda ranks: ranks.agree("it", {"step": 7 if ranks.rank in {2, 3, 4} else 8}, "do this"))
    assert {str(one) for one in found} == {
        "all ranks must agree on it:\n  step: ranks 2-4: 7; ranks 0, 1, 5-7: 8\ndo this"
    }


def test_of_twenty_ranks_that_differ_rank_0_alone_shows_who_and_what(on_threads) -> None:
    facts = {f"layers.{i}": i for i in range(100)}
    odd = facts | {f"layers.{i}": -i for i in range(1, 30)}
    found = on_threads(
        20, lambda ranks: ranks.agree("it", {"tensors": odd if ranks.rank in {3, 11, 12, 13} else facts})
    )
    assert all(isinstance(one, ShardingError) for one in found)
    first, *others = map(str, found)
    assert "ranks 3, 11-13: -1; ranks 0-2, 4-10, 14-19: 1" in first
    assert first.count("\n") <= agreement.MOST_FACTS + 2
    assert set(others) == {"all ranks must agree on it: see the error of rank 0"}


def test_what_fails_on_one_rank_of_twenty_is_raised_there_and_known_to_rank_0(on_threads) -> None:
    def act(rank: int) -> int:
        if rank == 13:
            raise ShardingError("as planned")
        return rank

    found = on_threads(20, lambda ranks: ranks.on_every_rank("it", lambda: act(ranks.rank)))
    assert str(found[13]) == "as planned"
    assert "error: rank 13: ShardingError: as planned; ranks 0-12, 14-19: nothing" in str(found[0])
    assert "see the error of rank 0" in str(found[19])


def test_the_lowest_rank_sends_what_not_every_rank_has(on_threads) -> None:
    def job(ranks: Ranks) -> tuple[list[str], list[int | None]]:
        stage = ranks.rank // 2  # four stages of two ranks
        own = {f"block{stage}": "float32", "shared": "float32"} | ({"last": "float32"} if ranks.rank == 7 else {})
        names = list(ranks.union(own))
        return names, ranks.senders([name in own for name in names])

    want = ["block0", "shared", "block1", "block2", "block3", "last"], [0, None, 2, 4, 6, 7]
    assert on_threads(8, job) == [want] * 8


def test_what_16384_ranks_send_to_rank_0_is_shown_in_a_page() -> None:
    tensors = {f"layers.{i}.weight": f"(8192, 8192) of torch.float32, {i}" for i in range(500)}
    facts = [
        agreement.flat({"number of updates": number, "tensors": {**tensors, "layers.7.weight": str(number)}})
        for number in (1000, 1001, 1002)
    ]
    sums = torch.stack([agreement.digests(one) for one in facts])
    buckets = (sums != sums[0]).any(0).nonzero().flatten().tolist()[: agreement.MOST_FACTS]
    sent = [agreement.in_buckets(one, buckets) for one in facts]
    # A node of eight is late, and every rank of another kind of node is early.
    of_rank = [sent[1] if 4096 <= rank < 4104 else sent[2] if rank % 512 == 511 else sent[0] for rank in range(16_384)]
    lines = agreement.differences(of_rank, range(16_384))
    assert lines[0].startswith("  number of updates: ranks 4096-4103: 1001; ranks 511, 1023, 1535,")
    assert "ranks 0-510, 512-1022, " in lines[0]
    assert len(lines) == 2
    assert len("\n".join(lines)) < 2_000

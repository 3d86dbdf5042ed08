"""The communicator of one process behaves as that of several ranks does, and sends nothing."""

import inspect
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import Ranks as GlooRanks

from polyak.errors import ShardingError
from polyak.sharding import Communicator, OneProcess, Ranks, communicator, communicator_of


def test_a_model_in_one_process_has_the_communicator_of_one_process() -> None:
    assert communicator_of(torch.nn.Linear(2, 1)) == OneProcess()


def test_parameters_that_ddp_ignores_are_not_synchronized_except_those_that_it_reduces_later() -> None:
    module = torch.nn.ParameterDict({name: torch.ones(1) for name in ("reduced", "reduced later", "ignored")})
    later, ignored = module["reduced later"], {"reduced later", "ignored"}
    ddp: Any = SimpleNamespace(module=module, parameters_to_ignore=ignored, _delay_all_reduce_params=[later])
    (found,) = communicator._unsynchronized(ddp)
    assert found is module["ignored"]


def test_of_ranks_with_the_same_items_one_sends_them() -> None:
    sent = list[dict[str, int]]()

    class Second(Ranks):
        def sums(self, number: int) -> list[int]:
            return [number, number]

        def gather_to_rank_0(self, value: Any) -> list[Any]:
            sent.append(value)
            return []

        def from_rank_0(self, value: Any) -> Any:
            return value

    group: Any = SimpleNamespace(rank=lambda: 1, size=lambda: 2)
    Second(group, torch.device("cpu"), replicas=False).union({"weight": 1})
    assert sent == [{}]


def test_one_process_has_every_method_of_ranks_that_callers_share_with_the_same_arguments() -> None:
    def methods(cls: type) -> dict[str, list[str]]:
        return {
            name: list(inspect.signature(method).parameters)
            for name, method in inspect.getmembers(cls, inspect.isfunction)
            if not name.startswith("_")
        }

    alone, several = methods(OneProcess), methods(Ranks)
    assert alone == {name: parameters for name, parameters in several.items() if name in alone}
    # These are about tensors of several ranks.
    assert several.keys() - alone.keys() == {"differing", "share", "total", "sums"}


def test_one_process_returns_what_it_gives_to_a_collective() -> None:
    ranks: Communicator = OneProcess()
    tensor = torch.ones(2)
    assert (ranks.rank, ranks.world_size, ranks.replicas) == (0, 1, True)
    assert ranks.on_rank_0(lambda: 3) == ranks.on_every_rank("a number", lambda: 3, {"fact": 1}) == 3
    assert ranks.from_rank_0("a") == "a"
    assert ranks.gather("a") == ranks.gather_to_rank_0("a") == ["a"]
    assert ranks.totals(1, 2.5) == [1, 2.5]
    assert ranks.mean(tensor) is tensor
    assert ranks.separate() is ranks
    assert ranks.senders([True, True]) == [None, None]
    ranks.agree("facts", {"a": 1})
    ranks.broadcast([tensor])
    ranks.close()


def test_one_process_raises_the_error_of_what_it_runs() -> None:
    for run in (OneProcess().on_rank_0, lambda act: OneProcess().on_every_rank("it", act)):
        with pytest.raises(ZeroDivisionError):
            run(lambda: 1 / 0)


@pytest.fixture
def ranks():
    """The communicator of a group of one, over gloo: it takes the way of several ranks."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield Ranks(torch.distributed.group.WORLD, torch.device("cpu"), replicas=True)
    torch.distributed.destroy_process_group()


def test_an_interrupt_on_rank_0_reaches_the_other_ranks_before_it_is_raised(ranks, monkeypatch) -> None:
    sent = []
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda objects, **_: sent.append(list(objects)))

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ranks.on_rank_0(interrupted, "write a file")
    assert sent == [[None, "KeyboardInterrupt: "]]


def test_the_error_of_rank_0_is_a_sharding_error_on_the_others(ranks, monkeypatch) -> None:
    def received(objects: list, **_: object) -> None:
        objects[:] = [None, "OSError: full"]

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", received)
    with pytest.raises(ShardingError, match=r"rank 0 must succeed.* it failed to write a file \(OSError: full\)"):
        ranks.on_rank_0(lambda: None, "write a file")


def _rank(end_at: int | None) -> int:
    if torch.distributed.get_rank() == end_at:
        os._exit(1)
    torch.distributed.barrier()
    return torch.distributed.get_rank()


@pytest.mark.slow
def test_processes_of_tests_that_die_or_make_no_group_fail_no_other_test(tmp_path) -> None:
    processes = GlooRanks(tmp_path, most=2)
    with pytest.raises(AssertionError, match="a rank died without an error"):
        processes.attempt(2, _rank, 0)
    processes._processes[1].kill()  # the first try to make a group fails
    assert processes.run(2, _rank, None) == [0, 1]
    processes.close()

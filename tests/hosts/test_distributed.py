"""Hosts on several processes, under their frameworks' own settings: gloo groups of two."""

from importlib.util import find_spec
from pathlib import Path

import hosts_in_ranks
import loops
import pytest
import sharded
import torch
from ranks import Ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    made = Ranks(tmp_path_factory.mktemp("ranks"), most=2, method="fork")
    yield made
    made.close()


CELLS = [
    ("lightning", "ddp"),
    ("lightning", "ddp, divided average"),
    ("lightning", "fsdp"),
    ("lightning", "fsdp, one file"),
    ("fabric", "ddp"),
    ("accelerate", "ddp"),
    ("accelerate", "ddp, divided average"),
    ("accelerate", "fsdp"),
    ("accelerate", "fsdp, one file"),
    ("transformers", "ddp"),
    ("transformers", "ddp, divided average"),
    ("transformers", "fsdp"),
    ("transformers", "fsdp, one file"),
    ("composer", "ddp"),
    ("composer", "ddp, divided average"),
    ("composer", "fsdp"),
    ("composer", "fsdp, one file"),
    ("composer", "fsdp, first rank loads"),
]


def script_of(name: str):
    if (find_spec("mcli") is not None) != (name == "composer"):
        pytest.skip("Composer is tested with stubs (PYTHONPATH=tests/stubs pytest ...), and the others without")
    if find_spec("lightning" if name == "fabric" else name) is None:
        pytest.skip(f"no {name} here")
    return getattr(hosts_in_ranks, name)


@pytest.fixture(scope="module", params=CELLS, ids=": ".join)
def runs(request, ranks, tmp_path_factory):
    """What each rank found in a run, and in one that resumed from its first checkpoint; the cell; the folder."""
    name, kind = request.param
    script = script_of(name)
    folder = str(tmp_path_factory.mktemp(name))
    return ranks.run(2, script, kind, folder), ranks.run(2, script, kind, folder, True), name, kind, folder


def close(got, want) -> bool:
    return got.shape == want.shape and torch.allclose(got.double(), want, atol=1e-6, rtol=0)


def test_the_average_is_that_of_the_full_weights_and_the_same_on_every_rank(runs) -> None:
    first, second = runs[0]
    assert sharded.unequal(first.average, second.average) == []
    assert len(first.want) == hosts_in_ranks.EPOCHS * hosts_in_ranks.STEPS
    assert all(close(first.average[name], want) for name, want in first.want[-1].items())


def test_the_average_is_that_of_the_full_weights_bit_for_bit(runs) -> None:
    for found in runs[0]:
        assert sharded.unequal({name: found.average[name] for name in found.exact}, found.exact) == []


def test_every_rank_evaluates_with_the_average(runs) -> None:
    ends = [hosts_in_ranks.STEPS - 1, 2 * hosts_in_ranks.STEPS - 1, 2 * hosts_in_ranks.STEPS - 1]
    for found in runs[0]:
        assert len(found.evaluated) == 3
        for seen, step in zip(found.evaluated, ends, strict=True):
            assert close(seen, found.want[step]["0.weight"])


def test_training_continues_with_training_weights_the_same_on_every_rank(runs) -> None:
    first, second = runs[0]
    assert sharded.unequal(first.weights, second.weights) == []
    assert not any(close(first.weights[name], want) for name, want in first.want[-1].items())


def test_a_checkpoint_has_the_average_where_users_load_weights(runs) -> None:
    if runs[2:4] == ("transformers", "fsdp"):
        pytest.skip("with SHARDED_STATE_DICT the trainer saves no weights for use")
    for found in runs[0]:
        assert all(close(found.loadable[name], want) for name, want in found.want[hosts_in_ranks.STEPS - 1].items())


def test_a_resumed_run_is_as_if_it_had_not_stopped(runs) -> None:
    for whole, resumed in zip(runs[0], runs[1], strict=True):
        assert sharded.unequal(whole.weights, resumed.weights) == []
        # Of buffers, which each rank has of its own under FSDP, frameworks save any rank's.
        of = whole.weights if runs[3].startswith("fsdp") else whole.average
        assert sharded.unequal({n: whole.average[n] for n in of}, {n: resumed.average[n] for n in of}) == []


def test_a_loaded_checkpoint_is_evaluated_with_the_average_before_training(runs) -> None:
    if runs[2] != "composer":
        pytest.skip("only that script does so")
    for whole, resumed in zip(runs[0], runs[1], strict=True):
        assert torch.equal(resumed.evaluated[0], whole.evaluated[0])
    if runs[3].startswith("fsdp"):  # under DDP the model is wrapped where training begins
        assert runs[1][0].distances[0] == runs[0][0].distances[0]


def test_a_checkpoint_whose_average_no_algorithm_resumes_restores_the_training_weights(ranks, runs) -> None:
    if runs[2] != "composer":
        pytest.skip("Composer loads the model's weights before it asks anyone")
    without = ranks.run(2, hosts_in_ranks.composer, *runs[3:], True, False)
    for whole, resumed in zip(runs[0], without, strict=True):
        assert sharded.unequal(whole.weights, resumed.weights) == []


def test_samples_are_counted_on_all_ranks(runs) -> None:
    if runs[2] not in {"transformers", "composer"}:
        pytest.skip("its script does not say how many samples there are")
    assert {found.samples for found in runs[0]} == {hosts_in_ranks.EPOCHS * hosts_in_ranks.STEPS * 2 * loops.BATCH}


@pytest.mark.filterwarnings("ignore:The current world size \\(1 is less")  # Composer's own
def test_a_checkpoint_of_two_processes_resumes_in_one(runs, tmp_path) -> None:
    if runs[2:4] != ("composer", "ddp"):
        pytest.skip("only DDP in Composer changes names")
    from composer_script import trainer

    from polyak.hosts.composer import EMA

    net, ema, first = hosts_in_ranks.net(), EMA("2ba"), runs[0][0]
    file = Path(runs[4]) / f"ep1-ba{hosts_in_ranks.STEPS}-rank0.pt"
    made = trainer(tmp_path, ema, net=net, load_path=str(file))
    assert sharded.unequal(first.saved, {name: net.get_parameter(name).detach() for name in first.saved}) == []
    assert sharded.unequal(first.loadable, hosts_in_ranks._inner(loops.averaged(ema))) == []
    made.fit()
    assert ema.num_updates == int(made.state.timestamp.batch) - 1


def test_ranks_record_what_they_train_and_a_resumed_run_continues_the_record(runs) -> None:
    if not runs[0][0].recorded:
        pytest.skip("no record here")
    first, resumed = runs[0][0], runs[1][0]
    ends = "" if runs[3] == "fsdp" else "-rank0.pt"
    assert first.pinned == {f"ep1-ba3{ends}", f"ep2-ba6{ends}"}
    assert sharded.unequal(first.recorded, resumed.recorded) == []
    assert all(first.recorded[name].shape == tensor.shape for name, tensor in first.weights.items())


def test_one_process_logs(runs) -> None:
    assert [found.lines for found in runs[0]] == [2, 0]


NAMES = ["lightning", "fabric", "accelerate", "transformers", "composer"]


@pytest.mark.parametrize(("name", "kind"), [*((name, "ddp") for name in NAMES), ("composer", "fsdp")])
def test_ranks_that_disagree_raise_on_each_rank(ranks, tmp_path, name, kind) -> None:
    for raised in ranks.attempt(2, script_of(name), f"{kind}, disagreeing", str(tmp_path)):
        assert "ShardingError: all ranks must agree on the average" in raised.text


def test_tensor_parallelism_is_refused_in_composer(ranks, tmp_path) -> None:
    for raised in ranks.attempt(2, script_of("composer"), "tp", str(tmp_path)):
        assert "NotImplementedError: each process must hold the full model or its FSDP2 shards" in raised.text

import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

import distributed_runs as runs
import loops
import pytest
import torch
from launching import restarted
from ranks import Ranks
from torch import nn
from torch.utils.data import Subset
from waiting import END_S

from polyak import CheckpointError, CheckpointSaver, HalfLife, PlanWarning, Record, ShardingError
from polyak.cli import main
from polyak.sharding.start import _of_this_start
from polyak.trainer import parallel
from polyak.trainer.wrapping import blocks

pytestmark = pytest.mark.slow  # processes of several ranks


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of one process, in which each batch is that of all ranks."""
    return runs.trains(None, tmp_path_factory.mktemp("alone"), max_duration="2ep")


def close(one, other) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


# Of three ranks, one has no row of some tensors; batches of 4 samples do not divide.
CELLS = [("ddp", 2), ("ddp, divided average", 3), ("fsdp2", 3), ("sharded before", 2)]


@pytest.mark.parametrize(("kind", "size"), CELLS, ids=str)
def test_a_run_of_several_ranks_equals_a_run_of_one(ranks, alone, tmp_path, kind, size) -> None:
    job = runs.trains_followed if kind == "fsdp2" else runs.trains
    found = ranks.run(size, partial(job, kind, tmp_path, max_duration="2ep"))
    assert len({tuple(one.pop("draws").tolist()) for one in found}) == size
    for one in found:
        assert one.get("apart", []) == []
        assert loops.differences({**found[0], "log": []}, {**one, "log": []}) == []
        assert {**one["clock"], "total_wct": 0} == {**alone["clock"], "total_wct": 0}
        for what in ("weights", "averages", "losses", "metrics"):
            close(one[what], alone[what])
    assert len({one["clock"]["total_wct"] for one in found}) == 1
    close(found[0]["log"], alone["log"])
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("kind", "size", "at"),
    [
        ("ddp", 2, runs.RESUMED),
        ("fsdp2", 2, runs.RESUMED),
        ("ddp, divided average", 2, [loops.MID_EPOCH]),
        ("ddp", 3, [loops.MID_EPOCH]),
    ],
    ids=str,
)
def test_a_resumed_run_of_several_ranks_equals_one_that_never_stopped(ranks, tmp_path, kind, size, at) -> None:
    # Of three, it is the plain model whose sums show the order in which they were taken.
    found = ranks.run(size, partial(runs.resumes, kind, tmp_path, at, noisy=size == 2, eval_weights="both"))
    assert [different for _, different in found] == [{}] * size


@pytest.fixture(scope="module")
def recorded_alone(tmp_path_factory):
    """The average of the record of a run of one process."""
    folder = tmp_path_factory.mktemp("recorded")
    runs.records(None, folder)
    return average_of(folder)


def average_of(folder: Path) -> dict[str, torch.Tensor]:
    return Record(folder / "record").average(HalfLife("5ba", unbiased=True))


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_resumed_record_of_several_ranks_is_that_of_one_run(ranks, recorded_alone, tmp_path, kind) -> None:
    ranks.run(2, partial(runs.records, kind, tmp_path / "whole"))
    began = [ranks.run(2, partial(runs.records, kind, tmp_path / "parts", (stop,))) for stop in (8, None)]
    assert began == [[[0], [0]], [[6], [6]]]
    whole = average_of(tmp_path / "whole")
    assert loops.differences(whole, average_of(tmp_path / "parts")) == []
    close(whole, recorded_alone)


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


def on(ranks, size, job):
    return [job()] if size == 1 else ranks.run(size, job)


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """A function that returns a checkpoint of a parallelism and a world size, and what that run saved and led to."""

    @cache
    def of(kind: str | None, size: int) -> tuple[Path, dict]:
        folder = tmp_path_factory.mktemp("saved")
        path = folder / "saved"
        return path, on(ranks, size, partial(runs.saves, kind, path, folder))[0]

    return of


@pytest.mark.parametrize(("kind", "size", "other", "other_size"), MOVES, ids=str)
def test_a_run_resumes_under_another_parallelism_and_world_size(
    ranks, saved, tmp_path, kind, size, other, other_size
) -> None:
    path, first = saved(kind, size)
    for found in on(ranks, other_size, partial(runs.loads, other, path, tmp_path)):
        assert loops.differences(first["saved"], found["loaded"]) == []
        close(found["end"], first["end"])
        assert len(found["said"]) == (size != other_size)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_batch_that_does_not_divide_counts_each_sample_once(ranks, tmp_path, kind) -> None:
    # Batches of 4 and a last one of 2 on 3 ranks: of one sample or two, of none on the last; in up to two microbatches.
    data = {"data": Subset(loops.dataset(), range(22)), "grad_accum": 2, "max_duration": "1ep", "saves": None}
    alone = runs.trains(None, tmp_path / "alone", **data)
    for found in ranks.run(3, partial(runs.trains, kind, tmp_path / "ranks", **data)):
        for what in ("weights", "averages", "losses", "metrics"):
            close(found[what], alone[what])
        assert found["clock"]["sample"] == 22


def test_an_evaluation_counts_each_sample_once(tmp_path) -> None:
    alone = runs.evaluates(None)
    assert len(alone) == 4
    assert alone["eval/ours"] == pytest.approx(3 / 7)
    ranks = Ranks(tmp_path, most=2, method="fork")  # which have torchmetrics: to import it takes seconds
    for kind in ("ddp", "fsdp2"):
        for found in ranks.run(2, partial(runs.evaluates, kind)):  # of the last batch, the second has none
            close(found, alone)
    ranks.close()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_training_weights_are_evaluated_with_the_buffers_of_rank_0(ranks, tmp_path, kind) -> None:
    want, got = ranks.run(2, partial(runs.raw_figures, kind, tmp_path))[0]
    assert got == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_every_rank_predicts_all_batches(ranks, kind) -> None:
    alone = runs.predicts(None)
    for found in ranks.run(2, partial(runs.predicts, kind)):
        close(found, alone)


def test_with_a_distributed_sampler_a_batch_is_the_batches_of_all_ranks_together(ranks, tmp_path) -> None:
    alone = runs.with_own_batches(None, tmp_path, 2)
    for found in ranks.run(2, partial(runs.with_own_batches, "ddp", tmp_path, 2)):
        close(found["weights"], alone["weights"])
        close(found["averages"], alone["averages"])
        assert found["clock"] == (6, 24, 6 * (10 + 11), 6)


def test_only_the_same_ranks_resume_inside_an_epoch_of_a_distributed_sampler(ranks, tmp_path) -> None:
    for said in ranks.run(2, partial(runs.mixes_samplers, tmp_path / "inside.pt", at="3ba")):
        assert said.startswith("CheckpointError: a checkpoint from inside an epoch of a DistributedSampler")
    assert ranks.run(2, partial(runs.mixes_samplers, tmp_path / "end.pt", at="1ep")) == ["nothing", "nothing"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_step_with_inf_gradients_on_one_rank_is_skipped_on_all(ranks, tmp_path, kind) -> None:
    one, other = ranks.run(2, partial(runs.skips, kind, tmp_path))
    assert (one["batches"], one["drawn"]) == (8, 10)
    assert loops.differences(one, other) == []
    assert all(tensor.isfinite().all() for tensor in one["weights"].values())


def test_ranks_that_draw_batches_in_different_orders_are_warned_of(ranks, tmp_path) -> None:
    for said in ranks.run(2, partial(runs.differing, tmp_path)):
        assert len([one for one in said if "all ranks must draw the same batches" in one]) == 1


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_damaged_checkpoint_is_refused_by_name_on_all_ranks(ranks, saved, tmp_path, kind) -> None:
    whole, path = saved(kind, 2)[0], tmp_path / "saved"
    shutil.copytree(whole, path) if whole.is_dir() else shutil.copy(whole, path)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    assert len(files) == (4 if kind == "fsdp2" else 1)  # of each rank one, DCP's list of them, and the rest
    for file in files:
        content = file.read_bytes()
        file.write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])
        for said in ranks.run(2, partial(runs.loads_damaged, kind, path, tmp_path / "run")):
            assert said.startswith("DamagedCheckpointError")
            assert str(file) in said
        file.write_bytes(content)
    assert set(ranks.run(2, partial(runs.loads_damaged, kind, path, tmp_path / "run"))) == {"nothing"}


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_checkpoint_that_rank_0_cannot_write_is_an_error_on_all(ranks, tmp_path, kind) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "x"
    (first, back), (other, also_back) = ranks.run(2, partial(runs.fails_to_save, kind, path, tmp_path / "run"))
    assert first.startswith(("FileExistsError", "NotADirectoryError"))
    assert other.startswith("ShardingError: rank 0 must succeed for all ranks, and it failed to write")
    assert "file" in other
    assert back
    assert also_back


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (
            "two kinds",
            "ValueError: parallelism must be 'ddp' or None for a model that is under ddp already (got 'fsdp2')",
        ),
        ("tensor parallelism", "ValueError: a model of DTensors must be under fully_shard"),
        ("not all ranks", "ValueError: each of the 2 processes must train on its own data"),
        ("a step before", "ValueError: optimizers must have made no step"),
        ("other arguments", "max_duration: rank 0: 3ep; rank 1: 4ep"),
    ],
)
def test_a_model_that_cannot_be_trained_together_is_refused_on_all_ranks(ranks, tmp_path, what, words) -> None:
    for said in ranks.run(2, partial(runs.refused, what, tmp_path)):
        assert words in said


# One process


@pytest.fixture
def ungrouped():
    """Let no process group be left that a trainer began."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_one_process_trains_with_a_parallelism_as_without_one_bit_for_bit(ungrouped, tmp_path, kind) -> None:
    plain = runs.trains(None, tmp_path / "plain", noisy=True)
    found = runs.trains(kind, tmp_path / "alone", noisy=True)
    assert torch.distributed.get_world_size() == 1
    assert loops.differences(plain, found) == []


def test_a_saver_keeps_the_newest_folders_and_replaces_an_existing_one(ungrouped, tmp_path) -> None:
    saver = CheckpointSaver(tmp_path, "1ba", keep=2)
    for left in (".ep0-ba1.tmp", ".ep0-ba1.draft"):  # by a killed process, of this version and an earlier one
        (tmp_path / left).mkdir()
    trainer = loops.train(tmp_path, saves=None, max_duration="4ba", parallelism="fsdp2", callbacks=(saver,))
    trainer.fit()
    assert sorted(path.name for path in tmp_path.glob("*ep*")) == ["ep0-ba3", "ep0-ba4"]
    assert saver.latest() == tmp_path / "ep0-ba4"
    trainer.save_checkpoint(saver.latest())
    assert loops.train(tmp_path, saves=None, load_path=saver.latest()).state.timestamp.batch.value == 4
    assert sorted(path.name for path in tmp_path.glob("*ep*")) == ["ep0-ba3", "ep0-ba4"]
    (saver.latest() / "rest.pt").unlink()
    with pytest.raises(CheckpointError, match=r"must be a checkpoint of polyak.Trainer; it has no rest.pt"):
        loops.train(tmp_path, load_path=saver.latest())


def test_a_parallelism_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="parallelism must be None or one of ddp, fsdp2"):
        loops.train(Path(), parallelism="fsdp")


def test_a_model_with_declared_experts_is_refused_of_which_rank_0_would_save_its_own(monkeypatch, tmp_path) -> None:
    trainer = loops.train(tmp_path, saves=None)
    monkeypatch.setattr(parallel, "has_experts", lambda model: model is trainer.state.model)
    with pytest.raises(ShardingError, match="experts that were declared to differ by rank"):
        trainer.save_checkpoint(tmp_path / "saved.pt")
    assert not (tmp_path / "saved.pt").exists()
    with pytest.raises(ShardingError, match=r"write a loop and use polyak\.attach"):
        loops.train(tmp_path, saves=None, model=trainer.state.model)


def test_processes_of_torchrun_that_train_separate_models_are_warned_of(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.warns(PlanWarning, match="each of the 2 processes"):
        loops.train(tmp_path)


# What is sharded by itself


def test_the_blocks_of_a_model_are_its_children_and_those_of_its_lists() -> None:
    model = nn.Module()
    model.embedding = nn.Embedding(4, 4)
    model.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))
    model.of = nn.ModuleDict({"one": nn.Linear(4, 4)})
    model.scales = nn.ParameterList([nn.Parameter(torch.ones(4))])
    model.act = nn.ReLU()
    model.first, model.second = nn.Linear(4, 4), nn.Linear(4, 4)
    model.second.weight = model.first.weight
    model.own = nn.Linear(4, 4)
    model.bias = model.own.bias
    assert blocks(model) == [model.embedding, *model.blocks, model.of["one"]]


# torchrun


def test_processes_that_torchrun_restarts_connect_to_each_other_and_not_to_ended_ones() -> None:
    store = torch.distributed.HashStore()
    store.set("polyak/start", "before")
    store.set("polyak/before/came", "another")
    with ThreadPoolExecutor(2) as threads:
        second = threads.submit(_of_this_start, store, 1, 2)
        store.wait(["polyak/before/1"])
        assert not second.done()
        first = threads.submit(_of_this_start, store, 0, 2)
        first.result(timeout=END_S).set("address", "new")
        assert second.result(timeout=END_S).get("address") == b"new"


@pytest.mark.filterwarnings("ignore")  # of torch's agent
def test_a_run_with_a_killed_rank_ends_as_one_without(ranks, tmp_path) -> None:
    restarted(runs.killed_once_each, tmp_path, restarts=2)
    assert (tmp_path / "killed").read_text() == "ddp fsdp2 "
    for kind in ("ddp", "fsdp2"):
        ranks.run(2, partial(runs.killed, kind, tmp_path / "never" / kind, tmp_path / "want"))
        for rank in range(2):
            want, got = (torch.load(tmp_path / name / f"{kind}-{rank}.pt") for name in ("want", "results"))
            assert loops.differences(want, got) == []
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.filterwarnings("ignore")  # of torch's agent
def test_the_demo_on_two_processes_prints_and_writes_everything_once(tmp_path) -> None:
    assert main(["demo", "--steps", "30", "--out", str(tmp_path / "out")]) == 0
    longer, shorter = zip(*restarted(runs.demos, tmp_path / "out"), strict=True)
    codes, said, errors = zip(*longer, strict=True)
    assert codes == (0, 0)
    for one in ("Resuming after 30 of 40 steps", "2 processes train together.", "cross-entropy (lower is better)"):
        assert "".join(said).count(one) == 1
    for one in ("polyak demo: note: ", "was saved with world size 1 and resumed with 2"):
        assert "".join(errors).count(one) == 1
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == len(set(lines)) == 12
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"averaged.safetensors", "demo.png", "record", "sweep"} <= names
    codes, _, errors = zip(*shorter, strict=True)
    assert 0 not in codes
    assert "".join(errors).count("polyak demo: ") == 1

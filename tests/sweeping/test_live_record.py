"""A sweep of a record that a run is still writing: files are merged and deleted while it reads."""

import importlib
import shutil

import pytest
import torch

from polyak.errors import RecordError
from polyak.profiles import HalfLife
from polyak.record import Edge, Record, Writer
from polyak.storage.safetensors import TensorInfo
from polyak.sweeping import held, sweep
from polyak.time import Timestamp

INFOS = {"weight": TensorInfo(torch.float32, (3,), averaged=True)}


class Run:
    """A run that goes on for as long as a test wants."""

    def __init__(self, writer):
        self.writer = writer
        self.edge = Edge(0, Timestamp())

    def train(self, updates):
        for _ in range(updates):
            end = Edge(self.edge.updates + 1, self.edge.timestamp.to_next_batch())
            generator = torch.Generator().manual_seed(end.updates)
            self.writer.append({"weight": torch.randn(3, generator=generator)}, self.edge, end)
            self.edge = end


def loss(state):
    return float(state["weight"].norm())


@pytest.fixture
def live(tmp_path):
    with Writer(tmp_path / "run", INFOS, per_level=4) as writer:
        run = Run(writer)
        run.train(64)
        yield tmp_path / "run", run


def files(folder):
    return {path.name for path in folder.glob("*.safetensors")}


@pytest.mark.slow
def test_sweep_reads_the_record_as_it_was_at_the_start_while_the_run_goes_on(live, tmp_path) -> None:
    folder, run = live
    shutil.copytree(folder, tmp_path / "copy")
    want = sweep(tmp_path / "copy", loss, points=5, refine=2)
    before = files(folder)

    def evaluate(state):
        run.train(20)
        return loss(state)

    results = sweep(folder, evaluate, points=5, refine=2)
    assert before - files(folder), "the run has merged files meanwhile"
    assert [(one.name, one.metrics, one.error) for one in results] == [
        (one.name, one.metrics, one.error) for one in want
    ]
    assert "half-life" in results.table()


def test_sweep_opens_the_record_again_if_its_files_were_merged_before_it_began(live) -> None:
    folder, run = live
    stale = Record(folder)
    run.train(64)
    results = sweep(stale, loss, points=3, refine=0)
    assert results.record.segments == Record(folder).segments
    assert results[0].metrics == sweep(folder, loss, points=3, refine=0)[0].metrics


def test_held_opens_the_newest_record_if_a_file_vanishes_between_the_manifest_and_its_opening(
    live, monkeypatch
) -> None:
    folder, run = live
    module = importlib.import_module("polyak.sweeping.held")
    check = module.check_size
    calls = []

    def vanishing(path, segment):
        calls.append(1)
        if len(calls) == 3:
            run.train(64)
        return check(path, segment)

    monkeypatch.setattr(module, "check_size", vanishing)
    with held(Record(folder)) as record:
        assert record.segments[-1].end.updates == 128
        assert torch.isfinite(record.average(HalfLife("20ba", unbiased=True))["weight"]).all()


def test_a_file_that_is_missing_from_a_record_that_nobody_writes_is_an_error(live, tmp_path) -> None:
    folder, _ = live
    shutil.copytree(folder, tmp_path / "copy")
    next((tmp_path / "copy").glob("*.safetensors")).unlink()
    with pytest.raises(RecordError, match="cannot be opened"):
        sweep(tmp_path / "copy", loss)


def test_a_damaged_file_is_an_error_before_the_first_evaluation(live, tmp_path) -> None:
    folder, _ = live
    shutil.copytree(folder, tmp_path / "copy")
    path = next((tmp_path / "copy").glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(RecordError, match="must have the SHA-256 in the manifest"):
        sweep(tmp_path / "copy", lambda _: pytest.fail("evaluated"))


def test_the_record_of_the_results_knows_the_errors_of_the_newer_record_and_not_of_the_stale_one(live) -> None:
    folder, run = live
    stale, profile = Record(folder), HalfLife("20ba", unbiased=True)
    before = stale.error(profile)
    run.train(64)
    results = sweep(stale, loss, points=3, refine=0)
    assert results.record.error(profile) == pytest.approx(Record(folder).error(profile), rel=1e-5)
    assert stale.error(profile) == before

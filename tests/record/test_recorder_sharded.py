"""The Recorder of a model that several ranks train: one record, whatever their number."""

import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import sharded
import sharded_records as jobs
import torch
from forking import fork, forks

from polyak import Record, RecordError, Uniform, sweep
from polyak.cli import main

pytestmark = pytest.mark.slow  # processes of several ranks

torch.set_num_threads(1)


def unequal(folder: Path) -> list[str]:
    """Compare the record of the ranks with that of the whole model bit for bit."""
    one, other = Record(folder / "sharded" / "record"), Record(folder / "whole" / "record")
    one.verify()
    assert one.tensors == other.tensors
    places = [[(s.start, s.end, s.level) for s in record.segments] for record in (one, other)]
    assert places[0] == places[1]
    different = []
    for mine, theirs in zip(one.segments, other.segments, strict=True):
        with one.open(mine) as a, other.open(theirs) as b:
            different += [(mine.file, n) for n in one.tensors if not torch.equal(a.read(n), b.read(n))]
    mine, theirs = one.raw_weights(), other.raw_weights()
    different += [("raw", name) for name in theirs if not torch.equal(mine[name], theirs[name])]
    return different


# Models under these two are as under "ddp" and "fsdp, blocks": what differs is how an average is kept.
OF_AVERAGES = {"ddp, divided average", "fsdp, offloaded average"}
# Four ranks, of which one has no row of the smallest tensor, where the model is sharded in the usual way.
CELLS = [(kind, sizes[0]) for kind, sizes in sharded.KINDS.items() if kind not in {"fsdp, blocks", *OF_AVERAGES}]
CELLS += [("fsdp, blocks", 1), ("fsdp, blocks", 4)]


@pytest.mark.parametrize(("kind", "size"), CELLS, ids=str)
def test_the_record_of_ranks_is_that_of_the_whole_model_bit_for_bit(ranks, tmp_path, kind, size) -> None:
    ranks.run(size, jobs.records, kind, str(tmp_path), 2, 13, {})
    assert unequal(tmp_path) == []
    record = Record(tmp_path / "sharded" / "record")
    assert max(segment.level for segment in record.segments) == 2
    parts = 0 if size == 1 or kind.startswith("ddp") else 2 if kind == "hsdp" else size  # one copy of the model writes
    for segment in record.segments:
        assert len(list((record.folder / segment.file).glob("*.safetensors"))) == parts


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_files_of_ranks_may_have_16_bits(ranks, tmp_path, dtype) -> None:
    ranks.run(3, jobs.records, "fsdp", str(tmp_path), 2, 11, {"dtype": dtype})
    assert unequal(tmp_path) == []
    assert Record(tmp_path / "sharded" / "record").tensors["first.weight"].dtype == dtype


def test_a_record_of_n_ranks_is_resumed_by_m(ranks, tmp_path) -> None:
    ranks.run(1, jobs.records, "fsdp, blocks", str(tmp_path), 7, 9, {})
    for size, stop in ((4, 7), (3, 11), (2, 15), (4, 19), (1, 23)):  # each continues the record of the one before it
        updates = ranks.run(size, jobs.resumes, "fsdp, blocks", str(tmp_path), stop, stop + 6, {}, stop + 4)
        assert set(updates) == {stop + 6}
        assert unequal(tmp_path) == []


@pytest.mark.parametrize("kinds", [("ddp", "fsdp"), ("hsdp", "ddp"), ("tp", "hsdp")], ids=str)
def test_a_record_goes_from_one_parallelism_to_another(ranks, tmp_path, kinds) -> None:
    sizes = {"ddp": 2, "fsdp": 3, "hsdp": 4, "tp": 2}
    ranks.run(sizes[kinds[0]], jobs.records, kinds[0], str(tmp_path), 7, 9, {})
    ranks.run(sizes[kinds[1]], jobs.resumes, kinds[1], str(tmp_path), 7, 15, {})
    assert unequal(tmp_path) == []


def test_a_state_from_before_the_first_update_has_what_a_later_one_has(ranks, tmp_path) -> None:
    ranks.run(2, jobs.records, "fsdp", str(tmp_path), 0, 3, {})
    ranks.run(3, jobs.resumes, "fsdp", str(tmp_path), 0, 5, {})
    assert unequal(tmp_path) == []


def test_what_reads_a_record_reads_that_of_ranks_in_one_process(ranks, tmp_path, capsys) -> None:
    ranks.run(3, jobs.records, "fsdp, blocks", str(tmp_path), 7, 20, {})
    assert unequal(tmp_path) == []
    said = []
    for kind in ("sharded", "whole"):
        folder = tmp_path / kind / "record"
        assert main(["inspect", str(folder), "--verify", "--json"]) == 0
        said.append(json.loads(capsys.readouterr().out))
        output = str(tmp_path / f"{kind}.safetensors")
        assert main(["reconstruct", str(folder), "--half-life", "8ba", "-o", output]) == 0
        capsys.readouterr()
    assert (tmp_path / "sharded.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    in_parts = [
        (plain.pop("record"), plain.pop("size_bytes"), plain.pop("levels"), plain.pop("in_parts")) for plain in said
    ]
    assert said[0] == said[1]
    assert [parts for *_, parts in in_parts] == [said[0]["stretches"], 0]
    assert main(["inspect", str(tmp_path / "sharded" / "record"), "--verify"]) == 0
    shown = capsys.readouterr().out
    assert "all files match their hashes" in shown
    assert f"in {said[0]['stretches']} segments, one file per rank" in shown
    for kind in ("sharded", "whole"):
        results = sweep(
            tmp_path / kind / "record", lambda state: float(state["first.weight"].norm()), points=3, refine=1
        )
        said.append([(result.name, result.metrics) for result in results])
    assert said[2] == said[3]


def test_a_part_that_is_not_what_was_written_is_found(ranks, tmp_path) -> None:
    ranks.run(2, jobs.records, "fsdp, blocks", str(tmp_path), 2, 3, {})
    record = Record(tmp_path / "sharded" / "record")
    folder = record.folder / record.segments[0].file
    part = folder / "00001.safetensors"
    original = part.read_bytes()

    part.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    with pytest.raises(RecordError, match=r"00001.safetensors must have the SHA-256 in the manifest"):
        record.verify()
    part.write_bytes(original[:-4])
    with pytest.raises(RecordError, match="must have .* bytes"):
        record.average(Uniform())
    part.unlink()
    with pytest.raises(RecordError, match="cannot be opened"):
        record.average(Uniform())
    part.write_bytes(original)
    record.verify()
    listed = json.loads((folder / "parts.json").read_text())
    del listed["00001.safetensors"]
    (folder / "parts.json").write_text(json.dumps(listed))
    with pytest.raises(RecordError, match=r"parts.json must have the SHA-256 in the manifest"):
        record.average(Uniform())
    # Even in a manifest made for it: what is missing is seen, and no name leads elsewhere.
    for names, message in (
        (["00000.safetensors"], "must hold the tensors of its manifest"),
        (["../../elsewhere.safetensors"], "must name the files in its folder"),
    ):
        text = json.dumps(
            {name: {"size_bytes": (folder / "00000.safetensors").stat().st_size, "sha256": ""} for name in names}
        )
        (folder / "parts.json").write_text(text)
        forged = replace(record.segments[0], sha256=hashlib.sha256(text.encode()).hexdigest())
        moved = record.folder / forged.file
        shutil.copytree(folder, moved)
        with pytest.raises(RecordError, match=message), record.open(forged):
            pass


def test_dcp_reads_a_segment_onto_any_number_of_ranks(ranks, tmp_path) -> None:
    ranks.run(2, jobs.records, "fsdp, blocks", str(tmp_path), 2, 3, {})
    record = Record(tmp_path / "sharded" / "record")
    with record.open(record.segments[0]) as file:
        want = {name: file.read(name) for name in record.tensors}
    for got in ranks.run(3, jobs.loaded_by_dcp, "fsdp", str(record.folder), record.segments[0].file):
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want)


def test_a_folder_that_is_there_keeps_its_place_if_the_same_is_written_again(ranks, tmp_path) -> None:
    ranks.run(2, jobs.writes_again, str(tmp_path))


# Agreement.


def test_ranks_whose_clocks_differ_have_the_same_record(ranks, tmp_path) -> None:
    first, *others = ranks.run(3, jobs.has_another_clock, str(tmp_path))
    assert [segment["end"]["total_wct"] for segment in json.loads(first)["stretches"]] == [1.0, 1.0]
    assert all(other == first for other in others)


def test_of_ranks_with_the_full_model_rank_0_records_alone(ranks, tmp_path) -> None:
    first, other = ranks.run(2, jobs.keeps_a_mean, str(tmp_path))
    assert first == (True, True, ["ahead", "count", "mean", "num_updates", "record", "repr", "start"])
    assert other == (False, False, ["ahead", "count", "num_updates", "repr", "start"])
    assert unequal(tmp_path) == []


@pytest.mark.parametrize(("kind", "rank"), [("fsdp", 0), ("fsdp", 1), ("ddp", 0)])
def test_what_the_disk_refuses_one_rank_ends_training_on_all_and_the_record_is_as_before(
    ranks, tmp_path, kind, rank
) -> None:
    found = ranks.run(2, jobs.fails_on, rank, kind, str(tmp_path))
    for where, message in enumerate(found):
        assert "No space left on device" in message
        if kind == "fsdp":
            assert f"failed on rank {rank}: writing" in message
            assert "make room on the disk and continue" in message
        elif where:
            assert "rank 0 must succeed for all ranks" in message
    record = Record(tmp_path / "sharded" / "record")
    record.verify()
    assert record.segments[0].end.updates == 2
    assert {path.name for path in record.folder.iterdir()} == {
        "manifest.json",
        "lock",
        *(s.file for s in record.segments),
    }


def test_shards_that_rank_0_does_not_see_are_no_segment(ranks, tmp_path) -> None:
    for said in ranks.run(2, jobs.fails_on, 1, "fsdp", str(tmp_path), "elsewhere"):
        assert re.search("rank 0 does not see .*00001.safetensors: record to a disk that all machines share", said)
    assert [s.end.updates for s in Record(tmp_path / "sharded" / "record").segments] == [2]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("interval", "recorder: .*rank 1: .*interval=3ba"),
        ("dtype", "tensors first.bias: .*rank 1: .*bfloat16"),
        ("folder", "sha256 of its manifest: rank 0: .*; ranks 1, 2: nothing"),
        ("seconds", "the loop must count sec for interval='4sec'"),
        ("updates", "\n  updates: rank 1: 3; ranks 0, 2: 2"),
    ],
)
def test_ranks_that_do_not_agree_find_out(ranks, tmp_path, what, message) -> None:
    for said in ranks.run(3, jobs.is_refused, what, "fsdp", str(tmp_path)):
        assert re.search(message, said), said


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_an_existing_record_is_refused_on_all_ranks(ranks, tmp_path, kind) -> None:
    ranks.run(2, jobs.records, kind, str(tmp_path), 2, 3, {})
    for said in ranks.run(2, jobs.is_refused, "there", kind, str(tmp_path)):
        assert "has a record of 3 updates already" in said


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_an_error_on_one_rank_waits_for_no_other_and_leaves_what_was_recorded(ranks, tmp_path, kind) -> None:
    for said in ranks.run(2, jobs.raises_on, 1, kind, str(tmp_path)):
        assert any("the last segment was not recorded" in one for one in said) == (kind == "fsdp")
    assert Record(tmp_path / "sharded" / "record").segments[-1].end.updates == (2 if kind == "fsdp" else 3)


@forks
def test_a_writer_whose_ranks_are_killed_leaves_the_record_from_before_or_after(tmp_path) -> None:
    def kill() -> None:
        import sharded_record_crasher  # takes seconds

        sharded_record_crasher.main(tmp_path, 12)

    process = fork(kill)
    process.join()
    assert process.exitcode == 0


def unlike(folder: Path) -> float:
    """Return how far the segments of the ranks are from those of the whole model, of how far weights move."""
    one, other = Record(folder / "sharded" / "record"), Record(folder / "whole" / "record")
    one.verify()
    most = 0.0
    for name, info in one.tensors.items():
        means = []
        for record in (one, other):
            found = []
            for segment in record.segments:
                with record.open(segment) as file:
                    found.append(file.read(name).double())
            means.append(torch.stack(found))
        if not info.averaged:
            assert torch.equal(*means)
        elif means[0].numel():
            moved = (means[1][-1] - means[1][0]).norm()
            most = max(most, float((means[0] - means[1]).flatten(1).norm(dim=1).max() / moved))
    return most


@pytest.mark.parametrize(("kind", "size"), [("fsdp, blocks", 3), ("hsdp", 4), ("tp", 2), ("ddp", 2)], ids=str)
def test_ranks_keep_differences_with_scales_of_their_shards(ranks, tmp_path, kind, size) -> None:
    options = {"dtype": torch.int8, "per_level": 2}
    ranks.run(size, jobs.records, kind, str(tmp_path), 7, 9, options)
    assert set(ranks.run(size, jobs.resumes, kind, str(tmp_path), 7, 19, options)) == {19}
    record = Record(tmp_path / "sharded" / "record")
    assert sum(segment.before is not None for segment in record.segments) >= 2
    assert unlike(tmp_path) < 0.05
    for name, weights in record.raw_weights().items():
        assert torch.equal(weights, Record(tmp_path / "whole" / "record").raw_weights()[name])


def test_differences_that_n_ranks_wrote_are_continued_by_m(ranks, tmp_path) -> None:
    options = {"dtype": torch.int8, "per_level": 2}
    ranks.run(3, jobs.records, "fsdp, blocks", str(tmp_path), 7, 9, options)
    assert set(ranks.run(2, jobs.resumes, "fsdp, blocks", str(tmp_path), 7, 19, options)) == {19}
    assert unlike(tmp_path) < 0.05

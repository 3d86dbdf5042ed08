"""Tensors in several shards are read in as few copies as those in one, whatever the dimension that is divided."""

import itertools
import json
import pickle
from hashlib import sha256

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from polyak import CheckpointError
from polyak.checkpoints import averaging as averaging_module
from polyak.checkpoints import open_checkpoint, provenance_of
from polyak.checkpoints.averaging import average, plan
from polyak.checkpoints.output import write_average
from polyak.checkpoints.sharded import Sharded, boxes_between
from polyak.compat.folders import _overlap


def grid(shape, parts):
    """Return the boxes of a tensor that is divided into so many parts in each dimension."""
    cuts = [
        [(i * -(-n // p), min(n, (i + 1) * -(-n // p))) for i in range(p) if i * -(-n // p) < n]
        for n, p in zip(shape, parts, strict=True)
    ]
    return [tuple(box) for box in itertools.product(*cuts)]


def save_sharded(folder, tensors, parts) -> None:
    """Save tensors as ``torch.distributed.checkpoint`` does on several ranks: each shard is in the file of a rank."""
    folder.mkdir()
    items, keys, places = {}, {}, {}
    for name, tensor in tensors.items():
        boxes = grid(tensor.shape, parts[name])
        chunks = [dcp.ChunkStorageMetadata(torch.Size(a for a, _ in b), torch.Size(z - a for a, z in b)) for b in boxes]
        properties = dcp.TensorProperties(dtype=tensor.dtype)
        items[f"model.{name}"] = dcp.TensorStorageMetadata(properties, tensor.shape, chunks)
        keys[f"model.{name}"] = ("model", name)
        for rank, box in enumerate(boxes):
            with (folder / f"__{rank}_0.distcp").open("ab") as file:
                begin = file.tell()
                torch.save(tensor[tuple(slice(*one) for one in box)].clone(), file)
                index = dcp.MetadataIndex(f"model.{name}", torch.Size(a for a, _ in box), rank)
                places[index] = _StorageInfo(f"__{rank}_0.distcp", begin, file.tell() - begin)
    (folder / ".metadata").write_bytes(pickle.dumps(dcp.Metadata(items, keys, places)))


@st.composite
def ranges(draw):
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    parts = tuple(draw(st.integers(1, n)) for n in shape)
    numel = torch.Size(shape).numel()
    first = draw(st.integers(0, numel))
    return shape, parts, first, draw(st.integers(first, numel))


@given(ranges())
@settings(max_examples=200)
def test_any_range_of_a_sharded_tensor_is_that_of_the_full_tensor(of) -> None:
    shape, parts, first, last = of
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape)
    shards = [(box, tensor[tuple(slice(*one) for one in box)].clone()) for box in grid(shape, parts)]
    sharded = Sharded.of(shards, lambda shard: None)
    whole = tuple((0, n) for n in shape)
    assert sharded.read(whole, first, last).tolist() == tensor.reshape(-1)[first:last].tolist()
    assert len(list(boxes_between(first, last, shape))) <= max(1, 2 * len(shape) - 1)


@given(st.lists(st.tuples(*[st.tuples(st.integers(0, 4), st.integers(0, 4)).map(sorted)] * 2), max_size=5))
@settings(max_examples=200)
def test_shards_overlap_if_two_have_an_element_in_common(boxes) -> None:
    boxes = [tuple(map(tuple, box)) for box in boxes]
    elements = [{*itertools.product(*(range(*one) for one in box))} for box in boxes]
    want = any(one & other for one, other in itertools.combinations(elements, 2))
    assert _overlap(boxes) == want


def opened_twice(tmp_path, parts):
    for step in (1, 2):
        generator = torch.Generator().manual_seed(step)
        tensors = {"w": torch.randn(64, 48, generator=generator), "experts": torch.randn(4, 6, 8, generator=generator)}
        save_sharded(tmp_path / f"step-{step}", tensors, parts)
    return plan([open_checkpoint(tmp_path / f"step-{step}") for step in (1, 2)], [1, 1])


PARTS = {
    "rows": {"w": (8, 1), "experts": (2, 1, 1)},
    "columns": {"w": (1, 8), "experts": (1, 3, 1)},
    "both": {"w": (4, 4), "experts": (2, 1, 4)},
}


@pytest.mark.parametrize("parts", list(PARTS))
@pytest.mark.parametrize("form", ["dcp", "safetensors"])
def test_a_tensor_in_shards_is_read_in_no_more_copies_than_its_pieces(tmp_path, monkeypatch, parts, form) -> None:
    monkeypatch.setattr(averaging_module, "_PIECE", 64)
    made = opened_twice(tmp_path, PARTS[parts])
    reads: list[int] = []
    copy, read = Sharded._copy, Sharded.read

    def counted_copy(self, here, to):
        pairs = [zip(here, box, strict=True) for box, _ in self._around(here)]
        reads.extend(1 for both in pairs if all(a < d and c < b for (a, b), (c, d) in both))
        copy(self, here, to)

    numbers: list[int] = []

    def counted_read(self, inside, first, last):
        numbers.append(last - first)
        return read(self, inside, first, last)

    monkeypatch.setattr(Sharded, "_copy", counted_copy)
    monkeypatch.setattr(Sharded, "read", counted_read)
    out = tmp_path / ("out" if form == "dcp" else "out.safetensors")
    write_average(made, out, form=form)
    numel = sum(one.numel for one in made.tensors.values())
    assert sum(numbers) <= 2 * numel + 100  # each element of each checkpoint once, and the first of each tensor
    shards = sum(len(one.saved.shards) for one in made.tensors.values())
    if form == "dcp":
        assert not reads  # a shard is read as it lies in the file
    else:
        assert len(reads) <= 2 * (3 * numel / 64 + 4 * shards)
    again = open_checkpoint(out)
    assert all(torch.equal(again.tensors[name].whole(), average(made, name)) for name in made.names)


def test_shards_that_overlap_or_are_missing_are_refused(tmp_path) -> None:
    save_sharded(tmp_path / "a", {"w": torch.ones(4, 4)}, {"w": (2, 2)})
    (tmp_path / "a/__3_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"there is no .*a/__3_0.distcp"):
        open_checkpoint(tmp_path / "a")


def test_the_hashes_of_a_folder_of_several_ranks_are_those_of_all_its_files(tmp_path) -> None:
    made = opened_twice(tmp_path, PARTS["rows"])
    write_average(made, tmp_path / "out")
    files = sorted((tmp_path / "step-2").glob("*.distcp"))
    assert len(files) == 8
    said = provenance_of(tmp_path / "out")[1]["sha256"]
    assert said == {one.name: sha256(one.read_bytes()).hexdigest() for one in files}
    assert json.loads((tmp_path / "out/polyak.average.json").read_text())[1]["sha256"] == said


def test_many_shards_are_compared_in_less_than_the_square_of_their_number() -> None:
    compared = 0

    class Counted(int):
        def __lt__(self, other):
            nonlocal compared
            compared += 1
            return int(self) < int(other)

    boxes = [((Counted(i), Counted(i + 1)), (Counted(0), Counted(8))) for i in range(500)]
    assert not _overlap(boxes)
    assert compared < 50 * len(boxes)

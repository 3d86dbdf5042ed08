"""Distances of checkpoints equal those of the tensors in float64."""

import checkpoint_files
import pytest
import torch

from polyak.checkpoints import distance as distance_module
from polyak.checkpoints import open_checkpoint
from polyak.checkpoints.distance import distances, overall
from polyak.cli import main


def compare(folder, first, second):
    for name, state in (("a", first), ("b", second)):
        torch.save(state, folder / f"{name}.pt")
    return {one.name: one for one in distances(open_checkpoint(folder / "a.pt"), open_checkpoint(folder / "b.pt"))}


@pytest.mark.parametrize("name", ["Lightning", "distributed", "Transformers or Accelerate, several files"])
def test_distances_are_those_in_float64_in_any_two_formats(tmp_path, monkeypatch, name) -> None:
    monkeypatch.setattr(distance_module, "_PIECE", 4)
    paths = checkpoint_files.write(name, tmp_path, 1.0), checkpoint_files.write("safetensors", tmp_path, 2.0)
    found = list(distances(*map(open_checkpoint, paths)))
    first, second = checkpoint_files.state(1.0), checkpoint_files.state(2.0)
    assert {one.name for one in found} == first.keys()
    square = of = 0.0
    for one in found:
        a, b = first[one.name].double(), second[one.name].double()
        square, of = square + float((b - a).square().sum()), of + float(a.square().sum())
        if a.numel():
            assert one.relative == pytest.approx(float((b - a).norm() / a.norm()))
            assert one.largest == float((b - a).abs().max())
        else:
            assert (one.relative, one.largest) == (0, 0)
    assert overall(found) == pytest.approx((square / of) ** 0.5)


def test_zeros_infinities_nan_and_other_shapes_have_distances_that_say_so(tmp_path) -> None:
    inf, nan = float("inf"), float("nan")
    first = {"zero": torch.zeros(2), "same": torch.zeros(2), "mask": torch.tensor([-inf, 1.0]), "nan": torch.ones(2)}
    second = {"zero": torch.ones(2), "same": torch.zeros(2), "mask": torch.tensor([-inf, 1.0])}
    found = compare(
        tmp_path,
        {**first, "shape": torch.ones(2), "only": torch.ones(1), "net.z": torch.ones(1)},
        {**second, "nan": torch.tensor([1.0, nan]), "shape": torch.ones(3), "net.z": torch.ones(1)},
    )
    assert (found["zero"].relative, found["zero"].largest) == (inf, 1)
    assert (found["same"].relative, found["same"].largest) == (0, 0)
    assert found["mask"].largest == 0
    assert str(found["nan"].relative) == str(found["nan"].largest) == "nan"
    assert str(found["shape"].relative) == "nan"
    assert found["shape"].shapes == ((2,), (3,))
    assert "only" not in found


def test_an_infinite_mask_hides_no_difference_of_other_tensors(tmp_path) -> None:
    mask = torch.tensor([-torch.inf, 0.0])
    found = compare(tmp_path, {"mask": mask, "w": torch.ones(4)}, {"mask": mask, "w": torch.full((4,), 2.0)})
    assert overall(found.values()) == 1


def test_nothing_in_common_is_no_distance_of_0(tmp_path, capsys) -> None:
    assert str(overall(compare(tmp_path, {"a": torch.ones(2)}, {"b": torch.ones(2)}).values())) == "nan"
    assert main(["diff", str(tmp_path / "a.pt"), str(tmp_path / "b.pt")]) == 0
    assert "no tensor has one name in both" in capsys.readouterr().out

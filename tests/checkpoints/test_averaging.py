"""The average of checkpoints equals that in float64, rounded once."""

import hashlib
import json
from fractions import Fraction

import checkpoint_files
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from polyak import (
    ArgumentError,
    CheckpointError,
    Cooldown,
    HalfLife,
    PowerFunction,
    ProfileError,
    Smoothing,
    Uniform,
    Window,
)
from polyak.checkpoints import average_checkpoints, open_checkpoint, weights_at
from polyak.checkpoints import averaging as averaging_module
from polyak.checkpoints.averaging import average, plan
from polyak.checkpoints.output import check_output, write_average

FORMATS = list(checkpoint_files.FORMATS)
NUMBERS = (1.0, 2.0, 4.0)


def reference(weights, states):
    """Return the average in float64, rounded once; integers of the last."""
    found = {}
    for name, last in states[-1].items():
        if last.is_floating_point():
            mean = sum(w * state[name].double() for w, state in zip(weights, states, strict=True)) / sum(weights)
            found[name] = mean.to(last.dtype)
        else:
            found[name] = last
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_the_average_of_a_format_is_that_in_float64_rounded_once(tmp_path, monkeypatch, name) -> None:
    monkeypatch.setattr(averaging_module, "_PIECE", 4)  # so that tensors are averaged in pieces
    paths = [checkpoint_files.write(name, tmp_path, number) for number in NUMBERS]
    made = plan([open_checkpoint(path) for path in paths], [1, 2, 1])
    write_average(made, tmp_path / "out.safetensors")
    got, want = load_file(tmp_path / "out.safetensors"), reference([1, 2, 1], [*map(checkpoint_files.state, NUMBERS)])
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        assert got[key].dtype == tensor.dtype
        assert torch.equal(got[key], tensor)


def test_checkpoints_of_several_formats_are_averaged_together(tmp_path) -> None:
    names = ["Lightning", "distributed", "Transformers or Accelerate, several files"]
    paths = [checkpoint_files.write(name, tmp_path, n) for name, n in zip(names, NUMBERS, strict=True)]
    made = plan([open_checkpoint(path) for path in paths], [1, 1, 1])
    want = reference([1, 1, 1], [*map(checkpoint_files.state, NUMBERS)])
    assert all(torch.equal(average(made, name), tensor) for name, tensor in want.items())


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".ckpt"])
def test_an_average_is_written_as_the_suffix_says_and_read_again(tmp_path, suffix) -> None:
    paths = [checkpoint_files.write("Lightning", tmp_path, number) for number in NUMBERS]
    made, out = plan([open_checkpoint(path) for path in paths], [1, 1, 1]), tmp_path / f"out{suffix}"
    check_output(out, made)
    write_average(made, out)
    got = load_file(out) if suffix == ".safetensors" else torch.load(out, weights_only=True)
    want = reference([1, 1, 1], [*map(checkpoint_files.state, NUMBERS)])
    assert list(got) == list(want) or suffix == ".safetensors"
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())
    assert sorted(one.name for one in tmp_path.iterdir()) == sorted([out.name, *(path.name for path in paths)])


@pytest.mark.parametrize("name", [name for name in FORMATS if name.startswith("Transformers")])
def test_a_folder_becomes_a_folder_of_the_same_files_with_an_index_and_without_the_optimizer(tmp_path, name) -> None:
    paths = [checkpoint_files.write(name, tmp_path, number) for number in NUMBERS]
    made, out = plan([open_checkpoint(path) for path in paths], [1, 1, 1]), tmp_path / "out"
    check_output(out, made)
    write_average(made, out)
    several = name.endswith("several files")
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    assert sorted(one.name for one in out.iterdir()) == ["config.json", *(files if several else ["model.safetensors"])]
    again = open_checkpoint(out)
    want = reference([1, 1, 1], [*map(checkpoint_files.state, NUMBERS)])
    assert again.layout == ({**made.newest.layout} if several else dict.fromkeys(want, "model.safetensors"))
    assert all(torch.equal(again.tensors[key].whole(), tensor) for key, tensor in want.items())


def test_the_output_says_what_it_was_made_from(tmp_path) -> None:
    (tmp_path / "run").mkdir()
    paths = [checkpoint_files.write("Lightning", tmp_path / "run", number) for number in NUMBERS]
    made = plan([open_checkpoint(path) for path in paths], [1, 2, 1])
    write_average(made, tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    said = json.loads(metadata["polyak.average"])
    assert [one["weight"] for one in said] == [0.25, 0.5, 0.25]
    assert said[1].pop("sha256") == {"step-200.ckpt": sha256(paths[1])}
    assert said[1] == {
        "path": "run/step-200.ckpt",
        "weights": "state_dict",
        "moment": {"ba": 200.0, "ep": 2.0},
        "weight": 0.5,
    }


def sha256(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_hashes_of_a_folder_are_those_of_its_files_with_weights(tmp_path) -> None:
    for name in ("Transformers or Accelerate, several files", "distributed"):
        (tmp_path / name).mkdir()
        paths = [checkpoint_files.write(name, tmp_path / name, number) for number in NUMBERS]
        out = tmp_path / f"{name}.safetensors"
        average_checkpoints(paths, out)
        with safe_open(out, framework="pt") as file:
            said = json.loads(file.metadata()["polyak.average"])
        weights = [one for one in paths[0].iterdir() if one.suffix in (".safetensors", ".distcp")]
        assert said[0]["sha256"] == {one.name: sha256(one) for one in weights}


def test_tensors_that_are_given_are_written_instead_of_their_average(tmp_path) -> None:
    opened = save(tmp_path, {"a": torch.ones(2), "b": torch.ones(1)}, {"a": torch.zeros(2), "b": torch.ones(1)})
    write_average(plan(opened, [1, 1]), tmp_path / "out.safetensors", given={"b": torch.tensor([7.0])})
    assert {name: one.tolist() for name, one in load_file(tmp_path / "out.safetensors").items()} == {
        "a": [0.5, 0.5],
        "b": [7.0],
    }


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_extra_states_are_those_of_the_newest_whatever_their_length(tmp_path, dtype) -> None:
    states = [{"w": torch.ones(2), "layer._extra_state": torch.arange(n).to(dtype)} for n in (3, 5)]
    made = plan(save(tmp_path, *states), [1, 1])
    assert torch.equal(average(made, "layer._extra_state"), torch.arange(5).to(dtype))


def test_extra_states_that_are_no_tensors_are_those_of_the_newest_if_they_are_plain_and_else_listed(tmp_path) -> None:
    for i in (1, 2):
        state = {"w": torch.full((2,), float(i)), "a._extra_state": {"n": [i]}, "b._extra_state": Fraction(1, 2)}
        torch.save(state, tmp_path / f"{i}.pt")
    opened = [open_checkpoint(tmp_path / f"{i}.pt") for i in (1, 2)]
    assert (list(opened[1].tensors), opened[1].extra) == (["w"], {"a._extra_state": {"n": [2]}})
    assert opened[1].left == ("b._extra_state",)
    write_average(plan(opened, [1, 1]), tmp_path / "out.pt")
    got = torch.load(tmp_path / "out.pt", weights_only=True)
    assert got["w"].tolist() == [1.5, 1.5]
    assert got["a._extra_state"] == {"n": [2]}


def save(folder, *states):
    """Save state dicts, and open them."""
    for i, state in enumerate(states):
        save_file(state, folder / f"{i}.safetensors")
    return [open_checkpoint(folder / f"{i}.safetensors") for i in range(len(states))]


def test_checkpoints_of_other_names_are_refused_with_a_list_and_averaged_in_common_on_request(tmp_path) -> None:
    opened = save(tmp_path, {"a": torch.ones(2), "b": torch.ones(2)}, {"a": torch.zeros(2), "c": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"0.safetensors differs .* it lacks c; only it has b\); .*--common"):
        plan(opened, [1, 1])
    made = plan(opened, [1, 1], common=True)
    assert (list(made.names), sorted(made.left_out)) == (["a"], ["b", "c"])
    assert torch.equal(average(made, "a"), torch.full((2,), 0.5))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"a": torch.ones(3)}, r"a has \(2,\) in .*0.safetensors, and \(3,\)"),
        ({"a": torch.ones(2, dtype=torch.int64), "b": torch.ones(2)}, r"numbers of one kind \(a has torch.float32"),
        ({"b": torch.ones(2)}, "must have tensors in common"),
    ],
    ids=["another shape", "integers", "no common names"],
)
def test_checkpoints_of_another_model_are_refused_by_tensor(tmp_path, other, said) -> None:
    with pytest.raises(CheckpointError, match=said):
        plan(save(tmp_path, {"a": torch.ones(2)}, other), [1, 1], common=True)


@pytest.mark.parametrize("weights", [[1], [1, -1], [0, 0], [1, float("nan")], [1, float("inf")]], ids=str)
def test_weights_must_be_weights(tmp_path, weights) -> None:
    with pytest.raises(ArgumentError, match="weight"):
        plan(save(tmp_path, {"a": torch.ones(2)}, {"a": torch.ones(2)}), weights)


def test_nan_is_refused_with_the_checkpoint_and_one_that_counts_nothing_is_not_read(tmp_path) -> None:
    opened = save(tmp_path, {"a": torch.tensor([1.0, torch.nan])}, {"a": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"a in .*0.safetensors has NaN"):
        average(plan(opened, [1, 1]), "a")
    assert torch.equal(average(plan(opened, [0, 1]), "a"), torch.ones(2))


def test_infinities_of_masks_stay_and_opposite_ones_are_refused(tmp_path) -> None:
    mask, inverse = {"a": torch.tensor([-torch.inf, 0.0])}, {"a": torch.tensor([torch.inf, 0.0])}
    assert torch.equal(average(plan(save(tmp_path, mask, mask), [1, 1]), "a"), mask["a"])
    with pytest.raises(CheckpointError, match="inf and -inf"):
        average(plan(save(tmp_path, mask, inverse), [1, 1]), "a")


def test_after_an_error_nothing_is_written_and_an_old_output_stays(tmp_path) -> None:
    (tmp_path / "in").mkdir()
    opened = save(
        tmp_path / "in", {"a": torch.ones(2), "b": torch.tensor([torch.nan])}, {"a": torch.ones(2), "b": torch.ones(1)}
    )
    (tmp_path / "out.safetensors").write_text("old")
    for name in ("out.safetensors", "out.pt", "new.safetensors"):
        with pytest.raises(CheckpointError, match="NaN"):
            write_average(plan(opened, [1, 1]), tmp_path / name)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["in", "out.safetensors"]
    assert (tmp_path / "out.safetensors").read_text() == "old"


def test_a_checkpoint_that_is_written_while_it_is_averaged_is_refused(tmp_path) -> None:
    (tmp_path / "in").mkdir()
    opened = save(tmp_path / "in", {"a": torch.ones(2)}, {"a": torch.zeros(2)})

    def overwrite(name) -> None:
        save_file({"a": torch.full((2,), 5.0)}, tmp_path / "in/new")
        (tmp_path / "in/new").replace(tmp_path / "in/1.safetensors")

    with pytest.raises(CheckpointError, match=r"1.safetensors did\)"):
        write_average(plan(opened, [1, 1]), tmp_path / "out.safetensors", overwrite)
    assert not (tmp_path / "out.safetensors").exists()


@given(st.lists(st.floats(1, 1000), min_size=1, max_size=8, unique=True), st.sampled_from(["half", "power", "uniform"]))
@settings(max_examples=50)
def test_weights_sum_to_1_and_none_is_negative(times, kind) -> None:
    profile = {"half": HalfLife("50ba"), "power": PowerFunction(sigma_rel=0.1), "uniform": Uniform("0ba")}[kind]
    weights = weights_at(profile, sorted(times))
    assert sum(weights) == pytest.approx(1)
    assert min(weights) >= 0


def test_weights_follow_the_profile_at_the_times_of_the_checkpoints() -> None:
    assert weights_at(HalfLife("1000000000ba"), [10, 20, 30, 40]) == pytest.approx([0.25] * 4)
    assert weights_at(HalfLife("10ba"), [10, 20]) == pytest.approx([1 / 3, 2 / 3])
    assert weights_at(Smoothing(0.5), [1, 2, 3]) == pytest.approx([1 / 7, 2 / 7, 4 / 7])
    assert weights_at(Uniform("0ba"), [10, 20, 40]) == pytest.approx([0.25, 0.25, 0.5])
    assert weights_at(Window("20ba"), [10, 20, 30, 40]) == pytest.approx([0, 0, 0.5, 0.5])
    assert weights_at(HalfLife("10ba"), [7]) == [1.0]


def test_times_must_increase() -> None:
    with pytest.raises(ProfileError, match="must increase"):
        weights_at(HalfLife("10ba"), [10, 10])


def test_the_order_is_that_of_the_times_and_without_times_and_with_weights_the_given_one(tmp_path) -> None:
    paths = [tmp_path / f"{name}.safetensors" for name in ("step-30", "step-4", "step-100")]
    for i, path in enumerate(paths):
        save_file({"a": torch.tensor([float(i)])}, path)
    out = tmp_path / "out.safetensors"

    def order(**options) -> list[str]:
        made = average_checkpoints(paths, out, overwrite=True, **options)
        return [one.path.stem for one in made.checkpoints]

    assert order() == ["step-4", "step-30", "step-100"]
    assert order(last=2) == ["step-30", "step-100"]
    assert order(last=9) == ["step-4", "step-30", "step-100"]
    assert order(times=["3ep", "2ep", "1ep"]) == ["step-100", "step-4", "step-30"]
    assert order(weights=[1, 1, 2]) == ["step-30", "step-4", "step-100"]
    assert load_file(out)["a"].item() == (0 + 1 + 2 * 2) / 4
    assert order(weights=[1, 1, 2], last=1) == ["step-100"]
    for wrong in (
        {"weights": [1]},
        {"times": ["1ba"]},
        {"last": 0},
        {"weights": [1, 1, 1], "profile": HalfLife("1ba")},
    ):
        with pytest.raises(ArgumentError):
            order(**wrong)


def test_the_order_is_that_of_people_where_no_checkpoint_says_when_it_was_saved(tmp_path) -> None:
    for name in ("model10", "model9"):
        save_file({"a": torch.zeros(1), "count": torch.tensor([int(name[5:])])}, tmp_path / f"{name}.safetensors")
    paths = sorted(tmp_path.glob("*.safetensors"))
    assert paths[0].stem == "model10"
    made = average_checkpoints(paths, tmp_path / "out.safetensors")
    assert [one.path.stem for one in made.checkpoints] == ["model9", "model10"]
    assert load_file(tmp_path / "out.safetensors")["count"] == 10


def test_a_cooldown_weighs_the_checkpoints_in_it() -> None:
    assert weights_at(Cooldown("20ba"), [10, 20, 30, 40]) == pytest.approx([0, 0, 0.5, 0.5])
    assert weights_at(Cooldown("40ba", "1-square"), [10, 20, 30, 40]) == pytest.approx([1 / 16, 3 / 16, 5 / 16, 7 / 16])


def test_a_tensor_that_repeats_its_numbers_is_refused_and_not_written_out(tmp_path) -> None:
    torch.save({"a": torch.ones(1).expand(1 << 40), "b": torch.ones(3)}, tmp_path / "it.pt")
    with pytest.raises(CheckpointError, match="a repeats its numbers"):
        open_checkpoint(tmp_path / "it.pt")


def test_checkpoints_of_one_epoch_are_in_the_order_of_their_steps(tmp_path) -> None:
    paths = [tmp_path / name for name in ("b.ckpt", "a.ckpt", "last.ckpt")]
    for path, step in zip(paths, (300, 100, 200), strict=True):
        torch.save({"state_dict": {"w": torch.full((2,), float(step))}, "epoch": 0, "global_step": step}, path)
    made = average_checkpoints(paths, tmp_path / "out.safetensors", last=2)
    assert [one.path.name for one in made.checkpoints] == ["last.ckpt", "b.ckpt"]
    assert load_file(tmp_path / "out.safetensors")["w"].tolist() == [250.0, 250.0]


def test_checkpoints_of_one_epoch_without_steps_are_in_the_order_of_their_names(tmp_path) -> None:
    paths = [tmp_path / name for name in ("part-10.pt", "part-9.pt")]
    for number, path in enumerate(paths):
        torch.save({"model": {"w": torch.full((2,), float(number))}, "epoch": 1}, path)
    made = average_checkpoints(paths, tmp_path / "out.safetensors")
    assert [one.path.name for one in made.checkpoints] == ["part-9.pt", "part-10.pt"]


def test_a_share_of_a_run_whose_epochs_are_all_0_is_refused(tmp_path) -> None:
    for number in (1, 2):
        torch.save({"model": {"w": torch.full((2,), float(number))}, "epoch": 0}, tmp_path / f"part-{number}.pt")
    with pytest.raises(ProfileError, match="times of checkpoints must increase"):
        average_checkpoints(sorted(tmp_path.glob("*.pt")), tmp_path / "out.safetensors", profile=HalfLife("0.1dur"))


def test_complex_weights_alone_are_averaged(tmp_path) -> None:
    for step in (1, 3):
        torch.save({"model": {"w": torch.full((2,), step * 1j)}, "step": step}, tmp_path / f"{step}.pt")
    average_checkpoints(sorted(tmp_path.glob("*.pt")), tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors")["w"].tolist() == [2j, 2j]


def test_an_epoch_of_0_counts_as_one_that_has_ended(tmp_path) -> None:
    for epoch in range(3):
        torch.save({"model": {"w": torch.full((2,), float(epoch))}, "epoch": epoch}, tmp_path / f"epoch_{epoch}.pth")
    made = average_checkpoints(sorted(tmp_path.glob("*.pth")), tmp_path / "out.safetensors", profile=HalfLife("1ep"))
    assert made.weights == pytest.approx([1 / 7, 2 / 7, 4 / 7])


def test_names_that_safetensors_cannot_hold_are_refused(tmp_path) -> None:
    for name in ("__metadata__", "w.\udcff"):
        torch.save({name: torch.ones(2)}, tmp_path / "step-1.pt")
        with pytest.raises(CheckpointError, match="names must be text that safetensors can hold"):
            average_checkpoints([tmp_path / "step-1.pt"], tmp_path / "out.safetensors")
        assert [one.name for one in tmp_path.iterdir()] == ["step-1.pt"]

"""An output is written in any format, by one process or several, and a run that was stopped is resumed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from hashlib import sha256
from pathlib import Path

import checkpoint_files
import pytest
import torch
import torch.distributed.checkpoint as dcp
from forking import fork, forks
from paths import SUPPORT
from safetensors.torch import load_file, save_file
from torch import nn
from waiting import wait_until

import polyak.cli
from polyak import ArgumentError, CheckpointError
from polyak.checkpoints import as_safetensors, open_checkpoint, units
from polyak.checkpoints.averaging import average, plan
from polyak.checkpoints.output import check_output, write_average

NUMBERS = (1.0, 2.0, 4.0)
FORMS = {"hf": "out", "safetensors": "out.safetensors", "pt": "out.pt", "dcp": "out.1"}


def opened(name: str, folder):
    return plan([open_checkpoint(checkpoint_files.write(name, folder, number)) for number in NUMBERS], [1, 1, 1])


def loaded(form: str, path, made) -> dict[str, torch.Tensor]:
    """Load an output as its users do."""
    if form == "pt":
        return torch.load(path, weights_only=True)
    if form == "dcp":
        state = {name: torch.empty_like(average(made, name)) for name in made.names}
        keys = made.newest.place
        with warnings.catch_warnings(action="ignore"):
            dcp.load({keys: state} if keys and made.newest.tensors["net.scale"].saved else state, checkpoint_id=path)
        return state
    return load_file(path / "model.safetensors" if form == "hf" else path)


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("name", ["Lightning", "distributed", "Transformers or Accelerate, one file"])
def test_checkpoints_of_a_format_are_written_in_any_other_and_load_there(tmp_path, name, form) -> None:
    made, out = opened(name, tmp_path), tmp_path / FORMS[form]
    assert check_output(out, made, form) == form
    write_average(made, out, form=form)
    got = loaded(form, out, made)
    for key in made.names:
        assert torch.equal(got[key], average(made, key)), key
    again = open_checkpoint(out)
    assert all(torch.equal(again.tensors[key].whole(), average(made, key)) for key in made.names)
    config = name.startswith("Transformers") and form in {"hf", "dcp"}
    assert not out.is_dir() or (out / "config.json").exists() == config
    assert not [one for one in tmp_path.iterdir() if one.name.startswith(".")]


@pytest.mark.parametrize(
    "name", ["distributed", "distributed, torchtitan", "distributed, Megatron", "distributed, Lightning"]
)
def test_folders_of_dcp_become_such_a_folder_without_the_optimizer(tmp_path, name) -> None:
    made, out = opened(name, tmp_path), tmp_path / "out"
    assert check_output(out, made) == "dcp"
    write_average(made, out)
    metadata = dcp.FileSystemReader(out).read_metadata()
    before = dcp.FileSystemReader(made.newest.path).read_metadata()
    assert metadata.state_dict_metadata.keys() == {made.newest.tensors[one].saved.fqn for one in made.names}
    for key, item in metadata.state_dict_metadata.items():
        assert item == before.state_dict_metadata[key]
        assert metadata.planner_data[key] == before.planner_data[key]
    assert (out / "meta.pt").exists() == name.endswith("Lightning")
    assert {one.name for one in out.glob("*.distcp")} <= {one.name for one in made.newest.path.iterdir()}


def module_like(tensors: dict[str, torch.Tensor]) -> nn.Module:
    """Return a model whose state dict has these names, with other numbers."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        inner = root
        for one in path:
            inner = inner._modules.setdefault(one, nn.Module())  # "half" is a method of modules too
        inner.register_buffer(last, torch.full_like(tensor, 7))
    return root


@pytest.mark.parametrize("name", list(checkpoint_files.FORMATS))
def test_an_average_of_a_format_loads_again_into_a_model(tmp_path, name) -> None:
    made = opened(name, tmp_path)
    out = tmp_path / ("out.ckpt" if made.newest.path.is_file() else "out")
    out = out.with_suffix(".safetensors") if name == "safetensors" or "older" in name else out
    form = check_output(out, made)
    write_average(made, out)
    if form == "dcp" and made.newest.folder:  # of Accelerate
        out /= made.newest.folder
    want = {key: average(made, key) for key in made.names}
    model = module_like(want)
    model.load_state_dict(loaded(form, out, made) if form != "hf" else all_of(out))
    got = dict(model.named_buffers())
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], tensor) for key, tensor in want.items())


def all_of(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    ("name", "folder", "key"),
    [
        ("distributed, torchtitan", "", ""),
        ("distributed, Megatron", "", ""),
        ("distributed, Lightning", "", "state_dict"),
        ("distributed, Accelerate or Transformers", "pytorch_model_fsdp_0", "model"),
    ],
    ids=["torchtitan", "Megatron", "Lightning", "Accelerate or Transformers"],
)
def test_a_model_loads_by_dcp_what_became_of_the_folders_of_a_library(tmp_path, name, folder, key) -> None:
    made, out = opened(name, tmp_path), tmp_path / "out"
    write_average(made, out)
    want = {name: average(made, name) for name in made.names}
    model = module_like(want)
    state = model.state_dict()
    with warnings.catch_warnings(action="ignore"):  # that there is one process
        dcp.load({key: state} if key else state, checkpoint_id=out / folder)
    model.load_state_dict(state)
    got = dict(model.named_buffers())
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


def test_a_folder_of_accelerate_under_fsdp_keeps_its_folder(tmp_path) -> None:
    made, out = opened("distributed, Accelerate or Transformers", tmp_path), tmp_path / "out"
    write_average(made, out)
    assert sorted(one.name for one in out.iterdir()) == ["config.json", "polyak.average.json", "pytorch_model_fsdp_0"]
    assert torch.equal(open_checkpoint(out).tensors["net.scale"].whole(), average(made, "net.scale"))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "size"), [("fsdp, blocks", 3), ("tp", 2)])
def test_an_average_of_several_ranks_keeps_their_shards_and_loads_by_dcp(ranks, tmp_path, kind, size) -> None:
    want = ranks.run(size, checkpoint_files.saves_model, kind, str(tmp_path / "saved"))[0]
    made, out = plan([open_checkpoint(tmp_path / "saved")], [1]), tmp_path / "out"
    write_average(made, out)
    assert {one.name for one in out.glob("*.distcp")} == {one.name for one in (tmp_path / "saved").glob("*.distcp")}
    before, after = (dcp.FileSystemReader(one).read_metadata() for one in (tmp_path / "saved", out))
    assert after.state_dict_metadata == before.state_dict_metadata
    state = {name: torch.empty_like(tensor) for name, tensor in want.items()}
    with warnings.catch_warnings(action="ignore"):
        dcp.load({"model": state}, checkpoint_id=out)
    assert all(torch.equal(state[name], tensor) for name, tensor in want.items())


def test_a_folder_of_dcp_says_what_it_was_made_from_in_a_file_that_no_other_output_takes(tmp_path) -> None:
    made, out = opened("distributed", tmp_path), tmp_path / "out"
    write_average(made, out)
    said = json.loads((out / "polyak.average.json").read_text())
    assert [one["path"] for one in said] == ["step-100", "step-200", "step-400"]
    for one in said:
        files = [path for path in (tmp_path / one["path"]).glob("*.distcp") if path.name in one["sha256"]]
        assert {file.name: sha256(file.read_bytes()).hexdigest() for file in files} == one["sha256"]
    write_average(plan([open_checkpoint(out)], [1]), tmp_path / "again", form="hf")
    assert [one.name for one in (tmp_path / "again").iterdir()] == ["model.safetensors"]


def test_extra_states_of_dcp_are_those_of_the_newest(tmp_path) -> None:
    for i in (1, 2):
        state = {"model": {"w": torch.ones(2) * i, "layer._extra_state": f"state {i}"}}
        with warnings.catch_warnings(action="ignore"):
            dcp.save(state, checkpoint_id=tmp_path / f"step-{i}", no_dist=True)
    write_average(plan([open_checkpoint(tmp_path / f"step-{i}") for i in (1, 2)], [1, 1]), tmp_path / "out")
    state = {"model": {"w": torch.zeros(2), "layer._extra_state": ""}}
    with warnings.catch_warnings(action="ignore"):
        dcp.load(state, checkpoint_id=tmp_path / "out")
    assert state["model"]["w"].tolist() == [1.5, 1.5]
    assert state["model"]["layer._extra_state"] == "state 2"


def test_a_file_of_torch_has_the_checksums_of_its_tensors(tmp_path) -> None:
    write_average(opened("Lightning", tmp_path), tmp_path / "out.pt")
    with zipfile.ZipFile(tmp_path / "out.pt") as archive:
        assert archive.testzip() is None
        sums = [one.CRC for one in archive.infolist() if "/data/" in one.filename and one.file_size]
    assert all(sums)


@pytest.mark.parametrize(
    ("name", "form", "said"),
    [
        ("out.safetensors", "hf", "must have no suffix of a file as hf"),
        ("out", "safetensors", "must have .safetensors as safetensors"),
        ("out.txt", "pt", r"must have .pt, .pth, .ckpt, .bin as pt"),
        ("out.txt", None, "or say which by --as"),
    ],
)
def test_a_format_that_does_not_fit_the_name_is_refused(tmp_path, name, form, said) -> None:
    with pytest.raises(ArgumentError, match=said):
        check_output(tmp_path / name, opened("Lightning", tmp_path), form)


class _Stop:
    """Stops a run before the tensor of a number."""

    def __init__(self, before: int) -> None:
        self.left, self.names = before, []

    def __call__(self, name: str) -> None:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        self.names.append(name)


@pytest.mark.parametrize("form", list(FORMS))
def test_a_run_that_was_stopped_is_resumed_and_does_no_finished_unit_again(tmp_path, monkeypatch, form) -> None:
    monkeypatch.setattr("polyak.checkpoints.as_dcp._FILE_BYTES", 1)  # a unit for each tensor
    for module in ("as_torch", "as_safetensors"):
        monkeypatch.setattr(f"polyak.checkpoints.{module}.in_groups", lambda names, size_of: [[name] for name in names])
    monkeypatch.setattr(
        as_safetensors, "layout_of_folder", lambda job: dict.fromkeys(job.plan.names, "model.safetensors")
    )
    (tmp_path / "in").mkdir()
    made, out = opened("Lightning", tmp_path / "in"), tmp_path / FORMS[form]
    with pytest.raises(KeyboardInterrupt):
        write_average(made, out, _Stop(4), form=form)
    assert not out.exists()
    again = _Stop(99)
    write_average(made, out, again, form=form)
    assert len(again.names) == len(made.names) - 4
    assert all(torch.equal(tensor, average(made, key)) for key, tensor in loaded(form, out, made).items())
    assert sorted(one.name for one in tmp_path.iterdir()) == ["in", out.name]


def averages(folder: Path, line: list[str]) -> None:
    """Run the command as a process does that notes each tensor, and holds before the sixth until it is stopped."""
    os.chdir(folder)
    noted = Path("noted")

    def note(_: object, name: str) -> None:
        begun = noted.read_text().splitlines() if noted.exists() else []
        while len(begun) == 5 and not Path("stopped").exists():
            time.sleep(0.01)
        noted.write_text("\n".join([*begun, name]))

    signal.signal(signal.SIGINT, signal.default_int_handler)
    as_safetensors.in_groups = lambda names, size_of: [[name] for name in names]
    polyak.cli.average._Progress.__call__ = note
    with Path("said").open("w") as said, contextlib.redirect_stderr(said):
        code = polyak.cli.main(line)
    sys.exit(code)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
@forks
def test_a_process_that_is_stopped_leaves_what_the_same_command_resumes(tmp_path, number) -> None:
    made = opened("Lightning", tmp_path)
    line = ["average", *(one.path.name for one in made.checkpoints), "-o", "out.safetensors"]
    process = fork(lambda: averages(tmp_path, line))
    wait_until(lambda: len([*tmp_path.rglob("done/tensors-*.json")]) == 5 or not process.is_alive())
    assert process.is_alive(), (tmp_path / "said").read_text()
    os.kill(process.pid, number)
    process.join()
    if number is signal.SIGINT:
        assert process.exitcode == 130
        said = (tmp_path / "said").read_text()
        assert said == "polyak average: interrupted; run the same command again to resume\n"
    assert not (tmp_path / "out.safetensors").exists()
    (tmp_path / "stopped").touch()
    process = fork(lambda: averages(tmp_path, line))
    process.join()
    assert process.exitcode == 0, (tmp_path / "said").read_text()
    assert sorted((tmp_path / "noted").read_text().splitlines()) == sorted(made.names)  # each once
    got = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(got[name], average(made, name)) for name in made.names)
    assert not [one for one in tmp_path.iterdir() if one.name.startswith(".")]


def test_a_run_of_another_plan_does_not_resume_the_one_that_was_stopped(tmp_path) -> None:
    (tmp_path / "in").mkdir()
    made, out = opened("Lightning", tmp_path / "in"), tmp_path / "out.safetensors"
    with pytest.raises(KeyboardInterrupt):
        write_average(made, out, _Stop(4))
    other = plan(made.checkpoints, [1, 0, 0])
    write_average(other, out)
    assert all(torch.equal(tensor, average(other, key)) for key, tensor in load_file(out).items())


def test_two_runs_do_not_write_one_output(tmp_path) -> None:
    made, out = opened("Lightning", tmp_path), tmp_path / "out.safetensors"

    def again(name: str) -> None:
        write_average(made, out)

    with pytest.raises(CheckpointError, match="must be written by one run"):
        write_average(made, out, again)


def test_units_hold_at_most_so_many_bytes_or_one_tensor() -> None:
    sizes = {"a": 1, "b": 2, "c": 9, "d": 3}
    assert units.in_groups(list(sizes), sizes.__getitem__, 4) == [["a", "b"], ["c"], ["d"]]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["safetensors", "dcp"])
def test_several_processes_write_the_bits_of_one(ranks, tmp_path, monkeypatch, form) -> None:
    generator = torch.Generator().manual_seed(0)
    for i in (1, 2):
        tensors = {f"w{n}": torch.randn(100, 3, generator=generator) for n in range(5)}
        save_file(tensors, tmp_path / f"step-{i}.safetensors")
    names = [f"{who}{'.safetensors' if form == 'safetensors' else ''}" for who in ("one", "several")]
    one, several = (["average", "step-1.safetensors", "step-2.safetensors", "--as", form, "-o", name] for name in names)
    monkeypatch.chdir(tmp_path)
    assert checkpoint_files.runs_in_small_units(str(tmp_path), *one) == 0
    if form == "safetensors":
        script, options = SUPPORT / "checkpoint_files.py", ["--standalone", "--nproc-per-node", "3"]
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", *options, script, tmp_path, *several],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    else:
        assert ranks.run(3, checkpoint_files.runs_in_small_units, str(tmp_path), *several) == [0, 0, 0]
    files = [[one for one in (tmp_path / name).rglob("*") if one.is_file()] or [tmp_path / name] for name in names]
    assert len(files[0]) == len(files[1])
    one, several = (open_checkpoint(tmp_path / name) for name in names)
    for key, tensor in one.tensors.items():
        assert torch.equal(several.tensors[key].whole(), tensor.whole())
    if form == "safetensors":
        assert files[0][0].read_bytes() == files[1][0].read_bytes()

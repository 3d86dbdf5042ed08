"""Each output says what it was made from, and loads where it should as if it did not."""

import zipfile
from hashlib import sha256

import checkpoint_files
import pytest
import torch
from safetensors.torch import save_file

from polyak.checkpoints import average_checkpoints, open_checkpoint, provenance_of, summarize
from polyak.checkpoints import output as output_module
from polyak.checkpoints.averaging import plan
from polyak.checkpoints.output import write_average
from polyak.cli import main

OUTPUTS = {"pt": "out.pt", "safetensors": "out.safetensors", "hf": "out", "dcp": "out.1"}


@pytest.mark.parametrize("form", list(OUTPUTS))
def test_an_output_says_the_paths_hashes_steps_and_weights_of_its_checkpoints(tmp_path, form) -> None:
    (tmp_path / "run").mkdir()
    paths = [checkpoint_files.write("Lightning", tmp_path / "run", number) for number in (1.0, 2.0)]
    out = tmp_path / OUTPUTS[form]
    write_average(plan([open_checkpoint(path) for path in paths], [1, 3]), out, form=form)
    assert provenance_of(out) == [
        {
            "path": f"run/{path.name}",
            "weights": "state_dict",
            "moment": {"ba": 100.0 * number, "ep": number},
            "weight": weight,
            "sha256": {path.name: sha256(path.read_bytes()).hexdigest()},
        }
        for path, number, weight in zip(paths, (1.0, 2.0), (0.25, 0.75), strict=True)
    ]


def test_a_file_of_torch_with_its_provenance_is_loaded_in_all_ways_of_torch(tmp_path) -> None:
    for step in (1, 2):
        torch.save({"w": torch.full((100,), float(step)), "é.b": torch.ones(3)}, tmp_path / f"step-{step}-é.pt")
    out = tmp_path / "out.pt"
    average_checkpoints(sorted(tmp_path.glob("step-*")), out)
    assert provenance_of(out)[0]["path"] == "step-1-é.pt"
    for options in ({}, {"weights_only": True}, {"weights_only": False}, {"mmap": True}, {"map_location": "meta"}):
        state = torch.load(out, **options)
        assert list(state) == ["w", "é.b"]
        assert options.get("map_location") or state["w"].tolist() == [1.5] * 100
    with out.open("rb") as file:
        assert torch.load(file)["w"].tolist() == [1.5] * 100
    with zipfile.ZipFile(out) as archive:
        assert archive.testzip() is None
        for entry in archive.infolist():  # the header next to the data has the checksum too, or says that it follows
            with out.open("rb") as file:
                file.seek(entry.header_offset)
                header = file.read(30)
            assert int.from_bytes(header[14:18], "little") == entry.CRC or header[6] & 8, entry
    (again,) = summarize(out).state_dicts
    assert list(again.tensors) == ["w", "é.b"]


def test_a_file_of_torch_of_a_run_that_was_stopped_has_its_provenance(tmp_path, monkeypatch) -> None:
    paths = [checkpoint_files.write("Lightning", tmp_path, number) for number in (1.0, 2.0)]
    made = plan([open_checkpoint(path) for path in paths], [1, 1])
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(output_module, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        write_average(made, tmp_path / "out.pt")
    write_average(made, tmp_path / "out.pt")
    assert [one["path"] for one in provenance_of(tmp_path / "out.pt")] == ["step-100.ckpt", "step-200.ckpt"]


def test_a_file_of_others_says_nothing_of_what_it_was_made_from(tmp_path) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "a.pt")
    save_file({"w": torch.ones(1)}, tmp_path / "b.safetensors", {"polyak.average": "no JSON"})
    (tmp_path / "c").write_bytes(b"something else")
    (tmp_path / "d").mkdir()
    for name in ("a.pt", "b.safetensors", "c", "d"):
        assert provenance_of(tmp_path / name) == []


def test_polyak_inspect_says_what_an_average_was_made_from(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for step in (1, 2, 3):
        torch.save({"w": torch.ones(1)}, f"step-{step}.pt")
    average_checkpoints(["step-1.pt", "step-2.pt", "step-3.pt"], "out.pt")
    assert main(["inspect", "out.pt"]) == 0
    said = capsys.readouterr().out
    assert "made from  step-1.pt (0.3333), step-2.pt (0.3333), step-3.pt (0.3333)" in said

"""Files from anywhere: ``polyak convert`` reads them, or refuses in one line, within a GiB, and leaves nothing."""

import argparse
import collections
import json
import os
import socket
import zipfile
from pathlib import Path

import hostile
import pytest
import torch
from converting import assert_is, convert
from torch import nn
from torch.optim.swa_utils import AveragedModel

from polyak import CheckpointError
from polyak.cli import main
from polyak.compat import load, read
from polyak.compat.pickles import StandIn

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # torch's own, of nested and quantized tensors


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """The exit code of each of `hostile.FILES`, what was said, and what lies in the folder afterwards."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "files").mkdir()
    commands = []
    for k, (kind, content) in enumerate(hostile.FILES.values()):
        (folder / "files" / f"{k}{kind}").write_bytes(content())
        (folder / f"out{k}").mkdir()
        commands.append(["convert", f"files/{k}{kind}", "-o", f"out{k}/o.safetensors"])
    found = hostile.run(folder, commands)
    return {
        name: (*one, sorted(path.name for path in (folder / f"out{k}").iterdir()))
        for k, (name, one) in enumerate(zip(hostile.FILES, found, strict=True))
    }


@pytest.mark.parametrize("name", hostile.FILES)
def test_a_hostile_file_is_refused_in_one_line_within_a_gib_and_nothing_is_left(outcomes, name):
    code, said, left = outcomes[name]
    assert code == 2, said
    assert said.count("\n") == 1, said
    assert said.startswith("polyak convert: ")
    assert len(said) < 1500
    assert left == []


@pytest.mark.parametrize("name", hostile.CODE)
def test_no_code_that_a_pickle_asks_for_runs(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    before = {key: id(value) for key, value in vars(collections.OrderedDict).items()}
    rebuild = dict(vars(torch._utils._rebuild_tensor_v2))
    pickled = b"\x80\x02}(X\x08\0\0\0module.w" + hostile.tensor() + b"X\x0a\0\0\0n_averagedK\x03X\x01\0\0\0x"
    Path("a.pt").write_bytes(hostile.archive(pickled + hostile.CODE[name] + b"u.", hostile.FOUR))
    main(["convert", "a.pt", "-o", "out.safetensors"])
    assert not Path("ran").exists()
    assert {key: id(value) for key, value in vars(collections.OrderedDict).items()} == before
    assert dict(vars(torch._utils._rebuild_tensor_v2)) == rebuild


class Config(dict):
    """Like EasyDict, and Lightning's AttributeDict."""


class Options:
    def __init__(self) -> None:
        self.inner = {"rates": [0.1], "path": Path("x")}


def test_containers_and_objects_next_to_an_average_are_passed_over(tmp_path):
    numpy = pytest.importorskip("numpy")
    averaged = AveragedModel(nn.Linear(2, 3))
    others = {
        "args": argparse.Namespace(lr=0.1),
        "config": Config(lr=0.1),
        "options": Options(),
        "losses": collections.deque([1.0], maxlen=3),
        "by_name": collections.defaultdict(list, a=[1]),
        "ordered": collections.OrderedDict(a=1),
        "score": numpy.float64(0.5),
        "random": numpy.random.get_state(),
        "class": Options,
        "sparse": torch.eye(3).to_sparse(),
        "meta": torch.ones(3, device="meta"),
        "dtype": torch.float16,
        "keys": {(1, (2, 3)): 1, torch.device("cpu"): 2},
        "set": {1, 2},
    }
    for legacy in (False, True):
        options = {"_use_new_zipfile_serialization": not legacy}
        torch.save({"ema": averaged.state_dict(), **others}, tmp_path / "a.pt", **options)
        assert_is(averaged.module.state_dict(), convert(tmp_path / "a.pt"))
        torch.save({**averaged.state_dict(), **others, "args": None}, tmp_path / "b.pt", **options)
        content = load(tmp_path / "b.pt")
        assert isinstance(content["config"], StandIn)
        assert content["config"]["lr"] == 0.1
        assert content["losses"] == [1.0]
        with pytest.raises(CheckpointError, match="tensors in plain containers.*Config"):
            load(tmp_path / "b.pt", strict=True)


@pytest.mark.parametrize("kind", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, zipfile.ZIP_STORED])
def test_an_archive_that_was_compressed_again_is_read_rightly(tmp_path, kind):
    averaged = AveragedModel(nn.Sequential(nn.Linear(64, 65), nn.BatchNorm1d(65)), use_buffers=True)
    state = averaged.state_dict() | {"module.odd": torch.arange(3, dtype=torch.uint8), "module.none": torch.zeros(0, 2)}
    (tmp_path / "a.pt").write_bytes(hostile.rezipped(hostile.saved(state), kind))
    want = {name.removeprefix("module."): tensor for name, tensor in state.items() if name != "n_averaged"}
    assert_is(want, convert(tmp_path / "a.pt"))


def test_a_deflated_record_with_a_flipped_bit_is_refused(tmp_path):
    data = hostile.rezipped(hostile.saved(hostile.average(torch.rand(4000))))
    (tmp_path / "a.pt").write_bytes(hostile.flipped(data, len(data) // 2))
    with pytest.raises(CheckpointError, match="damaged"):
        read(tmp_path / "a.pt")


def test_a_file_saved_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(hostile.average(), tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert convert(tmp_path / "a.pt")["weight"].tolist() == [0, 1, 2, 3]


def test_tensors_are_read_as_torch_reads_them(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    state = {
        "whole": base,
        "turned": base.t(),
        "cut": base[1:3, ::2],
        "one": base[2, 3],
        "none": base[:0],
        "parameter": nn.Parameter(base + 1),
        "repeated": torch.tensor([[7.0]]).expand(3, 5),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "imaginary": torch.tensor([1 + 2j]).conj().imag,
        "wide": torch.tensor([1, 40000], dtype=torch.uint16),
        "narrow": torch.arange(3.0).to(torch.float8_e5m2),
        "yes": torch.tensor([True, False]),
        "half": torch.arange(3, dtype=torch.bfloat16),
    }
    torch.save(state, tmp_path / "a.pt")
    want = torch.load(tmp_path / "a.pt", weights_only=True)
    for options in ({}, {"mapped": False, "strict": True}):
        got = load(tmp_path / "a.pt", **options)
        assert got.keys() == want.keys()
        for name, tensor in want.items():
            assert got[name].dtype is tensor.dtype, name
            assert torch.equal(got[name].float(), tensor.detach().float()) or tensor.is_complex(), name
    assert got["conjugate"].tolist() == [1 - 2j]
    assert got["imaginary"].tolist() == [-2]
    before = (tmp_path / "a.pt").read_bytes()
    load(tmp_path / "a.pt")["whole"].zero_()
    assert (tmp_path / "a.pt").read_bytes() == before


def refused(capsys, *arguments) -> str:
    assert main(["convert", *map(str, arguments)]) == 2
    out, said = capsys.readouterr()
    assert out == ""
    assert said.count("\n") == 1
    return said


def test_what_is_no_file_is_refused_without_waiting_for_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.pt")
    os.mkfifo("names.json")
    Path("folder.pt").mkdir()
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("socket.pt")
    Path("loop.pt").symlink_to("loop.pt")
    for name, what in {
        "pipe.pt": "is a pipe",
        "socket.pt": "is a socket",
        "/dev/zero": "is a device",
        "folder.pt": "is neither",
        "loop.pt": "must be readable",
        "none.pt": "there is no none.pt",
        "x" * 300: "too long",
    }.items():
        assert what in refused(capsys, name, "-o", "out.safetensors")
    torch.save({"shadow_params": [torch.ones(1)], "num_updates": 1, "decay": 0.9}, "a.pt")
    assert "is a pipe" in refused(capsys, "a.pt", "-o", "out.safetensors", "--names", "names.json")
    Path("deep.json").write_text("[" * 100_000)
    assert "too deeply" in refused(capsys, "a.pt", "-o", "out.safetensors", "--names", "deep.json")
    assert not Path("out.safetensors").exists()


def test_an_output_that_cannot_be_written_is_refused_and_what_was_there_stays(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(hostile.average(), "a.pt")
    Path("link.safetensors").symlink_to("a.pt")
    os.mkfifo("pipe.safetensors")
    Path("folder.safetensors").mkdir()
    for output, what in {
        "a.pt": "another file",
        "link.safetensors": "another file",
        "pipe.safetensors": "be a regular or new file",
        "folder.safetensors": "not a folder",
        "none/o.safetensors": "a folder that exists",
        "x" * 300 + ".safetensors": "too long",
    }.items():
        before = sorted(path.name for path in tmp_path.iterdir())
        assert what in refused(capsys, "a.pt", "-o", output)
        assert sorted(path.name for path in tmp_path.iterdir()) == before

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    Path("o.safetensors").write_text("as it was")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        assert "No space left" in refused(capsys, "a.pt", "-o", "o.safetensors", "--force")
    assert Path("o.safetensors").read_text() == "as it was"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


EVIL = "\x1b[2J\x9b1m\u202e[bold red]\r\n:smile:\x07"


def test_nothing_that_a_terminal_obeys_is_printed(tmp_path, capsys):
    def plain(text: str) -> bool:
        return all(c.isprintable() or c == "\n" for c in text)

    contents = [
        {EVIL: torch.ones(1), "step": 1},
        {f"module.{EVIL}": torch.ones(1), "n_averaged": torch.tensor(1)},
        {f"module.{EVIL}": torch.eye(2).to_sparse(), "n_averaged": torch.tensor(1)},
        {EVIL: hostile.average(), "other": hostile.average()},
        {EVIL: hostile.average()},
        {"polyak_checkpoint": 1, "model_holds": f"averaged{EVIL}", "model": {EVIL: torch.ones(1)}},
        {"shadow_params": [torch.ones(1)], "num_updates": EVIL},
    ]
    folder = tmp_path / EVIL.replace("/", "")
    folder.mkdir()
    for content in contents:
        torch.save(content, folder / "a.pt")
        main(["convert", str(folder / "a.pt"), "-o", str(folder / "o.safetensors")])
        out, said = capsys.readouterr()
        assert plain(out + said)
        assert (out + said).strip()
    main(["convert", str(folder / "a.pt"), "-o", str(folder / "o.safetensors"), "--key", EVIL, "--prefix", EVIL])
    assert plain(capsys.readouterr().err)
    for command in (["inspect"], ["reconstruct", "--power", "0.1", "-o", "f"], ["sweep", "--evaluate", f"{EVIL}:f"]):
        name, *rest = command
        main([name, str(folder), *rest])
        assert plain(capsys.readouterr().err)
    with pytest.raises(SystemExit):
        main(["inspect", "x", EVIL])
    assert plain(capsys.readouterr().err)


def test_a_record_of_a_stranger_is_shown_escaped_or_refused(tmp_path, capsys):
    from records import record

    record(tmp_path / "run")
    manifest = tmp_path / "run" / "manifest.json"
    plain = json.loads(manifest.read_text())
    pins = plain["pins"] or {"x": {"files": [], "path": None}}
    plain["pins"] = {f"{EVIL}[/bold]": next(iter(pins.values())) | {"path": EVIL}}
    del plain["sha256"]  # as in the manifests of older releases
    manifest.write_text(json.dumps(plain))
    assert main(["inspect", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert all(c.isprintable() or c == "\n" for c in out)
    assert "[bold red]" in out.replace("\n", "").replace(" ", "").replace("boldred", "bold red")
    assert main(["inspect", str(tmp_path / "run"), "--json"]) == 0
    out = capsys.readouterr().out
    assert out.isascii()
    assert all(c.isprintable() or c == "\n" for c in out)
    for content in ("[" * 200_000, "", "{}"):
        manifest.write_text(content)
        assert main(["inspect", str(tmp_path / "run")]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    manifest.unlink()
    os.mkfifo(manifest)
    assert main(["inspect", str(tmp_path / "run")]) == 2
    assert "must be a file" in capsys.readouterr().err

"""Whatever is wrong with a checkpoint, there is one error of one line that names it, and nothing is left."""

import json
import os
import pickle
import struct
import threading
import time

import pytest
import torch
from safetensors.torch import save_file

from polyak.cli import main


def good(path) -> None:
    save_file({"w": torch.ones(4, 3), "b": torch.ones(4)}, path)


def header(text: bytes, length: int | None = None, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def claims(shape: list[int], end: int) -> bytes:
    text = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()
    return header(text, data=b"\0" * 16)


class Code:
    def __reduce__(self):
        return os.mkdir, ("code_ran",)


def huge(path) -> None:
    torch.save({"w": torch.ones(1).expand(1 << 60), "b": torch.ones(4)}, path)


def zipped(path) -> None:
    """Write an archive whose directory claims a size of 2 ** 60 for a tensor."""
    torch.save({"w": torch.ones(4, 3), "b": torch.ones(4)}, path)
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02")
    while data[at : at + 4] == b"PK\x01\x02":
        name, extra, comment = struct.unpack("<HHH", data[at + 28 : at + 34])
        if b"/data/0" in data[at + 46 : at + 46 + name]:
            data[at + 20 : at + 28] = struct.pack("<II", 0xFFFFFFF0, 0xFFFFFFF0)
        at += 46 + name + extra + comment
    path.write_bytes(data)


def cut(path, share: float) -> None:
    good(path)
    os.truncate(path, int(path.stat().st_size * share))


BAD = {
    "no header": lambda path: path.write_bytes(b"\1\0\0"),
    "cut in the header": lambda path: cut(path, 0.1),
    "cut in the first tensor": lambda path: cut(path, 0.7),
    "cut at the last byte": lambda path: cut(path, 0.999),
    "cut to nothing": lambda path: cut(path, 0),
    "another shape": lambda path: save_file({"w": torch.ones(3, 4), "b": torch.ones(4)}, path),
    "one dimension less": lambda path: save_file({"w": torch.ones(12), "b": torch.ones(4)}, path),
    "a longer tensor": lambda path: save_file({"w": torch.ones(4, 3), "b": torch.ones(5)}, path),
    "a scalar": lambda path: save_file({"w": torch.ones(4, 3), "b": torch.ones(())}, path),
    "an empty tensor": lambda path: save_file({"w": torch.ones(0, 3), "b": torch.ones(4)}, path),
    "integers": lambda path: save_file({"w": torch.ones(4, 3, dtype=torch.int64), "b": torch.ones(4)}, path),
    "other names": lambda path: save_file({"v": torch.ones(4, 3), "b": torch.ones(4)}, path),
    "a name less": lambda path: save_file({"w": torch.ones(4, 3)}, path),
    "a name more": lambda path: save_file({"w": torch.ones(4, 3), "b": torch.ones(4), "c": torch.ones(1)}, path),
    "names of another module": lambda path: save_file({"net.w": torch.ones(4, 3), "net.b": torch.ones(4)}, path),
    "names in other letters": lambda path: save_file({"W": torch.ones(4, 3), "b": torch.ones(4)}, path),
    "code alone": lambda path: path.write_bytes(pickle.dumps(Code())),
    "code as the weights": lambda path: torch.save({"model": Code()}, path),
    "code as a tensor": lambda path: torch.save({"w": Code(), "b": torch.ones(4)}, path),
    "code in protocol 0": lambda path: path.write_bytes(b"cos\nmkdir\n(S'code_ran'\ntR."),
    "code before 1.6": lambda path: torch.save({"w": Code()}, path, _use_new_zipfile_serialization=False),
    "a header of 2 ** 60 bytes": lambda path: path.write_bytes(header(b"{}", 1 << 60)),
    "a shape of 2 ** 60": lambda path: path.write_bytes(claims([1 << 60], 1 << 62)),
    "a shape whose product overflows": lambda path: path.write_bytes(claims([1 << 40, 1 << 40], 16)),
    "a tensor that repeats to 2 ** 60": huge,
    "an archive that claims 4 GB": zipped,
    "a pickle that claims 2 ** 60": lambda path: path.write_bytes(
        b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"abc."
    ),
    "an empty folder": lambda path: path.mkdir(),
    "a folder of empty folders": lambda path: (path / "model").mkdir(parents=True),
    "a folder with an optimizer alone": lambda path: (path.mkdir(), torch.save({"state": {}}, path / "optimizer.pt")),
    "a folder with an index alone": lambda path: (
        path.mkdir(),
        (path / "model.safetensors.index.json").write_text('{"weight_map": {"w": "model-1.safetensors"}}'),
    ),
    "a folder with empty metadata": lambda path: (path.mkdir(), (path / ".metadata").write_bytes(b"")),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_a_bad_checkpoint_is_named_in_one_line_and_nothing_is_left(tmp_path, monkeypatch, capsys, name) -> None:
    monkeypatch.chdir(tmp_path)
    good(tmp_path / "step-1")
    good(tmp_path / "step-3")
    BAD[name](tmp_path / "step-2")
    before = sorted(tmp_path.iterdir())
    for out in ("out.safetensors", "out.pt"):
        begin = time.process_time()
        assert main(["average", "step-1", "step-2", "step-3", "-o", out]) == 2
        said = capsys.readouterr().err
        assert "step-2" in said
        assert said.count("\n") == 1
        assert time.process_time() - begin < 20
        assert sorted(tmp_path.iterdir()) == before


def test_a_checkpoint_that_is_being_written_is_named_and_nothing_is_left(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for step in (1, 2):
        save_file({f"w{n}": torch.ones(50_000) for n in range(20)}, tmp_path / f"step-{step}")
    data, stop = (tmp_path / "step-2").read_bytes(), threading.Event()

    def write() -> None:
        while not stop.is_set():
            with (tmp_path / "step-2").open("r+b") as file:
                file.write(data)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert main(["average", "step-1", "step-2", "-o", "out.safetensors"]) == 2
    finally:
        stop.set()
        writer.join()
    said = capsys.readouterr().err
    assert "step-2" in said
    assert "must not change while it is read" in said
    assert sorted(one.name for one in tmp_path.iterdir()) == ["step-1", "step-2"]

"""A file of another program is refused by what it is, with what to do."""

import gzip
import io
import tarfile
import zipfile

import pytest
import torch

from polyak.cli import main


def _zip(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, "content")
    return file.getvalue()


def _tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights.pt"))
    return file.getvalue()


FILES = {
    "model.gguf": (b"GGUF" + bytes(99), "a GGUF file"),
    "model.onnx": (b"\x08\x07" + bytes(99), "a file of ONNX"),
    "model.h5": (b"\x89HDF\r\n\x1a\n" + bytes(99), "an HDF5 file"),
    "model.keras": (_zip("config.json", "model.weights.h5"), "a file of Keras"),
    "model.npz": (_zip("w.npy", "b.npy"), "arrays of NumPy"),
    "model.npy": (b"\x93NUMPY" + bytes(99), "an array of NumPy"),
    "model.pt2": (_zip("a/archive_format", "a/models/model.json"), "a program of torch.export"),
    "model.zip": (_zip("step-1.pt"), "an archive of other files; unpack it"),
    "model.tar": (_tar(), "a tar archive; unpack it"),
    "model.pt.gz": (gzip.compress(b"weights"), "compressed by gzip; unpack it"),
    "flax_model.msgpack": (b"\x81\xa6params" + bytes(99), "a file of Flax"),
    "model.ckpt.index": (bytes(99), "the index of a checkpoint of TensorFlow"),
    "model.safetensors": (b"<!DOCTYPE html><html>Sign in</html>", "a page of HTML"),
    "config.json": (b'{"layers": 2}', "a file of JSON"),
}


@pytest.mark.parametrize("name", list(FILES))
def test_a_file_of_another_program_is_refused_by_what_it_is(tmp_path, monkeypatch, capsys, name) -> None:
    monkeypatch.chdir(tmp_path)
    content, said = FILES[name]
    (tmp_path / name).write_bytes(content)
    torch.save({"w": torch.ones(2)}, "other.pt")
    for command in (["average", name, "other.pt"], ["convert", name]):
        assert main([*command, "-o", "out.safetensors"]) == 2
        error = capsys.readouterr().err
        assert name in error
        assert said in error
        assert error.count("\n") == 1
    assert sorted(one.name for one in tmp_path.iterdir()) == sorted([name, "other.pt"])

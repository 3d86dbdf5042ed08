"""Malformed and malicious files, by their fault; and polyak's commands in separate processes."""

import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

# A process that has run the first command, so that all is imported, forks for each; a child may allocate one GiB more.
_CHILD = """
import contextlib, io, os, resource, sys
import polyak.cli
with contextlib.redirect_stderr(io.StringIO()):
    polyak.cli.main(sys.argv[1:])
pages = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
for line in sys.stdin:
    number, *arguments = line.rstrip("\\n").split("\\t")
    if (pid := os.fork()) == 0:
        resource.setrlimit(resource.RLIMIT_AS, (pages + (1 << 30),) * 2)
        os.dup2(os.open(f"{number}.log", os.O_WRONLY | os.O_CREAT), 2)
        os.dup2(2, 1)
        try:
            code = polyak.cli.main(arguments)
        except SystemExit as end:
            code = end.code
        sys.stdout.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def run(folder: Path, commands: list[list[str]]) -> list[tuple[int, str]]:
    """Run commands of polyak in a folder, each in a separate process; return the exit codes and the messages."""
    lines = "".join("\t".join([str(k), *command]) + "\n" for k, command in enumerate(commands))
    env = {name: value for name, value in os.environ.items() if name != "COLUMNS"}  # `import readline` sets it
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, *commands[0]], cwd=folder, input=lines, stdout=-1, text=True, check=True, env=env
    )
    codes = [int(code) for code in done.stdout.split()]
    logs = [folder / f"{k}.log" for k in range(len(commands))]
    said = [log.read_text(errors="replace") for log in logs]
    for log in logs:
        log.unlink()
    return list(zip(codes, said, strict=True))


def saved(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def average(tensor: torch.Tensor | None = None, **more: Any) -> dict[str, Any]:
    """Return the state of torch's AveragedModel."""
    given = torch.arange(4.0) if tensor is None else tensor
    return {"n_averaged": torch.tensor(3), "module.weight": given, **more}


def archive(pickled: bytes, records: Mapping[str, bytes] | None = None, kind: int = zipfile.ZIP_STORED) -> bytes:
    """Return an archive in the layout of torch.save."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", kind) as file:
        file.writestr("a/data.pkl", pickled)
        for name, data in (records or {}).items():
            file.writestr(f"a/{name}", data)
    return buffer.getvalue()


def rezipped(data: bytes, kind: int = zipfile.ZIP_DEFLATED, rename: Mapping[str, str] | None = None) -> bytes:
    """The same archive, compressed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", kind) as new:
        for entry in old.infolist():
            new.writestr((rename or {}).get(entry.filename, entry.filename), old.read(entry.filename))
    return buffer.getvalue()


STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
SHAPES = {"negative": b"J\xff\xff\xff\xff", "four": b"K\x04", "huge": b"\x8a\x08" + struct.pack("<q", 1 << 60)}


def tensor(
    shape: bytes = b"K\x04", stride: bytes = b"K\x01", offset: bytes = b"K\x00", numel: bytes = b"K\x04"
) -> bytes:
    """Return the pickle of a tensor; opcodes give its numbers."""
    storage = STORAGE + numel + b"tQ"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset + shape + b"\x85" + stride + b"\x85\x89}tR"


def entry(value: bytes, name: bytes = b"weight") -> bytes:
    """The pickle of a dict of one value."""
    return b"\x80\x02}X" + struct.pack("<I", len(name)) + name + value + b"s."


def many_entries(count: int) -> bytes:
    """A zip archive whose directory names one record many times."""
    one = b"PK\x01\x02" + b"\0" * 24 + b"\x08\0" + b"\0" * 16
    directory = b"".join(one + b"%08d" % i for i in range(count))
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, count % 65535, count % 65535, len(directory), 4, 0)
    return b"PK\x03\x04" + directory + end


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


class Touch:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


RUN = b"cos\nmkdir\nX\x03\x00\x00\x00ran\x85"
FOUR = {"data/0": torch.arange(4.0).numpy().tobytes()}
SAVED = saved(average())
HEADER = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'


def safetensors(header: bytes, data: bytes = b"\0" * 4, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


# Each must give a one-line error.
FILES: Mapping[str, tuple[str, Callable[[], bytes]]] = {
    "an empty file": (".pt", lambda: b""),
    "four zero bytes": (".pt", lambda: b"\0" * 4),
    "a text": (".pt", lambda: b"hello"),
    "a zip signature alone": (".pt", lambda: b"PK\x03\x04"),
    "half an archive": (".pt", lambda: SAVED[: len(SAVED) // 2]),
    "half an old file": (".pt", lambda: saved(average(torch.ones(999)), _use_new_zipfile_serialization=False)[:-2000]),
    "a tensor with a flipped bit": (
        ".pt",
        lambda: flipped(SAVED, SAVED.index(torch.arange(4.0).numpy().tobytes()) + 6),
    ),
    "a deflated tensor that claims 512 GiB": (
        ".pt",
        lambda: archive(
            entry(tensor(b"\x8a\x05\0\0\0\x20\0", numel=b"\x8a\x05\0\0\0\x20\0")),
            {"data/0": b"\0" * (128 << 20)},
            zipfile.ZIP_DEFLATED,
        ),
    ),
    "a deflated tensor of 1000 times its size": (
        ".pt",
        lambda: archive(
            entry(tensor(b"J\0\0\0\x02", numel=b"J\0\0\0\x02")), {"data/0": b"\0" * (128 << 20)}, zipfile.ZIP_DEFLATED
        ),
    ),
    "a pickle of many dicts": (
        ".pt",
        lambda: archive(entry(b"(" + b"}" * (20 << 20) + b"t"), kind=zipfile.ZIP_DEFLATED),
    ),
    "a pickle of many memos": (".pt", lambda: archive(entry(b"N" + b"\x94" * (20 << 20)), kind=zipfile.ZIP_DEFLATED)),
    "a pickle of 100 MiB of text": (
        ".pt",
        lambda: archive(entry(b"X" + struct.pack("<I", 200 << 20) + b"a" * (100 << 20)), kind=zipfile.ZIP_DEFLATED),
    ),
    "a text that claims 2^60 bytes": (".pt", lambda: archive(entry(b"\x8d" + struct.pack("<Q", 1 << 60) + b"a"))),
    "a memo without a value": (".pt", lambda: archive(entry(b"j\xff\xff\xff\x7f"))),
    "a frame that never ends": (".pt", lambda: archive(b"\x80\x04\x95" + struct.pack("<Q", 1 << 60))),
    "an unknown opcode": (".pt", lambda: archive(b"\x80\x02\xff.")),
    "a stack that is empty": (".pt", lambda: archive(b"\x80\x02s.")),
    "a mark in place of a value": (".pt", lambda: archive(b"\x80\x02}(N(s.")),
    "a pickle that ends with two values": (".pt", lambda: archive(b"\x80\x02NN.")),
    "tensors beyond their storage": (".pt", lambda: archive(entry(tensor(b"K\x05")), FOUR)),
    "tensors before their storage": (".pt", lambda: archive(entry(tensor(offset=b"J\xff\xff\xff\xff")), FOUR)),
    "a negative shape": (".pt", lambda: archive(entry(tensor(SHAPES["negative"])), FOUR)),
    "a negative stride": (".pt", lambda: archive(entry(tensor(stride=SHAPES["negative"])), FOUR)),
    "a shape of 2^60": (".pt", lambda: archive(entry(tensor(SHAPES["huge"])), FOUR)),
    "a stride of 2^60": (".pt", lambda: archive(entry(tensor(stride=SHAPES["huge"])), FOUR)),
    "a shape of 2^60 with stride 0": (".pt", lambda: archive(entry(tensor(SHAPES["huge"], b"K\x00")), FOUR)),
    "a shape of 2^31 with stride 0": (".pt", lambda: archive(entry(tensor(b"\x8a\x05\0\0\0\x80\0", b"K\x00")), FOUR)),
    "a shape of floats": (".pt", lambda: archive(entry(tensor(b"G?\xf0\0\0\0\0\0\0")), FOUR)),
    "a storage that claims too much": (".pt", lambda: archive(entry(tensor(numel=SHAPES["huge"])), FOUR)),
    "a storage that is not there": (".pt", lambda: archive(entry(tensor()))),
    "a storage in another folder": (
        ".pt",
        lambda: archive(entry(tensor().replace(b"\x01\x00\x00\x000X", b"\x0a\x00\x00\x00../../etc/X")), FOUR),
    ),
    "an id that is no storage": (".pt", lambda: archive(entry(b"X\x01\x00\x00\x00aQ"))),
    "many names of one tensor": (
        ".pt",
        lambda: saved(
            {f"module.{i}": one for one in [torch.zeros(4 << 20)] for i in range(2000)}
            | {"n_averaged": torch.tensor(1)}
        ),
    ),
    "two pickles": (".pt", lambda: archive(entry(tensor()), {**FOUR, "b/data.pkl": entry(tensor())})),
    "a directory of 400,000 entries": (".pt", lambda: many_entries(400_000)),
    "a line that never ends": (".pt", lambda: archive(entry(b"c" + b"a" * (30 << 20)), kind=zipfile.ZIP_DEFLATED)),
    "an old line that never ends": (".pt", lambda: b"\x80\x02c" + b"a" * (30 << 20)),
    "an archive of TorchScript": (".pt", lambda: archive(b"\x80\x02}.", {"constants.pkl": b"\x80\x02)."})),
    "another byte order": (".pt", lambda: archive(entry(tensor()), {**FOUR, "byteorder": b"big"})),
    "a name that is no text of Unicode": (".pt", lambda: archive(entry(tensor(), b"\xed\xa0\x80"), FOUR)),
    "a name that safetensors uses": (".pt", lambda: archive(entry(tensor(), b"__metadata__"), FOUR)),
    "numbers for names": (".pt", lambda: saved({"n_averaged": torch.tensor(1), "state_dict_ema": {3: torch.ones(1)}})),
    "two tensors of one name": (".pt", lambda: saved(average(**{"module._orig_mod.weight": torch.ones(1)}))),
    "a count that is lists of lists": (
        ".pt",
        lambda: archive(
            b"\x80\x02]q\x000"
            + b"".join(b"(h%ch%clq%c0" % (i, i, i + 1) for i in range(60))
            + b"}(X\x0d\0\0\0shadow_params]("
            + tensor()
            + b"eX\x05\0\0\0decayh\x3cX\x0b\0\0\0num_updatesK\x03u.",
            FOUR,
        ),
    ),
    "a count of 24,000 digits": (
        ".pt",
        lambda: archive(
            b"\x80\x02}(X\x0a\0\0\0n_averaged\x8b\x10\x27\0\0"
            + b"\x7f" * 10000
            + b"X\x08\0\0\0module.w"
            + tensor()
            + b"u.",
            FOUR,
        ),
    ),
    "nested lists": (".pt", lambda: archive(b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b".")),
    "a nested tensor": (".pt", lambda: saved(average(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])))),
    "a sparse tensor": (".pt", lambda: saved(average(torch.eye(3).to_sparse_csr()))),
    "a quantized tensor": (
        ".pt",
        lambda: saved(average(torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8))),
    ),
    "a tensor on the meta device": (".pt", lambda: saved(average(torch.ones(2, device="meta")))),
    "a complex128 tensor": (".pt", lambda: saved(average(torch.ones(2, dtype=torch.complex128)))),
    "safetensors, truncated": (".safetensors", lambda: safetensors(HEADER, b"\0")),
    "safetensors, a header of 80 MB": (".safetensors", lambda: safetensors(HEADER[:-1] + b" " * (80 << 20) + b"}")),
    "safetensors, a header that is too long": (".safetensors", lambda: safetensors(HEADER, length=1 << 40)),
    "safetensors, nested": (".safetensors", lambda: safetensors(b'{"a":' * 100_000)),
    "safetensors, offsets that overlap": (
        ".safetensors",
        lambda: safetensors(b'{"v":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},' + HEADER[1:]),
    ),
    "safetensors, a shape of 2^60": (
        ".safetensors",
        lambda: safetensors(HEADER.replace(b"[1]", b"[1152921504606846976]")),
    ),
    "safetensors, a name twice": (".safetensors", lambda: safetensors(HEADER[:-1] + b"," + HEADER[1:])),
    "safetensors, an unknown dtype": (".safetensors", lambda: safetensors(HEADER.replace(b"F32", b"F99"))),
}

# Each tries to run code. Nothing may run, whether polyak refuses the file or skips the object.
CODE: Mapping[str, bytes] = {
    "reduce": RUN + b"R",
    "an instance": b"(X\x03\x00\x00\x00ranios\nmkdir\n",
    "an object": b"(cos\nmkdir\nX\x03\x00\x00\x00rano",
    "newobj": RUN + b"\x81",
    "newobj with keywords": RUN + b"}\x92",
    "a name from the stack": b"X\x02\0\0\0osX\x05\0\0\0mkdir\x93X\x03\0\0\0ran\x85R",
    "getattr": b"c__builtin__\ngetattr\ncos\nX\x05\0\0\0mkdir\x86RX\x03\0\0\0ran\x85R",
    "eval": b"cbuiltins\neval\nX\x1f\0\0\0__import__('os').mkdir('ran')   \x85R",
    "an attribute of an allowed name": b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n)R",
    "partial": b"cfunctools\npartial\ncos\nmkdir\nX\x03\0\0\0ran\x86R)R",
    "the default of defaultdict": b"ccollections\ndefaultdict\ncos\nmkdir\n\x85R",
    "a state set on a function": b"ctorch._utils\n_rebuild_tensor_v2\n}X\x01\0\0\0xK\x01sb",
    "a state set on a class": b"ccollections\nOrderedDict\nN}X\x06\0\0\0updatecos\nmkdir\ns\x86b",
    "setstate": b"cos\nmkdir\n)RX\x03\0\0\0ranb",
    "items of an object": b"cos\nmkdir\n)RX\x03\0\0\0ranN\x86as",
    "a tensor of a class": b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nmkdir\nN" + b"X\x03\0\0\0ran\x85NtR",
    "an extension": b"\x82\x01)R",
    "a key that is called": b"}" + RUN + b"RNs",
    "bytes of another pickle": b"ctorch.storage\n_load_from_bytes\nU" + bytes([len(pickle.dumps(Touch(), 0))])
    + pickle.dumps(Touch(), 0) + b"\x85R",
}  # fmt: skip

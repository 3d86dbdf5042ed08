"""Names what a file is that is neither of torch nor of safetensors, with what to do: people give such files too."""

from collections.abc import Iterable

_PAGE = "a page of HTML in place of the file; download it again, signed in if that is needed"
# How files of other programs begin.
_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (b"GGUF", "a GGUF file of llama.cpp, which is quantized; give the checkpoint that it was made from"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes; load it in Keras, and save its weights with torch.save"),
    (b"\x93NUMPY", "an array of NumPy; save tensors by name with torch.save"),
    (b"\x1f\x8b", "compressed by gzip; unpack it"),
    (b"\xfd7zXZ", "compressed by xz; unpack it"),
    (b"BZh", "compressed by bzip2; unpack it"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstandard; unpack it"),
    *((start, _PAGE) for start in (b"<!", b"<html", b"<?xml")),
)
_TAR = slice(257, 262)
# By the end of the name, where the content does not tell.
_ENDINGS: tuple[tuple[str, str], ...] = (
    (".onnx", "a file of ONNX; give the checkpoint that it was exported from"),
    (".msgpack", "a file of Flax; load it with from_pretrained(..., from_flax=True), and save it again"),
    (".index", "the index of a checkpoint of TensorFlow; convert the checkpoint to torch"),
    (".data-00000-of-00001", "a file of a checkpoint of TensorFlow; convert the checkpoint to torch"),
    (".tflite", "a file of TensorFlow Lite; give the checkpoint that it was made from"),
    (".json", "a file of JSON; give a file with weights, or the folder that it is in"),
)


def other_kind(data: memoryview, name: str) -> str | None:
    """Return what a file is, and what to do; None if it is not known to be of another program.

    Args:
        data: Of the file.
        name: Of the file.

    Example:
        >>> other_kind(memoryview(b"GGUF and numbers"), "model.gguf")
        'a GGUF file of llama.cpp, which is quantized; give the checkpoint that it was made from'
    """
    begin = bytes(data[:16])
    found = next((said for start, said in _BEGINNINGS if begin.startswith(start)), None)
    if found is None and bytes(data[_TAR]) == b"ustar":
        return "a tar archive; unpack it"
    return found or next((said for end, said in _ENDINGS if name.lower().endswith(end)), None)


def other_archive(names: Iterable[str]) -> str:
    """Return what a zip archive is that has no pickle of ``torch.save``, and what to do.

    Args:
        names: Of its entries.

    Example:
        >>> other_archive(["arr_0.npy"])
        'arrays of NumPy; save tensors by name with torch.save'
    """
    inside = list(names)
    if inside and all(name.endswith(".npy") for name in inside):
        return "arrays of NumPy; save tensors by name with torch.save"
    if any(name.endswith(".weights.h5") for name in inside):
        return "a file of Keras; load it in Keras, and save its weights with torch.save"
    if any(name.rpartition("/")[2] in {"archive_format", "serialized_exported_program.json"} for name in inside):
        return "a program of torch.export; load it with torch.export.load, and save its state_dict"
    return "an archive of other files; unpack it"

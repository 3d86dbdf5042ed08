"""Builds the tensors in files of ``torch.save``, from bytes whose sizes are checked first."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polyak.compat.pickles import Builders, Name, StandIn, Unpickler
from polyak.errors import CheckpointError

_MOST_DIMENSIONS = 64
# A tensor object takes as much memory as about as many opcodes.
_COST = 16


@dataclass(frozen=True, slots=True)
class Unread:
    """Stands for a tensor that cannot be read.

    Args:
        kind: Its kind.
    """

    kind: str


@dataclass(frozen=True, slots=True)
class Storage:
    """The bytes of one or several tensors.

    Args:
        dtype: The dtype of the numbers in it.
        data: The bytes; None on the meta device.
    """

    dtype: torch.dtype
    data: torch.UntypedStorage | None


DTYPES: Mapping[str, torch.dtype] = {
    f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)
}
_STORED = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexDouble": torch.complex128,
    "ComplexFloat": torch.complex64,
    "QInt8": torch.qint8,
    "QInt32": torch.qint32,
    "QUInt8": torch.quint8,
    "QUInt4x2": torch.quint4x2,
    "QUInt2x4": torch.quint2x4,
}
# By the name of the class: what a persistent id gives as the type of a storage.
STORAGES: Mapping[str, torch.dtype] = {
    **{f"torch.{device}{name}Storage": dtype for name, dtype in _STORED.items() for device in ("", "cuda.")},
    "torch.storage.UntypedStorage": torch.uint8,
    "torch.UntypedStorage": torch.uint8,
    "torch.cuda.UntypedStorage": torch.uint8,
}


def as_storage(data: memoryview, *, mapped: bool) -> torch.UntypedStorage:
    """Return bytes as a storage.

    Args:
        data: Writable.
        mapped: Whether the storage is these bytes, or else a copy of them.
    """
    if not len(data):
        return torch.UntypedStorage(0)
    found = torch.frombuffer(data, dtype=torch.uint8)
    return (found if mapped else found.clone()).untyped_storage()


def _whole(value: object) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or len(value) > _MOST_DIMENSIONS:
        raise CheckpointError("a tensor's shape must be a tuple")
    if not all(type(one) is int and 0 <= one < 1 << 62 for one in value):
        raise CheckpointError("a tensor's shape must be of whole numbers of at least 0")
    return tuple(value)


def _build(storage: object, dtype: torch.dtype | None, offset: object, shape: object, strides: object) -> Any:
    if isinstance(storage, StandIn):
        return Unread("a tensor in a storage that cannot be read")
    if not isinstance(storage, Storage):
        raise CheckpointError("a tensor must have a storage")
    if storage.data is None:
        return Unread("a tensor on the meta device, which has no values")
    dtype = storage.dtype if dtype is None else dtype
    if dtype.itemsize == 0 or "quint" in str(dtype) or "qint" in str(dtype):
        return Unread(f"a quantized tensor ({dtype})")
    (begin,), shape, strides = _whole([offset]), _whole(shape), _whole(strides)
    if len(shape) != len(strides):
        raise CheckpointError("a tensor must have a stride for each dimension")
    empty = 0 in shape
    end = begin + (0 if empty else 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)))
    held = storage.data.nbytes() // dtype.itemsize
    if end > held:
        raise CheckpointError(f"a tensor of {end} numbers must have them all in the file ({held} are there)")
    numel = 1
    for n in shape:
        numel *= n
    if numel >= 1 << 62:
        return Unread(f"a tensor of shape {shape} that repeats {held} numbers")
    try:
        return torch.empty(0, dtype=dtype).set_(storage.data, begin, shape, strides)
    except (RuntimeError, TypeError) as error:
        return Unread(f"a tensor that torch cannot make ({str(error).splitlines()[0][:80]})")


def _with_bits(tensor: Any, metadata: object) -> Any:
    """Return a tensor with the bits that its metadata sets: conjugate, negative."""
    if isinstance(tensor, Unread) or not metadata:
        return tensor
    if not isinstance(metadata, Mapping) or not metadata.keys() <= {"conj", "neg"}:
        return Unread("a tensor with metadata that are not known")
    if not _may_be_copied(tensor):
        return Unread("a conjugate or negative view that repeats numbers")
    if metadata.get("conj") and tensor.is_complex():
        tensor = tensor.conj().resolve_conj()
    return tensor.neg() if metadata.get("neg") else tensor


def _may_be_copied(tensor: Tensor) -> bool:
    """Return whether a tensor has no more numbers than are stored."""
    return tensor.numel() * tensor.dtype.itemsize <= tensor.untyped_storage().nbytes()


def copy_if_unaligned(tensor: Any) -> Any:
    """Return a copy if the bytes in the file do not begin at a multiple of the size of a number.

    Args:
        tensor: What was built. Anything but a tensor is returned as it is.
    """
    if isinstance(tensor, Tensor) and tensor.numel() and tensor.data_ptr() % min(8, tensor.dtype.itemsize):
        return tensor.clone() if _may_be_copied(tensor) else Unread("a tensor that repeats numbers, and is not aligned")
    return tensor


def _as_it_is(tensor: Any) -> Any:
    return tensor


def _v2(  # noqa: PLR0917  torch's signature
    storage: object, offset: object, shape: object, strides: object, grad: object = None, hooks: object = None,
    metadata: object = None,
) -> Any:  # fmt: skip
    del grad, hooks
    return _with_bits(_build(storage, None, offset, shape, strides), metadata)


def _v3(  # noqa: PLR0917  torch's signature
    storage: object, offset: object, shape: object, strides: object, grad: object, hooks: object, dtype: object,
    metadata: object = None,
) -> Any:  # fmt: skip
    del grad, hooks
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError("a tensor must have a dtype")
    return _with_bits(_build(storage, dtype, offset, shape, strides), metadata)


def _parameter(data: object, *_: object) -> Any:
    if not isinstance(data, (Tensor, Unread, StandIn)):
        raise CheckpointError("a parameter must hold a tensor")
    return data


def _unread(kind: str) -> Any:
    def made(*_: object) -> Unread:
        return Unread(kind)

    return made


def _size(shape: object = ()) -> torch.Size:
    return torch.Size(_whole(shape))


def _device(kind: object, index: object = None) -> Any:
    text = kind if index is None else f"{kind}:{index}"
    try:
        return torch.device(str(text)[:80])
    except RuntimeError:
        return StandIn("torch.device")


_MADE: Builders = {
    "torch._utils._rebuild_tensor": _v2,
    "torch._utils._rebuild_tensor_v2": _v2,
    "torch._utils._rebuild_tensor_v3": _v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_sparse_tensor": _unread("a sparse tensor"),
    "torch._utils._rebuild_nested_tensor": _unread("a nested tensor"),
    "torch._utils._rebuild_qtensor": _unread("a quantized tensor"),
    "torch._utils._rebuild_meta_tensor_no_storage": _unread("a tensor on the meta device, which has no values"),
    "torch._utils._rebuild_wrapper_subclass": _unread("a tensor of a class of another library's"),
    "torch._utils._rebuild_device_tensor_from_numpy": _unread("a tensor of another device's, saved by numpy"),
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _parameter,
    "torch.storage._load_from_bytes": _unread("a tensor that was pickled without torch.save"),
    "numpy.core.multiarray._reconstruct": _unread("an array of numpy"),
    "numpy._core.multiarray._reconstruct": _unread("an array of numpy"),
    "torch.Size": _size,
    "torch.device": _device,
}
_LAYOUTS = {"torch.serialization._get_layout": lambda name=None: StandIn("torch.layout", name)}


def unpickler(persistent: Any, *, aligned: bool = True, storage: Callable[[object], Any] | None = None) -> Unpickler:
    """Return an unpickler that builds tensors too.

    Args:
        persistent: Makes a `Storage` from a persistent id.
        aligned: Whether tensors that the file has unaligned are copied.
        storage: Makes a `Storage` from the bytes of one that is in the pickle itself; None if none is.
    """

    def from_type(function: object, kind: object, arguments: object, state: object = None) -> Any:
        """Make a tensor that had attributes or was of a subclass, without either."""
        del kind, state
        if isinstance(function, Name) and function.path in _MADE and isinstance(arguments, tuple):
            return _MADE[function.path](*arguments)
        return Unread("a tensor of a class of another library's")

    align = copy_if_unaligned if aligned else _as_it_is

    def counted(build: Any) -> Any:
        def made(*arguments: object) -> Any:
            reader.spend(_COST)
            found = align(build(*arguments))
            if isinstance(found, Unread):
                reader.unknown.append(found.kind)
            return found

        return made

    tensors = {
        name: counted(build)
        for name, build in {
            **_MADE,
            "torch._tensor._rebuild_from_type": from_type,
            "torch._tensor._rebuild_from_type_v2": from_type,
        }.items()
    }
    if storage is not None:
        tensors["torch.storage._load_from_bytes"] = storage
    types = {name: Name(name) for name in [*STORAGES, "torch.Tensor", "torch.nn.parameter.Parameter"]}
    reader = Unpickler({**tensors, **_LAYOUTS}, {**DTYPES, **types}, persistent)
    return reader

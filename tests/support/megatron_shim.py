"""Lets Megatron-core 0.16 run on CPUs with gloo: it takes its device from CUDA, and knows no CPU.

Import it before ``megatron``, in processes that run nothing else.
"""

import contextlib
import multiprocessing
import queue
import warnings
from typing import Any

import torch
import torch._dynamo

torch.set_num_threads(1)
torch._dynamo.config.disable = True  # compiling takes longer than all tests
warnings.filterwarnings("ignore")
_CPU = torch.device("cpu")


class _Stream:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *args: object) -> None: ...


def _here(make: Any) -> Any:
    def made(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = _CPU
        return make(*args, **kwargs)

    return made


for name in ("tensor", "zeros", "empty", "ones", "full", "arange", "rand", "randn"):
    setattr(torch, name, _here(getattr(torch, name)))
cuda: Any = torch.cuda
cuda.current_device = lambda: _CPU
for name in ("synchronize", "set_device", "empty_cache", "reset_peak_memory_stats"):
    setattr(cuda, name, lambda *args: None)
cuda.device_count = lambda: 1
cuda.is_available = lambda: False
cuda.Stream = cuda.Event = _Stream
cuda.current_stream = cuda.default_stream = lambda *args: _Stream()
cuda.stream = lambda stream: contextlib.nullcontext()


class _Typed(type):
    """A legacy class of tensors on CUDA: a constructor, and a type to compare with."""

    dtype: torch.dtype

    def __call__(cls, values: Any) -> torch.Tensor:
        return torch.tensor(values, dtype=cls.dtype)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, torch.Tensor) and instance.dtype == cls.dtype


for name, dtype in {
    "FloatTensor": torch.float32,
    "HalfTensor": torch.float16,
    "BFloat16Tensor": torch.bfloat16,
    "IntTensor": torch.int32,
    "LongTensor": torch.int64,
}.items():
    setattr(cuda, name, _Typed(name, (), {"dtype": dtype}))
_type = torch.Tensor.type


def _type_on_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    return _type(self, *args, **kwargs) if args or kwargs else _type(self).replace("torch.", "torch.cuda.")


tensor: Any = torch.Tensor
tensor.cuda = lambda self, *args, **kwargs: self
tensor.type = _type_on_cuda

from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402
from megatron.core.tensor_parallel import random  # noqa: E402
from megatron.core.transformer.moe import moe_utils  # noqa: E402

random.CudaRNGStatesTracker.fork = lambda self, *args: contextlib.nullcontext()  # type: ignore[method-assign,assignment]
moe_utils.te_general_gemm = None  # of TransformerEngine, which is asked for without a check
# Megatron writes files in processes of its own, which those of tests may not have, and keeps another one for its queue.
multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
filesystem_async._results_queue = queue.Queue()  # type: ignore[assignment]

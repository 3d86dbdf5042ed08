"""Layers with every unusual property that layers of users may have."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.testing._internal.two_tensor import TwoTensor

WIDTH, BATCH = 4, 3


class Call(nn.Module):
    """A module that calls a function. Its keyword arguments are parameters, modules or buffers."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **held: Any) -> None:
        super().__init__()
        self._function = function
        for name, value in held.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name.removesuffix("_cache"), value, persistent=not name.endswith("_cache"))
            else:
                setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self._function(self, x)


class Named(nn.Parameter):
    """A subclass of Tensor, as in libraries of geometric or quantized weights."""


class Statistic(nn.Module):
    """Keeps a statistic, and replaces it by a new tensor in each forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_scale", torch.ones(WIDTH))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.running_scale = 0.9 * self.running_scale + 0.1 * x.detach().abs().mean(0)
            self.seen += 1
        return x / (1 + self.running_scale)


def is_dense(tensor: Tensor) -> bool:
    """Return whether a tensor has one storage of its own elements, which can be moved."""
    return tensor.layout == torch.strided and not hasattr(tensor, "__tensor_flatten__")


def square() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH)


def _masked(self: Any, x: Tensor) -> Tensor:
    return (x[:, None] + self.mask).softmax(-1).sum(1)


def _counts(self: Any, x: Tensor) -> Tensor:
    self.calls += 1
    return x * self.scale


def _times_w(self: Any, x: Tensor) -> Tensor:
    return x @ self.w.to(x.dtype)


def _attends(self: Any, x: Tensor) -> Tensor:
    return self.inner(x[None], x[None], x[None])[0][0]


def _complex(self: Any, x: Tensor) -> Tensor:
    return torch.view_as_real(x.to(self.w.dtype) @ self.w).sum(-1).to(x.dtype)


def _w() -> nn.Parameter:
    return nn.Parameter(0.3 * torch.randn(WIDTH, WIDTH))


def _complex_w(dtype: torch.dtype = torch.complex64) -> nn.Parameter:
    return nn.Parameter(0.3 * torch.randn(WIDTH, WIDTH, dtype=dtype))


def _other_dtype(dtype: torch.dtype) -> nn.Module:
    return Call(lambda self, x: self.inner(x.to(self.inner.weight.dtype)).to(x.dtype), inner=square().to(dtype))


def _mask() -> Tensor:
    return torch.full((WIDTH, WIDTH), -torch.inf).triu(1)


# Each maps (BATCH, WIDTH) to (BATCH, WIDTH). A block keeps the dtypes that are not the model's.
BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "linear": square,
    "frozen": lambda: square().requires_grad_(False),
    "conv": lambda: Call(lambda self, x: self.inner(x[:, None])[:, 0], inner=nn.Conv1d(1, 1, 3, padding=1)),
    "channels_last": lambda: Call(
        lambda self, x: self.inner(x.view(1, BATCH, 2, 2))[0].reshape(x.shape),
        inner=nn.Conv2d(BATCH, BATCH, 3, padding=1).to(memory_format=torch.channels_last),
    ),
    "batch_norm": lambda: nn.BatchNorm1d(WIDTH),
    "batch_norm_cumulative": lambda: nn.BatchNorm1d(WIDTH, momentum=None, affine=False),
    "layer_norm": lambda: nn.LayerNorm(WIDTH),
    "embedding": lambda: Call(lambda self, x: self.inner((x[:, 0] > 0).long()), inner=nn.Embedding(2, WIDTH)),
    "attention": lambda: Call(_attends, inner=nn.MultiheadAttention(WIDTH, 2)),
    "gru": lambda: Call(lambda self, x: self.inner(x)[0], inner=nn.GRU(WIDTH, WIDTH)),
    "dropout": lambda: nn.Sequential(square(), nn.Dropout(0.5)),
    "mask": lambda: Call(_masked, mask=_mask()),
    "running_mask": lambda: Call(lambda self, x: x + self.running_mask.softmax(-1)[1], running_mask=_mask()),
    "counter": lambda: Call(_counts, calls=torch.tensor(0), scale=torch.tensor(0.7), flag=torch.tensor(data=True)),
    "cache": lambda: Call(lambda self, x: x * self.angles, angles_cache=torch.linspace(0.1, 1, WIDTH)),
    "statistic": Statistic,
    "spectral_norm": lambda: spectral_norm(square()),
    "spectral_parametrization": lambda: parametrizations.spectral_norm(square()),
    "weight_norm": lambda: weight_norm(square()),
    "weight_norm_parametrization": lambda: parametrizations.weight_norm(square()),
    "prune": lambda: prune.random_unstructured(square(), "weight", amount=0.3),
    "complex": lambda: Call(_complex, w=_complex_w()),
    "complex128": lambda: Call(_complex, w=_complex_w(torch.complex128)),
    "double": lambda: _other_dtype(torch.float64),
    "bfloat16": lambda: _other_dtype(torch.bfloat16),
    "subclass": lambda: Call(_times_w, w=Named(0.3 * torch.randn(WIDTH, WIDTH))),
    "scalar": lambda: Call(
        lambda self, x: x * self.gain + self.none.sum(),
        gain=nn.Parameter(torch.tensor(0.5)),
        none=nn.Parameter(torch.empty(0, 3)),
    ),
    "integers": lambda: Call(
        lambda self, x: x + self.table.sum().to(x), table=nn.Parameter(torch.arange(3), requires_grad=False)
    ),
    "transposed": lambda: Call(_times_w, w=nn.Parameter(0.3 * torch.randn(WIDTH, WIDTH).t())),
    "steps_over": lambda: Call(_times_w, w=nn.Parameter(0.3 * torch.randn(WIDTH, 8)[:, ::2])),
    "expanded": lambda: Call(lambda self, x: x + self.grid[0].to(x), grid=torch.randn(WIDTH).expand(3, WIDTH)),
    "running_expanded": lambda: Call(
        lambda self, x: x + self.running_grid[0].to(x), running_grid=torch.randn(WIDTH).expand(3, WIDTH)
    ),
    "conjugate_buffer": lambda: Call(_complex, w=_complex_w(), running_w=torch.randn(3, dtype=torch.complex64).conj()),
    "negative_buffer": lambda: Call(_complex, w=_complex_w(), running_w=torch._neg_view(torch.randn(3))),
    "real_view": lambda: Call(_complex, w=(w := _complex_w()), real=torch.view_as_real(w.detach())),
    "conjugate_view": lambda: Call(_complex, w=(w := _complex_w()), conj=w.detach().conj()),
    "negative": lambda: Call(_times_w, w=nn.Parameter(torch._neg_view(0.3 * torch.randn(4, 4)))),
    "sparse": lambda: Call(
        lambda self, x: x + torch.mv(self.matrix.to_dense(), x.new_ones(4).float()).to(x.dtype),
        matrix=torch.eye(WIDTH).to_sparse(),
    ),
    "float8": lambda: Call(lambda self, x: x * self.table.to(x.dtype), table=torch.ones(4).to(torch.float8_e4m3fn)),
    "two_tensors": lambda: Call(_times_w, w=nn.Parameter(TwoTensor(torch.randn(4, 4), torch.randn(4, 4)))),
}

# Blocks that `.to(dtype)` breaks: it changes their dtypes to others that they do not support, or replaces their views.
KEEPS_DTYPE = {
    "complex",
    "complex128",
    "real_view",
    "conjugate_view",
    "conjugate_buffer",
    "negative_buffer",
    "float8",
    "double",
    "bfloat16",
    "two_tensors",
    "sparse",
    "expanded",
    "running_expanded",
    "steps_over",
    "negative",
}

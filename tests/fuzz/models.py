"""Small models with every oddity that a model of someone else's may have."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.testing._internal.two_tensor import TwoTensor

if TYPE_CHECKING:
    from .cases import Case

WIDTH, BATCH = 4, 3
DTYPES = ("float32", "float32", "float32", "float64", "bfloat16", "float16")


class Call(nn.Module):
    """A module of a function, and of what it is given by name: parameters, modules, or buffers."""

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
    """A subclass, as libraries of geometric or quantized weights have."""


class Statistic(nn.Module):
    """Keeps a statistic that it replaces by a new tensor each time."""

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


def _square() -> nn.Linear:
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
    return Call(lambda self, x: self.inner(x.to(self.inner.weight.dtype)).to(x.dtype), inner=_square().to(dtype))


def _mask() -> Tensor:
    return torch.full((WIDTH, WIDTH), -torch.inf).triu(1)


# Each maps (BATCH, WIDTH) to the same. A block keeps the dtypes that it has beyond the model's own.
BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "linear": _square,
    "frozen": lambda: _square().requires_grad_(False),
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
    "dropout": lambda: nn.Sequential(_square(), nn.Dropout(0.5)),
    "mask": lambda: Call(_masked, mask=_mask()),
    "running_mask": lambda: Call(lambda self, x: x + self.running_mask.softmax(-1)[1], running_mask=_mask()),
    "counter": lambda: Call(_counts, calls=torch.tensor(0), scale=torch.tensor(0.7), flag=torch.tensor(data=True)),
    "cache": lambda: Call(lambda self, x: x * self.angles, angles_cache=torch.linspace(0.1, 1, WIDTH)),
    "statistic": Statistic,
    "spectral_norm": lambda: spectral_norm(_square()),
    "spectral_parametrization": lambda: parametrizations.spectral_norm(_square()),
    "weight_norm": lambda: weight_norm(_square()),
    "weight_norm_parametrization": lambda: parametrizations.weight_norm(_square()),
    "prune": lambda: prune.random_unstructured(_square(), "weight", amount=0.3),
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
    "real_view": lambda: (lambda w: Call(_complex, w=w, real=torch.view_as_real(w.detach())))(_complex_w()),
    "conjugate_view": lambda: (lambda w: Call(_complex, w=w, conj=w.detach().conj()))(_complex_w()),
    "negative": lambda: Call(_times_w, w=nn.Parameter(torch._neg_view(0.3 * torch.randn(4, 4)))),
    "sparse": lambda: Call(
        lambda self, x: x + torch.mv(self.matrix.to_dense(), x.new_ones(4).float()).to(x.dtype),
        matrix=torch.eye(WIDTH).to_sparse(),
    ),
    "float8": lambda: Call(lambda self, x: x * self.table.to(x.dtype), table=torch.ones(4).to(torch.float8_e4m3fn)),
    "two_tensors": lambda: Call(_times_w, w=nn.Parameter(TwoTensor(torch.randn(4, 4), torch.randn(4, 4)))),
}

# Blocks whose dtypes `.to(dtype)` would change to ones that they cannot use, or whose views it would end.
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


class Net(nn.Module):
    """Two layers that traits tie to each other, and blocks between them."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.a, self.b, self.blocks = _square(), _square(), nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).tanh()
        for block in self.blocks:
            x = x + block(x).tanh()
        return self.b(x)


def _data(net: Net, value: Tensor) -> None:
    net.b.weight.data = value


def _parameters(net: Net, a: Tensor, b: Tensor, **b_options: bool) -> None:
    net.a.weight, net.b.weight = nn.Parameter(a), nn.Parameter(b, **b_options)


def _rows(net: Net, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows = 0.3 * torch.randn(6, 4, dtype=dtype)
    return rows[:4], rows[2:]


def _columns(net: Net) -> tuple[Tensor, Tensor]:
    columns = 0.3 * torch.randn(4, 8).to(net.a.weight.dtype)
    return columns[:, :4], columns[:, 4:]


TRAITS: dict[str, Callable[[Net], object]] = {
    "tied": lambda net: setattr(net.b, "weight", net.a.weight),
    "tied by data": lambda net: _data(net, net.a.weight.data),
    "tied transposed": lambda net: _data(net, net.a.weight.data.t()),
    "tied negative": lambda net: _data(net, torch._neg_view(net.a.weight.data)),
    "tied parameters": lambda net: setattr(net.b, "weight", nn.Parameter(net.a.weight)),
    "tied to a frozen one": lambda net: _parameters(net, net.a.weight.data, net.a.weight.data, requires_grad=False),
    "row as bias": lambda net: setattr(net.b.bias, "data", net.a.weight.data[0]),
    "buffer of rows": lambda net: net.register_buffer("rows", net.a.weight.data[1:3]),
    "running buffer of rows": lambda net: net.register_buffer("running_rows", net.a.weight.data[1:3]),
    "cache of rows": lambda net: net.register_buffer("rows", net.a.weight.data[1:3], persistent=False),
    "two names of a buffer": lambda net: [net.register_buffer(n, net.a.weight.data.new_ones(2)[:]) for n in "mn"],
    "columns of one storage": lambda net: _parameters(net, *_columns(net)),
    "rows that overlap": lambda net: _parameters(net, *_rows(net, net.a.weight.dtype)),
    "frozen rows that overlap": lambda net: _parameters(net, *_rows(net, net.a.weight.dtype), requires_grad=False),
    "transposed weight": lambda net: setattr(net.a, "weight", nn.Parameter(net.a.weight.data.t())),
    "a is frozen": lambda net: net.a.requires_grad_(False),
    "module twice": lambda net: net.add_module("again", net.a),
    "parallel": lambda net: None,  # see `wrap`
    "compiled": lambda net: None,
    "patched forward": lambda net: setattr(net, "forward", (lambda inner: lambda x: inner(x))(net.forward)),
    "GAN": lambda net: None,  # see `loops.Loop.step`
}

# What may be refused, by name and before averaging begins. All else must work.
EXOTIC = {
    "negative",
    "tied negative",
    "two_tensors",
    "real_view",
    "conjugate_view",
    "conjugate_buffer",
    "float8",
    "negative_buffer",
    "rows that overlap",
    "frozen rows that overlap",
    "running_expanded",
    "row as bias",
}
# Memory that several tensors share, which `.to(dtype)` and `p.data = p.data.clone()` would divide.
SHARES = {name for name in TRAITS if "tied" in name or "row" in name or "columns" in name}


def build(case: "Case") -> Net:
    """Return the model of a case, the same each time."""
    torch.default_generator.manual_seed(case.seed)  # that of the CPU alone: to seed all takes longer than a step
    dtype = getattr(torch, case.dtype)
    net = Net([block if name in KEEPS_DTYPE else block.to(dtype) for name in case.blocks for block in [BLOCKS[name]()]])
    net.a.to(dtype), net.b.to(dtype)
    for trait in case.traits:
        TRAITS[trait](net)
    return net


def wrap(net: Net, case: "Case") -> nn.Module:
    """Return what the training loop calls."""
    outer: nn.Module = net
    if "compiled" in case.traits:
        outer = torch.compile(outer, backend="eager")  # `run` has it run eagerly, since compiling takes seconds
    return nn.DataParallel(outer) if "parallel" in case.traits else outer


OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.02),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01),
    "foreach": lambda parameters: torch.optim.SGD(parameters, lr=0.1, foreach=True),
    "groups": lambda parameters: torch.optim.SGD(
        [{"params": parameters[:1], "lr": 0.01}, {"params": parameters[1:]}], lr=0.1
    ),
    "two": lambda parameters: torch.optim.SGD(parameters, lr=0.1),  # see `loops.optimizers`
}

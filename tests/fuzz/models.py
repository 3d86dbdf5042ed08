"""Small models of these layers: how their tensors are tied, viewed, frozen and wrapped, and their optimizers."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .blocks import BLOCKS, KEEPS_DTYPE, square

if TYPE_CHECKING:
    from .cases import Case

DTYPES = ("float32", "float32", "float32", "float64", "bfloat16", "float16")


class Net(nn.Module):
    """Two layers, which traits tie to each other, and blocks between them."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.a, self.b, self.blocks = square(), square(), nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).tanh()
        for block in self.blocks:
            x = x + block(x).tanh()
        return self.b(x)


def _data(net: Net, value: Tensor) -> None:
    net.b.weight.data = value


def _passed_on(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def patched(x: Tensor) -> Tensor:
        return forward(x)

    return patched


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
    "patched forward": lambda net: setattr(net, "forward", _passed_on(net.forward)),
    "GAN": lambda net: None,  # see `loops.Loop.step`
}

# Models that polyak may refuse, by name and before averaging begins. All others must work.
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
SHARES |= {"real_view", "conjugate_view"}


def build(case: "Case") -> Net:
    """Return the model of a case, with the same weights in each call."""
    torch.default_generator.manual_seed(case.seed)  # of the CPU only: to seed all devices takes longer than a step
    dtype = getattr(torch, case.dtype)
    net = Net([block if name in KEEPS_DTYPE else block.to(dtype) for name in case.blocks for block in [BLOCKS[name]()]])
    net.a.to(dtype), net.b.to(dtype)
    for trait in case.traits:
        TRAITS[trait](net)
    return net


def wrap(net: Net, case: "Case") -> nn.Module:
    """Return the callable that the training loop calls."""
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

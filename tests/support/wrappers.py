"""Weights that wrap the tensor with their values, as torchao's do, and models with them on several ranks."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils import _pytree

_KEEPING = {
    getattr(torch.ops.aten, name).default
    for name in ("detach", "empty_like", "new_zeros", "view", "as_strided", "_to_copy", "clone", "copy_")
} | {torch.ops.aten.slice.Tensor, torch.ops.aten.split.Tensor}


class Halved(Tensor):
    """A weight of which products take twice the values over ``scale``: that of torchao's fp8 all-gather in small.

    Args:
        data: The values.
        scale: Computed in advance; None if it is to be computed of the values.
    """

    __module__ = "torchao.tests"  # it stands for a class of torchao's

    @staticmethod
    def __new__(cls, data: Tensor, scale: Tensor | None = None) -> "Halved":
        del scale
        return Tensor._make_wrapper_subclass(
            cls, data.shape, data.stride(), data.storage_offset(), dtype=data.dtype, device=data.device
        )

    def __init__(self, data: Tensor, scale: Tensor | None = None) -> None:
        self._data, self._scale = data, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["_data"] if self._scale is None else ["_data", "_scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], context: None, size: Any, stride: Any) -> "Halved":
        return cls(inner["_data"], inner.get("_scale"))

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = _pytree.tree_map_only(cls, lambda one: one._data, (args, kwargs or {}))
        found = function(*plain[0], **plain[1])
        if function is torch.ops.aten.copy_.default:
            return args[0]
        return _pytree.tree_map_only(Tensor, cls, found) if function in _KEEPING else found

    def fsdp_pre_all_gather(self, mesh: Any) -> Any:
        return (self._data,), (None,)

    def fsdp_post_all_gather(self, outputs: Any, metadata: Any, dtype: Any, *, out: Tensor | None = None) -> Any:
        return None if out is not None else (Halved(outputs[0]), outputs)


def net(seed: int = 0) -> nn.Sequential:
    """Return a small model, two weights of which are wrapped."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    for layer in model[0], model[2]:
        layer.weight = nn.Parameter(Halved(layer.weight.detach().clone()))
    return model


def plain_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))


def float8(*, all_gather: bool = False) -> nn.Sequential:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig(enable_fsdp_float8_all_gather=all_gather, emulate=True)
    return convert_to_float8_training(plain_net(), config=config)


def float8_all_gather() -> nn.Sequential:
    return float8(all_gather=True)


def quantized(name: str) -> Callable[[], nn.Sequential]:
    def make() -> nn.Sequential:
        from torchao import quantize_
        from torchao.prototype import quantized_training

        model = plain_net()
        quantize_(model, getattr(quantized_training, name)())
        return model

    return make


def values(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all parameters as plain tensors."""
    found = dict[str, Tensor]()
    for name, parameter in model.named_parameters():
        whole: Any = parameter.detach()
        whole = whole.full_tensor() if hasattr(whole, "full_tensor") else whole
        while hasattr(whole, "__tensor_flatten__"):
            whole = getattr(whole, whole.__tensor_flatten__()[0][0])
        found[name] = whole.clone()
    return found


def train(model: nn.Module, optimizer: Any, steps: int, after: Any = lambda: None) -> None:
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(torch.randn(8, 16, generator=generator)) - 1).square().mean().backward()
        optimizer.step()
        after()


def under_fsdp(folder: str, make: Any, precompute: Any = None) -> dict[str, Any]:
    """Average a model whose wrapped weights FSDP2 shards; return what there is to compare. On each rank.

    Args:
        folder: For an export.
        make: Returns the model.
        precompute: Called with the model after each step.
    """
    from polyak import EMA, attach

    ends, error, decay = list[dict[str, Tensor]](), 0.0, 0.5 ** (1 / 3)
    for plain in (True, False):
        model = make()
        for layer in model[0], model[2], model:
            fully_shard(layer)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        ema = None if plain else attach(EMA("3ba"), model, optimizer)
        reference = dict[str, Tensor]()

        def after(model: nn.Module = model, reference: dict[str, Tensor] = reference) -> None:
            for name, now in sharded_values(model).items():
                before = reference.get(name)
                reference[name] = now.double() if before is None else decay * before + (1 - decay) * now.double()
            if precompute is not None:
                precompute(model)

        train(model, optimizer, 5, after)
        if ema is not None:
            scales = held_scales(model)
            with ema.applied():
                found = sharded_values(model)
                error = max(float((found[n].double() - r).norm() / r.norm()) for n, r in reference.items())
                inside = held_scales(model)
                out = model(torch.ones(2, 16)).detach()
            state = copy.deepcopy({name: one.to_local() for name, one in ema.average._average.shadow.averages.items()})
            kinds = {type(one).__name__ for one in state.values()}
            averages = {name: one.full_tensor() for name, one in ema.average._average.shadow.averages.items()}
            ema.save(f"{folder}/averaged.safetensors")
            saved = load_file(f"{folder}/averaged.safetensors")
            same = all(a is b for a, b in zip(held_scales(model), scales, strict=True))
        train(model, optimizer, 2, after)
        ends.append(sharded_values(model))
    return {
        "error": error,
        "same": all(torch.equal(ends[0][name], one) for name, one in ends[1].items()),
        "kinds": kinds,
        "inside": [one is None for one in inside],
        "scales restored": same,
        "out": out,
        "saved": saved.keys() == averages.keys() and all(torch.equal(saved[n], one) for n, one in averages.items()),
    }


def sharded_values(model: nn.Module) -> dict[str, Tensor]:
    """Return the local shards of all parameters as plain tensors, copied."""
    from polyak.sharding import local

    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    return {name: local(parameter).detach().clone() for name, parameter in model.named_parameters()}


def held_scales(model: nn.Module) -> list[Any]:
    locals_ = [getattr(p, "_local_tensor", p) for p in model.parameters()]
    return [one._precomputed_scale for one in locals_ if hasattr(one, "_precomputed_scale")]

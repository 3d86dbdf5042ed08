"""Averages of other libraries with one interface, for benchmarks that compare them with polyak's.

Libraries that are not installed are skipped, with one message: `pip install ema-pytorch torch-ema` and, without their
dependencies, `diffusers` and `timm`.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from polyak.averaging.weights import Shadow

DECAY = 0.999
OURS = "polyak"
PACKAGES = ("torch", "diffusers", "ema-pytorch", "timm", "torch-ema")


@dataclass
class Average:
    """An average of a model: its update and, unless it is a module, its swap and restore."""

    update: Callable[[], object]
    lend: Callable[[], object] | None = None
    give_back: Callable[[], object] | None = None


class MissingError(Exception):
    """A library is not installed, or does not support the case."""


class No:
    """The result of any function of ``Nothing``."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __bool__(self) -> bool:
        return False


class Nothing(ModuleType):
    """A module whose functions return False: a stub for the parts of a package that its average does not need."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return No


def file_of(package: str, path: str, without: tuple[str, ...] = ()) -> ModuleType:
    """Import one file of a package without the package, whose dependencies are not installed."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise MissingError(f"{package} is not installed")
    parent = f"{package}_without"
    for name in (parent, *(f"{parent}.{part}" for part in without)):
        sys.modules[name] = Nothing(name)
    name = f"{parent}.{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, Path(found.origin).parent / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def polyak(model: nn.Module, average: torch.dtype) -> Average:
    shadow = Shadow(model, dtype=average)
    return Average(lambda: shadow.update_(1 - DECAY), lambda: shadow.swap_in("the benchmark"), shadow.restore)


def averaged_model(**functions: Callable[..., object]) -> Callable[[nn.Module, torch.dtype], Average]:
    def make(model: nn.Module, average: torch.dtype) -> Average:
        averaged = AveragedModel(model, **functions)
        averaged.module.to(average)
        averaged.update_parameters(model)
        return Average(lambda: averaged.update_parameters(model))

    return make


def ema_pytorch(*, foreach: bool) -> Callable[[nn.Module, torch.dtype], Average]:
    def make(model: nn.Module, average: torch.dtype) -> Average:
        try:
            from ema_pytorch import EMA
        except ImportError as error:
            raise MissingError(str(error)) from error
        copy = deepcopy(model).to(average)
        ema = EMA(
            model,
            ema_model=copy,
            beta=DECAY,
            update_every=1,
            update_after_step=0,
            use_foreach=foreach,
            coerce_dtype=True,
        )
        ema.update()
        return Average(ema.update)

    return make


def timm(model: nn.Module, average: torch.dtype) -> Average:
    v3 = file_of("timm", "utils/model_ema.py").ModelEmaV3(model, DECAY, dtype=average)
    return Average(lambda: v3.update(model))


def torch_ema(model: nn.Module, average: torch.dtype) -> Average:
    try:
        from torch_ema import ExponentialMovingAverage
    except ImportError as error:
        raise MissingError(str(error)) from error
    ema = ExponentialMovingAverage(model.parameters(), DECAY, use_num_updates=False)
    ema.shadow_params = [p.to(average) for p in ema.shadow_params]

    def lend() -> None:
        ema.store()
        ema.copy_to()

    return Average(ema.update, lend, ema.restore)


def diffusers(*, foreach: bool) -> Callable[[nn.Module, torch.dtype], Average]:
    def make(model: nn.Module, average: torch.dtype) -> Average:
        parts = ("models", "pipelines", "schedulers", "utils", "utils.torch_utils")
        ema = file_of("diffusers", "training_utils.py", parts).EMAModel(
            model.parameters(), decay=DECAY, foreach=foreach
        )
        ema.shadow_params = [p.to(average) for p in ema.shadow_params]

        def lend() -> None:
            ema.store(model.parameters())
            ema.copy_to(model.parameters())

        return Average(lambda: ema.step(model.parameters()), lend, lambda: ema.restore(model.parameters()))

    return make


def composer(model: nn.Module, average: torch.dtype) -> Average:
    """Compute what `composer.algorithms.ema.compute_ema` does: Composer does not install with a current torch."""
    averages = {name: p.detach().to(average, copy=True) for name, p in model.named_parameters()}

    @torch.no_grad()
    def update() -> None:
        for name, p in model.named_parameters():
            averages[name].copy_(averages[name] * DECAY + p.data * (1 - DECAY))

    return Average(update)


def tensor_by_tensor(model: nn.Module, average: torch.dtype) -> Average:
    """Swap with a clone of each tensor, as the `swap` functions of several training scripts do."""
    own = [p.detach().to(average, copy=True) for p in model.parameters()]

    @torch.no_grad()
    def swap() -> None:
        for s, p in zip(own, model.parameters(), strict=True):
            aside: Tensor = p.detach().clone()
            p.copy_(s)
            s.copy_(aside)

    if any(p.dtype != average for p in model.parameters()):
        raise MissingError("a swap needs one dtype")
    return Average(lambda: None, swap, swap)


MAKERS: dict[str, Callable[[nn.Module, torch.dtype], Average]] = {
    OURS: polyak,
    "torch AveragedModel, avg_fn": averaged_model(avg_fn=get_ema_avg_fn(DECAY)),
    "torch AveragedModel, multi_avg_fn": averaged_model(multi_avg_fn=get_ema_multi_avg_fn(DECAY)),
    "ema-pytorch": ema_pytorch(foreach=False),
    "ema-pytorch, foreach": ema_pytorch(foreach=True),
    "timm ModelEmaV3": timm,
    "torch-ema": torch_ema,
    "diffusers EMAModel": diffusers(foreach=False),
    "diffusers EMAModel, foreach": diffusers(foreach=True),
    "formula of Composer": composer,
}
# The faster form of each library, for models of which few averages fit in memory.
QUICK = tuple(
    name
    for name in MAKERS
    if name
    not in ("torch AveragedModel, avg_fn", "ema-pytorch", "torch-ema", "diffusers EMAModel", "formula of Composer")
)


def averages_of(model: nn.Module, average: torch.dtype, names: Iterable[str] = MAKERS) -> dict[str, Average]:
    """Return the averages by name, without those that are not available."""
    made = {}
    for name in names:
        try:
            made[name] = MAKERS[name](model, average)
        except (MissingError, RuntimeError, TypeError) as error:
            print(f"{name} is skipped: {str(error).splitlines()[0]}")
    return made

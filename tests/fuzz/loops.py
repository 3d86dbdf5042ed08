"""The training loops: the same steps with and without an average, and the changes that users make between steps."""

import io
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from polyak import EMA, Offload, attach

from .blocks import BATCH, KEEPS_DTYPE, WIDTH, is_dense
from .models import OPTIMIZERS, SHARES, Net, build, wrap


class StepError(Exception):
    """An error in a step of the user."""


def ema_of(options: dict[str, Any]) -> EMA:
    """Return the average that a case asks for."""
    dtype, smoothing = options["dtype"], options["smoothing"]
    return EMA(
        None if smoothing is not None else options["half_life"],
        smoothing,
        options["ema_start"],
        options["update_interval"],
        dtype=getattr(torch, dtype) if dtype else None,
        offload=Offload() if options["offload"] else None,
    )


class Loop:
    """A custom loop over the model of a case.

    Args:
        case: The case that runs.
        averaged: Whether an average follows.
    """

    def __init__(self, case: Any, *, averaged: bool) -> None:
        self.case = case
        self.net = build(case)
        self.model = wrap(self.net, case)
        self.halves = _halves(self.net, two=case.optimizer == "two" or "GAN" in case.traits)
        self.optimizers = [OPTIMIZERS[case.optimizer](half) for half in self.halves]
        self.moved = set[str]()
        self.changes = list[str]()
        self.poisoned = self.raises = self.idle = False
        self.ema = ema_of(case.ema) if averaged else None
        by_hand = case.loop == "by hand"
        self.attached = attach(self.ema, self.model, None if by_hand else self.optimizers[-1]) if self.ema else None

    def step(self, i: int) -> bool:
        """Train on a batch; return whether it counts.

        Args:
            i: The number of the batch.
        """
        torch.default_generator.manual_seed(1000 * self.case.seed + i)
        x = torch.randn(BATCH, WIDTH).to(self.net.a.weight.dtype)
        gan, counted = "GAN" in self.case.traits, False
        for n, optimizer in enumerate(self.optimizers):
            last = n == len(self.optimizers) - 1
            frozen = self._freeze_all_but(self.halves[n]) if gan else []
            if n == 0 or gan:
                self._backward(x)
            if last and self.raises:
                self.raises = False
                self._zero_grad(frozen)
                raise StepError
            if last and self.idle:
                self._zero_grad([])
            clean = self._poison() if last and self.poisoned else None
            self._note_moved(optimizer)
            counted = self.case.loop == "by hand" or any(p.grad is not None for p in _parameters(optimizer))
            optimizer.step()
            if last and self.attached and self.case.loop == "by hand":
                self.attached.step()
            if last:
                _ = counted and self.on_counted()
            if clean is not None:
                self.net.a.bias.data[0] = clean
            if gan or last:
                self._zero_grad(frozen)
        self.idle = False
        return counted

    def on_counted(self) -> None:
        """Called after each step; a test may replace it."""

    def _backward(self, x: Tensor) -> None:
        loss = self.model(x).float().square().mean()
        if loss.requires_grad:
            loss.backward()

    def _freeze_all_but(self, half: list[Tensor]) -> list[Tensor]:
        own = set(map(id, half))
        frozen = [p for p in self.net.parameters() if p.requires_grad and id(p) not in own]
        for parameter in frozen:
            parameter.requires_grad_(False)
        return frozen

    def _zero_grad(self, frozen: list[Tensor]) -> None:
        for parameter in self.net.parameters():
            parameter.grad = None
        for parameter in frozen:
            parameter.requires_grad_(True)

    def _note_moved(self, optimizer: torch.optim.Optimizer) -> None:
        moved = {id(p) for p in _parameters(optimizer) if p.grad is not None}
        self.moved |= {name for name, p in self.net.named_parameters(remove_duplicate=False) if id(p) in moved}

    def _poison(self) -> Tensor:
        self.poisoned = False
        clean = self.net.a.bias.data[0].clone()
        self.net.a.bias.data[0] = torch.nan
        return clean

    def change(self, name: str) -> None:
        """Change the model, and note the change.

        Args:
            name: In ``CHANGES``.
        """
        if name == "dtype" and (
            SHARES & {*self.case.traits, *self.case.blocks} or self.case.dtype not in ("float32", "float64")
        ):
            return
        if name == "storage" and SHARES & {*self.case.traits, *self.case.blocks}:
            return
        CHANGES[name](self)
        self.changes.append(name)

    def save(self) -> bytes:
        """Return a checkpoint as it is in a file."""
        assert self.attached is not None
        state = {
            "model": self.net.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "ema": self.attached.state_dict(),
        }
        torch.save(state, file := io.BytesIO())
        return file.getvalue()

    def resumed(self, saved: bytes) -> "Loop":
        """Return a new loop that has loaded a checkpoint.

        Args:
            saved: By ``save``.
        """
        state = torch.load(io.BytesIO(saved), weights_only=True)
        new = type(self)(self.case, averaged=True)
        assert new.attached is not None
        for change in self.changes:
            new.change(change)
        new.net.load_state_dict(state["model"])
        for optimizer, own in zip(new.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(own)
        new.attached.load_state_dict(state["ema"])
        new.net.train(self.net.training)
        new.moved, new.poisoned, new.raises, new.idle = self.moved, self.poisoned, self.raises, self.idle
        return new


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _halves(net: Net, *, two: bool) -> list[list[Tensor]]:
    numeric = [p for p in net.parameters() if p.is_floating_point() or p.is_complex()]
    last = set(map(id, net.b.parameters())) if two else set[int]()
    halves = [[p for p in numeric if id(p) not in last], [p for p in numeric if id(p) in last]]
    return [half for half in halves if half]


def _to_other_dtype(loop: Loop) -> None:
    net = loop.net
    dtype = torch.float64 if net.a.weight.dtype == torch.float32 else torch.float32
    for module in (net.a, net.b):
        module.to(dtype)
    for name, block in zip(loop.case.blocks, net.blocks, strict=True):
        if name not in KEEPS_DTYPE:
            block.to(dtype)
    for buffer in ("m", "n"):
        if hasattr(net, buffer):
            setattr(net, buffer, getattr(net, buffer).to(dtype))
    for optimizer in loop.optimizers:
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, Tensor) and value.dim() and value.dtype.is_floating_point:
                    state[key] = value.to(parameter.dtype)


def _replace(loop: Loop) -> None:
    old = loop.net.b.bias
    new = nn.Parameter(old.detach().clone() + 0.125, requires_grad=old.requires_grad)
    loop.net.b.bias = new
    for optimizer in loop.optimizers:
        for group in optimizer.param_groups:
            group["params"] = [new if p is old else p for p in group["params"]]
        if old in optimizer.state:
            optimizer.state[new] = optimizer.state.pop(old)
    loop.halves = [[new if p is old else p for p in half] for half in loop.halves]


def _grow(loop: Loop) -> None:
    torch.default_generator.manual_seed(loop.case.seed)
    layer = nn.Linear(WIDTH, WIDTH).to(loop.net.a.weight.dtype)
    loop.net.blocks.append(layer)
    loop.optimizers[-1].add_param_group({"params": list(layer.parameters()), "lr": 0.05})
    loop.halves[-1] = loop.halves[-1] + list(layer.parameters())


def _clone_storage(loop: Loop) -> None:
    for parameter in loop.net.parameters():
        with suppress(RuntimeError):
            parameter.data = parameter.data.clone()


CHANGES: dict[str, Callable[[Loop], object]] = {
    "dtype": _to_other_dtype,
    "cpu": lambda loop: loop.net.to("cpu"),
    "storage": _clone_storage,
    "shared memory": lambda loop: [t.share_memory_() for t in loop.net.state_dict().values() if is_dense(t)],
    "freeze a": lambda loop: loop.net.a.requires_grad_(False),
    "unfreeze all": lambda loop: [p.requires_grad_(True) for p in loop.net.parameters() if p.is_floating_point()],
    "freeze all": lambda loop: loop.net.requires_grad_(False),
    "replace a parameter": _replace,
    "grow": _grow,
    "eval mode": lambda loop: loop.net.eval(),
    "train mode": lambda loop: loop.net.train(),
}

# Events that act on a loop with or without an average, by name.
STRUCTURAL: dict[str, Callable[[Loop], object]] = {
    **{name: partial(Loop.change, name=name) for name in CHANGES},
    "nan": lambda loop: setattr(loop, "poisoned", True),
    "step raises": lambda loop: setattr(loop, "raises", True),
    "step without gradients": lambda loop: setattr(loop, "idle", True),
}

"""Compare a run with an average to the same run without one, and the average to the float64 reference."""

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .blocks import BATCH, WIDTH
from .loops import STRUCTURAL, Loop, StepError
from .models import Net
from .reference import Reference, flat, tensors

if TYPE_CHECKING:
    from .cases import Case


class WrongError(AssertionError):
    """A check failed."""


class InvalidError(Exception):
    """The case cannot be trained without polyak either."""


class Check:
    """A run with an average, the same run without one, and the reference of the average.

    Args:
        case: The case that runs.
    """

    def __init__(self, case: "Case", reference: Reference) -> None:
        self.case, self.reference = case, reference
        self.twin = valid(Loop, case, averaged=False)
        self.twin.on_counted = lambda: reference.count(self.twin.net, self.twin.moved)
        self.teacher = False  # whether the model holds its own average
        self.settled = False  # whether polyak has averaged all tensors, so that it must refuse nothing from now on
        self.chance = random.Random(case.seed)

    def begin(self) -> None:
        """Attach the average."""
        self.run = Loop(self.case, averaged=True)

    def step(self, i: int) -> None:
        """Train both on a batch.

        Args:
            i: The number of the batch.
        """
        with suppress(StepError):
            valid(self.twin.step, i)
        with suppress(StepError):
            self.run.step(i)

    def change(self, name: str) -> None:
        """Change the model of both.

        Args:
            name: In ``STRUCTURAL``.
        """
        self.settled = False
        self.reference.exact &= name != "dtype"
        valid(STRUCTURAL[name], self.twin)
        STRUCTURAL[name](self.run)

    @property
    def begun(self) -> bool:
        """Whether averaging must have begun."""
        return self.reference.begun

    @property
    def net(self) -> Net:
        """The model of the run."""
        return self.run.net

    @property
    def average(self) -> dict[str, Tensor]:
        """The state dict of the average."""
        assert self.run.attached is not None
        return self.run.attached.state_dict()["algorithms"][0][1].get("ema_model", {})

    def demand(self, differences: Iterable[str], where: str) -> None:
        """Raise the first difference, if there is one."""
        for difference in differences:
            raise WrongError(f"{where}: {difference}")

    def same_weights(self, where: str) -> None:
        """Check that the model equals the model without polyak, bit for bit."""
        got, want = held(self.net), held(self.twin.net)
        self.demand(differences(got, want, self.teacher), where)
        flags = [p.requires_grad for p in self.twin.net.parameters()]
        if not self.teacher and [p.requires_grad for p in self.net.parameters()] != flags:
            raise WrongError(f"{where}: requires_grad differs")
        if self.net.training != self.twin.net.training:
            raise WrongError(f"{where}: the mode differs")

    def online(self) -> dict[str, Tensor]:
        """Return the training weights in float64."""
        return {name: flat(tensor) for name, (tensor, _) in tensors(self.twin.net).items()}

    def right_average(self, where: str) -> None:
        """Check that the saved state holds the average."""
        assert self.run.ema is not None
        if self.run.ema.ema_started != self.begun:
            raise WrongError(f"{where}: averaging has begun: {self.run.ema.ema_started}, but must: {self.begun}")
        if self.run.ema.num_updates != self.reference.num_updates:
            raise WrongError(f"{where}: {self.run.ema.num_updates} updates for {self.reference.num_updates}")
        if self.begun:
            self.demand(self.reference.wrong_in(self.average), where)

    @contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """Swap the average in, check it, restore the training weights, and check those."""
        assert self.run.attached is not None
        parameters, mode = list(map(id, self.net.parameters())), self.net.training
        try:
            with self.run.attached.applied() as model:
                if self.begun:
                    self.demand(self.reference.wrong(self.net, self.online(), rounded=True), "inside applied()")
                else:
                    self.same_weights("inside applied() before averaging")
                yield model
        finally:
            self.net.train(mode)
        if parameters != list(map(id, self.net.parameters())):
            raise WrongError("after applied(): parameters are other objects")
        self.same_weights("after applied()")

    def forward(self, net: nn.Module) -> Tensor:
        """Return the output of a model in eval mode; restore the random state."""
        mode = net.training
        x = torch.linspace(-1, 1, BATCH * WIDTH).reshape(BATCH, WIDTH).to(self.net.a.weight.dtype)
        try:
            return net.eval()(x).detach().clone()
        finally:
            net.train(mode)


def valid(do: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Run torch code that does not involve polyak."""
    try:
        return do(*args, **options)
    except StepError:
        raise
    except Exception as error:
        raise InvalidError from error


def can(do: Callable[[], object]) -> bool:
    """Return whether torch code runs without polyak."""
    try:
        do()
    except Exception:
        return False
    return True


def held(net: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(net.named_parameters(remove_duplicate=False)),
        **dict(net.named_buffers(remove_duplicate=False)),
    }


def differences(got: dict[str, Tensor], want: dict[str, Tensor], more: bool = False) -> Iterator[str]:
    if missing := want.keys() - got.keys():
        yield f"{sorted(missing)} missing"
    if not more and (unexpected := got.keys() - want.keys()):
        yield f"{sorted(unexpected)} unexpected"
    for name, tensor in want.items():
        own = got[name]
        if not isinstance(own, type(tensor)) or own.dtype != tensor.dtype or own.shape != tensor.shape:
            yield f"{name} is of {own.dtype}, {tuple(own.shape)} for {tensor.dtype}, {tuple(tensor.shape)}"
        elif tensor.layout != torch.strided:
            continue
        elif (
            not torch.equal(own, tensor)
            and not torch.equal(a := flat(own), b := flat(tensor))
            and not torch.equal(a.nan_to_num(7), b.nan_to_num(7))
        ):
            yield f"{name} differs by up to {float((a - b).abs().nan_to_num(torch.inf).max()):.3g}"

"""What happens between the steps of a run: changes to the model, and uses of its average, which must change nothing."""

import copy
import io
import pickle
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import polyak
from polyak import PolyakError, update_bn

from .loops import CHANGES, Loop, Stopped
from .models import BATCH, SHARES, WIDTH, Net
from .reference import Reference, flat, tensors

if TYPE_CHECKING:
    from .cases import Case


class Wrong(AssertionError):
    """What must hold and does not."""


class Invalid(Exception):
    """The case cannot be trained without polyak either."""


class Check:
    """A run with an average, one without, and what the average must be.

    Args:
        case: What is run.
    """

    def __init__(self, case: "Case", reference: Reference) -> None:
        self.case, self.reference = case, reference
        self.twin = _valid(Loop, case, averaged=False)
        self.twin.on_counted = lambda: reference.count(self.twin.net, self.twin.moved)
        self.teacher = False  # whether the model holds its own average
        self.settled = False  # whether polyak has averaged all that there is, so that it may refuse nothing any more
        self.chance = random.Random(case.seed)

    def begin(self) -> None:
        """Attach the average."""
        self.run = Loop(self.case, averaged=True)

    def step(self, i: int) -> None:
        """Train both on a batch.

        Args:
            i: The number of the batch.
        """
        with suppress(Stopped):
            _valid(self.twin.step, i)
        with suppress(Stopped):
            self.run.step(i)

    def happen(self, name: str) -> None:
        """Let an event happen.

        Args:
            name: In ``OBSERVING`` or ``STRUCTURAL``.
        """
        if name in OBSERVING:
            OBSERVING[name](self)
        else:
            self.settled = False
            self.reference.exact &= name != "dtype"
            for loop in (self.twin, self.run):
                STRUCTURAL[name](loop)

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
        """What is saved of the average."""
        assert self.run.attached is not None
        return self.run.attached.state_dict()["algorithms"][0][1].get("ema_model", {})

    def demand(self, differences: Iterable[str], where: str) -> None:
        """Raise the first difference, if there is one."""
        for difference in differences:
            raise Wrong(f"{where}: {difference}")

    def same_weights(self, where: str) -> None:
        """Demand that the model is as it is without polyak, bit for bit."""
        got, want = _held(self.net), _held(self.twin.net)
        self.demand(_differences(got, want, self.teacher), where)
        flags = [p.requires_grad for p in self.twin.net.parameters()]
        if not self.teacher and [p.requires_grad for p in self.net.parameters()] != flags:
            raise Wrong(f"{where}: requires_grad differs")
        if self.net.training != self.twin.net.training:
            raise Wrong(f"{where}: the mode differs")

    def online(self) -> dict[str, Tensor]:
        """Return the training weights in float64."""
        return {name: flat(tensor) for name, (tensor, _) in tensors(self.twin.net).items()}

    def right_average(self, where: str) -> None:
        """Demand that what is saved is the average."""
        assert self.run.ema is not None
        if self.run.ema.ema_started != self.begun:
            raise Wrong(f"{where}: averaging has begun: {self.run.ema.ema_started}, but must: {self.begun}")
        if self.run.ema.num_updates != self.reference.num_updates:
            raise Wrong(f"{where}: {self.run.ema.num_updates} updates for {self.reference.num_updates}")
        if self.begun:
            self.demand(self.reference.wrong_in(self.average), where)

    @contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """Swap the average in, look at it, and look at what is there afterwards."""
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
            raise Wrong("after applied(): parameters are other objects")
        self.same_weights("after applied()")

    def forward(self, net: nn.Module) -> Tensor:
        """Return what a model computes in eval mode; the random state stays."""
        mode = net.training
        x = torch.linspace(-1, 1, BATCH * WIDTH).reshape(BATCH, WIDTH).to(self.net.a.weight.dtype)
        try:
            return net.eval()(x).detach().clone()
        finally:
            net.train(mode)


def _valid(do: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Do what does not concern polyak."""
    try:
        return do(*args, **options)
    except Stopped:
        raise
    except Exception as error:
        raise Invalid from error


def _can(do: Callable[[], object]) -> bool:
    """Whether torch can do something without polyak."""
    try:
        do()
    except Exception:
        return False
    return True


def _held(net: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(net.named_parameters(remove_duplicate=False)),
        **dict(net.named_buffers(remove_duplicate=False)),
    }


def _differences(got: dict[str, Tensor], want: dict[str, Tensor], more: bool = False) -> Iterator[str]:
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
        elif not torch.equal(own, tensor) and not torch.equal(a := flat(own), b := flat(tensor)) and not torch.equal(a.nan_to_num(7), b.nan_to_num(7)):
            yield f"{name} differs by up to {float((a - b).abs().nan_to_num(torch.inf).max()):.3g}"


# Uses of the average. Each leaves everything as it was.


def _swap(check: Check) -> None:
    with check.applied():
        check.forward(check.net)


def _train_mode_forward(check: Check) -> None:
    with check.applied() as model:
        model.train()(torch.ones(BATCH, WIDTH, dtype=check.net.a.weight.dtype))


def _update_bn(check: Check) -> None:
    x = torch.arange(12.0).reshape(BATCH, WIDTH).to(check.net.a.weight.dtype)
    with check.applied() as model:
        update_bn(model, [x, x + 1])


def _raises(error: type[BaseException]) -> Callable[[Check], None]:
    def event(check: Check) -> None:
        assert check.run.attached is not None
        with suppress(error), check.run.attached.applied():
            raise error
        check.same_weights(f"after {error.__name__} in applied()")

    return event


def _inference(check: Check) -> None:
    with check.applied(), torch.inference_mode():
        check.forward(check.net)
    with torch.inference_mode(), check.run.attached.applied():  # type: ignore[union-attr]
        check.forward(check.net)
    check.same_weights("after applied() in inference mode")


def _assign_buffers(check: Check) -> None:
    if not check.begun:
        return
    with check.applied():
        for module in check.net.modules():
            for name, buffer in list(module._buffers.items()):
                if buffer is not None and buffer.layout == torch.strided and buffer.is_floating_point():
                    setattr(module, name, buffer + 1)


def _change_buffers(check: Check) -> None:
    if not check.begun:
        return
    with check.applied():
        shared = {t.untyped_storage().data_ptr() for p in check.net.parameters() for t in [p] if type(p) is nn.Parameter}
        for buffer in check.net.buffers():
            dense = buffer.layout == torch.strided and buffer.dtype in (torch.float32, torch.float64, torch.int64)
            if dense and buffer.untyped_storage().data_ptr() not in shared and 0 not in buffer.stride():
                buffer.add_(1)


def _change_parameter(check: Check) -> None:
    if not check.begun or not check.reference.averages("b.weight"):
        return
    weight = check.net.b.weight
    try:
        with check.applied(), torch.no_grad():
            weight.mul_(2)
    except PolyakError as error:
        if "b.weight" not in str(error) and "a.weight" not in str(error):
            raise Wrong(f"a parameter changed in applied() must be named (got {error})") from error
    else:
        raise Wrong("a parameter changed in applied() must be refused")
    check.same_weights("after a parameter changed in applied()")


def _move_inside(check: Check) -> None:
    if check.begun:
        with check.applied() as model:
            _share_memory(model)


def _clone_inside(check: Check) -> None:
    if check.begun and not SHARES & {*check.case.traits}:
        with suppress(PolyakError), check.applied():
            check.net.a.bias.data = check.net.a.bias.data.clone()
        check.same_weights("after a parameter's storage was replaced in applied()")


def _step_inside(check: Check) -> None:
    if not check.begun:
        return
    optimizer = check.run.optimizers[-1]
    own = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if not own:
        return
    with check.applied():
        for parameter in own:
            parameter.grad = torch.ones_like(parameter)
        try:
            optimizer.step()
        except PolyakError:
            pass
        else:
            raise Wrong("an optimizer step in applied() must be refused")
        finally:
            for parameter in own:
                parameter.grad = None


def _nested(check: Check) -> None:
    if check.begun:
        with check.applied():
            try:
                with check.run.attached.applied():  # type: ignore[union-attr]
                    pass
            except PolyakError:
                return
            raise Wrong("applied() in applied() must be refused")


def _interrupted(check: Check) -> None:
    """Interrupt at some line of polyak's, on the way in or out."""
    at = check.chance.randint(1, 250)
    folder, seen = polyak.__path__[0], 0

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal seen
        if not frame.f_code.co_filename.startswith(folder):
            return None
        seen += event == "line"
        if event == "line" and seen == at:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    assert check.run.attached is not None
    assert check.run.ema is not None
    try:
        sys.settrace(trace)
        with check.run.attached.applied():
            pass
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    check.right_average("after an interrupt")
    check.run.ema.get_training_model(check.net)
    check.same_weights("after an interrupt")
    _swap(check)


def _can_resume(check: Check) -> bool:
    def resume() -> None:
        torch.save(check.twin.net.state_dict(), file := io.BytesIO())
        file.seek(0)
        state = torch.load(file, weights_only=True)
        Loop(check.case, averaged=False).net.load_state_dict(state, strict=False)

    return not check.teacher and _can(resume)


def _save(check: Check) -> None:
    if _can_resume(check):
        check.run.save()


def _resume(check: Check) -> None:
    if not _can_resume(check):
        return
    check.run = check.run.resumed(check.run.save())
    check.same_weights("after resuming")


def _resume_inside(check: Check) -> None:
    assert check.run.attached is not None
    if not _can_resume(check):
        return
    with check.run.attached.applied():
        saved = check.run.save()
    check.run = check.run.resumed(saved)
    check.same_weights("after resuming from a state saved in applied()")


def _ema_model(check: Check, then: Callable[[Any], object] = lambda module: None) -> None:
    assert check.run.ema is not None
    try:
        module: Any = check.run.ema.ema_model
    except PolyakError as error:
        if "applied()" not in str(error):
            raise Wrong(f"ema_model, if it cannot be had, must name applied() (got {error})") from error
        return
    if (module is not None) != check.begun:
        raise Wrong("ema_model must be there from when averaging begins")
    if not check.begun:
        return
    check.demand(check.reference.wrong(module, check.online(), rounded=False), "ema_model")
    if check.net.a.weight.dtype == module.a.weight.dtype:
        got = check.forward(module)
        with check.applied():
            want = check.forward(check.net)
        if not torch.allclose(got.float(), want.float(), rtol=1e-2, atol=1e-2, equal_nan=True):
            raise Wrong(f"ema_model computes something else: off by {float((got - want).abs().max()):.3g}")
    then(module)


def _share_memory(module: nn.Module) -> None:
    if all(buffer.layout == torch.strided for buffer in module.buffers()):
        module.share_memory()


def _copy(take: Callable[[Any], object]) -> Callable[[Check], None]:
    def event(check: Check) -> None:
        if _can(lambda: take((check.twin.model, check.twin.optimizers))):
            with suppress(PolyakError):
                take(check.run.attached)

    return event


def _copy_model(check: Check) -> None:
    if _can(lambda: copy.deepcopy(check.twin.net)):
        other = copy.deepcopy(check.net)
        check.demand(_differences(_held(other), _held(check.twin.net), check.teacher), "a copy of the model")


def _get_ema_model(check: Check) -> None:
    if check.begun:
        assert check.run.ema is not None
        check.run.ema.get_ema_model(check.net)
        check.demand(check.reference.wrong(check.net, check.online(), rounded=True), "after get_ema_model()")
        check.run.ema.get_training_model(check.net)
        check.same_weights("after get_training_model()")


def _metrics(check: Check) -> None:
    assert check.run.ema is not None
    if any(value < 0 or value != value for value in check.run.ema.metrics().values()):
        raise Wrong(f"metrics must be numbers (got {check.run.ema.metrics()})")


def _teacher(check: Check) -> None:
    assert check.run.ema is not None
    if check.begun and not check.teacher:
        check.net.teacher = check.run.ema.ema_model
        check.teacher = True


OBSERVING: dict[str, Callable[[Check], None]] = {
    "applied": _swap,
    "applied: train mode": _train_mode_forward,
    "applied: update_bn": _update_bn,
    "applied: error": _raises(ZeroDivisionError),
    "applied: KeyboardInterrupt": _raises(KeyboardInterrupt),
    "applied: inference mode": _inference,
    "applied: buffers assigned": _assign_buffers,
    "applied: buffers changed": _change_buffers,
    "applied: parameter changed": _change_parameter,
    "applied: share_memory": _move_inside,
    "applied: storage": _clone_inside,
    "applied: step": _step_inside,
    "applied: applied": _nested,
    "applied: interrupted": _interrupted,
    "save": _save,
    "resume": _resume,
    "applied: save, resume": _resume_inside,
    "ema_model": _ema_model,
    "ema_model: half": lambda check: _ema_model(check, lambda module: module.half()),
    "ema_model: share_memory": lambda check: _ema_model(check, _share_memory),
    "ema_model: train": lambda check: _ema_model(check, lambda module: module.train()),
    "deepcopy": _copy(copy.deepcopy),
    "pickle": _copy(pickle.dumps),
    "copy the model": _copy_model,
    "get_ema_model": _get_ema_model,
    "metrics": _metrics,
    "teacher": _teacher,
}


STRUCTURAL: dict[str, Callable[[Loop], object]] = {
    **{name: partial(Loop.change, name=name) for name in CHANGES},
    "nan": lambda loop: setattr(loop, "poisoned", True),
    "step raises": lambda loop: setattr(loop, "raises", True),
    "step without gradients": lambda loop: setattr(loop, "idle", True),
}

"""User code that runs while the average is in the model. Each must leave the run unchanged."""

import copy
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

import torch
from torch import nn

import polyak
from polyak import PolyakError, update_bn

from .blocks import BATCH, WIDTH, is_dense
from .check import Check, WrongError
from .models import SHARES
from .reference import inner

_PLAIN = (torch.float32, torch.float64, torch.int64)


def _swap(check: Check) -> None:
    with check.applied():
        if check.begun:
            check.forward(check.net)


def _train_mode_forward(check: Check) -> None:
    if not check.begun:  # the model has its training weights now, so the change applies to them
        return
    with check.applied() as model:
        model.train()(torch.ones(BATCH, WIDTH, dtype=check.net.a.weight.dtype))


def _update_bn(check: Check) -> None:
    if not check.begun:
        return
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
    if not check.begun:
        return
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
                if buffer is not None and buffer.layout == torch.strided and buffer.dtype in _PLAIN:
                    setattr(module, name, buffer + 1)


def _change_buffers(check: Check) -> None:
    if not check.begun:
        return
    with check.applied():
        shared = {t.untyped_storage().data_ptr() for p in check.net.parameters() for t in inner(p)}
        for buffer in check.net.buffers():
            plain = buffer.layout == torch.strided and buffer.dtype in _PLAIN and 0 not in buffer.stride()
            if plain and buffer.untyped_storage().data_ptr() not in shared:
                buffer.add_(1)


def _change_parameter(check: Check) -> None:
    if not check.begun or not check.reference.averages("b.weight"):
        return
    assert check.run.attached is not None
    weight, saved = check.net.b.weight, copy.deepcopy(check.run.attached.state_dict())
    try:
        with check.applied(), torch.no_grad():
            weight.mul_(2)
    except PolyakError as error:
        if "b.weight" not in str(error) and "a.weight" not in str(error):
            raise WrongError(f"a parameter changed in applied() must be named (got {error})") from error
    else:
        raise WrongError("a parameter changed in applied() must be refused")
    check.same_weights("after a parameter changed in applied()")
    check.run.attached.load_state_dict(saved)  # as the error says: the change applies to the average


def share_memory(module: nn.Module) -> None:
    """Move a model to shared memory, if torch can."""
    if all(is_dense(tensor) for tensor in module.state_dict().values()):
        module.share_memory()


def _move_inside(check: Check) -> None:
    if check.begun:
        with check.applied() as model:
            share_memory(model)


def _clone_inside(check: Check) -> None:
    if check.begun and not SHARES & {*check.case.traits, *check.case.blocks}:
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
            raise WrongError("an optimizer step in applied() must be refused")
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
            raise WrongError("applied() in applied() must be refused")


def _interrupted(check: Check) -> None:
    """Raise an interrupt at a line of polyak, while it swaps the average in or restores the weights."""
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


SWAPS: dict[str, Callable[[Check], None]] = {
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
}

"""Events between steps: uses of the average, which must change nothing, and changes of the model."""

import copy
import io
import pickle
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from polyak import PolyakError

from .check import Check, WrongError, can, differences, held
from .loops import Loop
from .swaps import SWAPS, share_memory


def _can_resume(check: Check) -> bool:
    def resume() -> None:
        torch.save(check.twin.net.state_dict(), file := io.BytesIO())
        file.seek(0)
        state = torch.load(file, weights_only=True)
        Loop(check.case, averaged=False).net.load_state_dict(state, strict=False)

    return not check.teacher and can(resume)


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
            raise WrongError(f"ema_model, if it cannot be had, must name applied() (got {error})") from error
        return
    if (module is not None) != check.begun:
        raise WrongError("ema_model must exist from the beginning of averaging")
    if not check.begun:
        return
    check.demand(check.reference.wrong(module, check.online(), rounded=False), "ema_model")
    # The module shares the average's memory: a forward pass that writes to a buffer writes to the average.
    counts = any(name.endswith("calls") for name, _ in module.named_buffers())
    if check.net.a.weight.dtype == module.a.weight.dtype and not counts:
        try:
            got = check.forward(module)
        except PolyakError:
            return  # of mixed dtypes
        with check.applied():
            want = check.forward(check.net)
        if not torch.allclose(got.float(), want.float(), rtol=1e-2, atol=1e-2, equal_nan=True):
            raise WrongError(f"ema_model computes something else: off by {float((got - want).abs().max()):.3g}")
    then(module)


def _copy(take: Callable[[Any], object]) -> Callable[[Check], None]:
    def event(check: Check) -> None:
        if can(lambda: take((check.twin.model, check.twin.optimizers))):
            with suppress(PolyakError):
                take(check.run.attached)

    return event


def _copy_model(check: Check) -> None:
    # After an evaluation, modules of the old spectral_norm have weights with a graph, which torch does not copy.
    if "spectral_norm" not in check.case.blocks and can(lambda: copy.deepcopy(check.twin.net)):
        other = copy.deepcopy(check.net)
        check.demand(differences(held(other), held(check.twin.net), check.teacher), "a copy of the model")


def _get_ema_model(check: Check) -> None:
    if check.begun:
        assert check.run.ema is not None
        check.run.ema.get_ema_model(check.net)
        check.demand(check.reference.wrong(check.net, check.online(), rounded=True), "after get_ema_model()")
        check.run.ema.get_training_model(check.net)
        check.same_weights("after get_training_model()")


def _metrics(check: Check) -> None:
    assert check.run.ema is not None
    if any(not value >= 0 for value in check.run.ema.metrics().values()):
        raise WrongError(f"metrics must be numbers (got {check.run.ema.metrics()})")


def _teacher(check: Check) -> None:
    assert check.run.ema is not None
    if check.begun and not check.teacher:
        with suppress(PolyakError):
            check.net.teacher = check.run.ema.ema_model
            check.teacher = True


OBSERVING: dict[str, Callable[[Check], None]] = {
    **SWAPS,
    "save": _save,
    "resume": _resume,
    "applied: save, resume": _resume_inside,
    "ema_model": _ema_model,
    "ema_model: half": lambda check: _ema_model(check, lambda module: module.half()),
    "ema_model: share_memory": lambda check: _ema_model(check, share_memory),
    "ema_model: train": lambda check: _ema_model(check, lambda module: module.train()),
    "deepcopy": _copy(copy.deepcopy),
    "pickle": _copy(pickle.dumps),
    "copy the model": _copy_model,
    "get_ema_model": _get_ema_model,
    "metrics": _metrics,
    "teacher": _teacher,
}

"""Run one case three times: with an average, without one, and with an average that is read only at the end."""

import re
import traceback
import warnings
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from polyak import PolyakError

from .cases import Case
from .check import Check, InvalidError
from .events import OBSERVING
from .hosts import HOSTS, Watch
from .loops import STRUCTURAL, Loop, StepError
from .models import EXOTIC
from .reference import Reference


@dataclass(frozen=True)
class Outcome:
    """How a case ended: ``kind`` is one of right, refused, invalid (it cannot be trained without polyak) and wrong."""

    kind: str
    said: str = ""
    trace: str = ""

    @property
    def cause(self) -> str:
        """The error without names and numbers, which is about the same in all cases with one cause."""
        said = re.sub(r"'[^']*'|\b[a-z_]+(\.\w+)+\b|\(.*?\)", "…", self.said.partition("\n")[0])
        return re.sub(r"-?\d+(\.\d+)?(e[-+]?\d+)?|\bnan\b|-?\binf\b", "#", said)[:150]


def judge(case: Case) -> Outcome:
    """Run a case.

    Args:
        case: To run.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if case.loop in HOSTS:
            return _judge_host(case)
        try:
            check = Check(case, _reference(case))
            check.begin()
            _run(check)
            if any(name in OBSERVING for _, name in case.events) and not check.teacher:
                check.demand(_differing(check.average, _unobserved(case)), "the average, if read only at the end")
        except (PolyakError, NotImplementedError) as error:
            exotic = EXOTIC & {*case.blocks, *case.traits}
            if check.teacher or (exotic and not check.settled):
                return Outcome("refused", f"{type(error).__name__}: {error}")
            return _wrong(error)
        except InvalidError:
            return Outcome("invalid")
        except Exception as error:
            return _wrong(error)
    return Outcome("right")


def _judge_host(case: Case) -> Outcome:
    if "counter" in case.blocks:  # it also counts evaluations, and polyak restores the count
        return Outcome("invalid")
    fit = HOSTS[case.loop]
    reference = _reference(case)
    try:
        fit(case, twin := Watch(case, reference))
    except Exception:
        return Outcome("invalid")
    try:
        fit(case, watch := Watch(case, reference, twin))
        watch.ends()
    except (PolyakError, NotImplementedError) as error:
        if EXOTIC & {*case.blocks, *case.traits}:
            return Outcome("refused", f"{type(error).__name__}: {error}")
        return _wrong(error)
    except Exception as error:
        return _wrong(error)
    return Outcome("right")


def _wrong(error: BaseException) -> Outcome:
    return Outcome("wrong", f"{type(error).__name__}: {error}", traceback.format_exc())


def _reference(case: Case) -> Reference:
    options = case.ema
    return Reference(
        half_life=float(options["half_life"].removesuffix("ba")),
        smoothing=options["smoothing"],
        interval=int(options["update_interval"].removesuffix("ba")),
        start=max(1, int(options["ema_start"].removesuffix("ba"))),
        dtype=getattr(torch, options["dtype"]) if options["dtype"] else None,
    )


def _run(check: Check) -> None:
    for i in range(check.case.steps + 1):
        if i:
            check.step(i)
            check.same_weights("after a step")
            check.settled = check.begun
        for name in (name for at, name in check.case.events if at == i):
            if name in OBSERVING:
                OBSERVING[name](check)
            else:
                check.change(name)
            check.same_weights("after an event")
            check.right_average("after an event")
    check.right_average("at the end")


def _unobserved(case: Case) -> dict[str, Tensor]:
    """Return the average of a run without events."""
    loop = Loop(case, averaged=True)
    for i in range(case.steps + 1):
        if i:
            with suppress(StepError):
                loop.step(i)
        for at, name in case.events:
            if at == i and name in STRUCTURAL:
                STRUCTURAL[name](loop)
    assert loop.attached is not None
    return loop.attached.state_dict()["algorithms"][0][1].get("ema_model", {})


def _differing(got: dict[str, Tensor], want: dict[str, Tensor]) -> list[str]:
    if got.keys() != want.keys():
        return [f"has other names: {sorted(got.keys() ^ want.keys())}"]
    return [f"{name} differs" for name, tensor in want.items() if not _same_bits(got[name], tensor)]


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)

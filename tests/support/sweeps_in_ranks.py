"""What the processes of ``ranks.Ranks`` do with ``sweep`` and ``recommend``."""

import contextlib
import io
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import records
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import polyak
from polyak.cli import main
from polyak.profiles import Cooldown, HalfLife
from polyak.record import Edge, Record, Writer
from polyak.sharding import reshard
from polyak.storage.lines import Lines
from polyak.sweeping import SweepResult, sweep

HALF_LIVES = [HalfLife(f"{n}ba", unbiased=True) for n in (4, 8, 16, 32, 64)]


class Losses:
    """An evaluation that counts its calls and can fail at one of the averages, by the norm of its weights.

    Args:
        fails: What to raise.
        norm: At which weights.
    """

    def __init__(self, fails: BaseException | None = None, norm: float | None = None) -> None:
        self.norms: list[float] = []
        self._fails, self._norm = fails, norm

    def __call__(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        norm = float(state["0.weight"].norm())
        if self._fails is not None and norm == self._norm:
            raise self._fails
        self.norms.append(norm)
        model = records.build().eval()
        model.load_state_dict(state)
        with torch.no_grad():
            batches = records.data(seed=1, batches=4)
            return {"loss": torch.cat([(model(x) - y).square().flatten() for x, y in batches])}


class OddError(Exception):
    """An error that cannot be pickled."""

    def __init__(self, what: str, *, where: str) -> None:
        super().__init__(f"{what} in {where}")


def plain(results: SweepResult) -> list[tuple[Any, ...]]:
    """Return all that results say, but for how long they took."""
    return [
        (one.name, one.profile, dict(one.metrics), one.error, one.distance, one.at, dict(one.examples))
        for one in results
    ]


def run(act: Callable[[], Any]) -> Any:
    """Return what ``act`` returns, or its error in words."""
    try:
        return act()
    except BaseException as error:
        return f"{type(error).__name__}: {error} {' '.join(getattr(error, '__notes__', ()))}".strip()


def sweeps(folder: str, results: str | None = None, losses: tuple[Any, ...] = (), **options: Any) -> Any:
    """Sweep on all ranks; return what this one got, and the norms of the weights that it evaluated."""
    evaluate = Losses(*losses)
    found = run(lambda: plain(sweep(folder, evaluate, **{"parallel": True, "refine": 2} | options, results=results)))
    return found, evaluate.norms


def sweeps_by_own_profiles(folder: str, *, parallel: bool = True) -> Any:
    """Sweep under a profile with a function in it, and under one that is given twice."""
    profiles = [HALF_LIVES[0], HALF_LIVES[1], Cooldown("64ba", shape=lambda x: (1 - x) ** 1.5), HALF_LIVES[0]]
    results, norms = sweeps(folder, profiles=profiles, parallel=parallel, refine=0)
    return results if isinstance(results, str) else [one[:1] + one[2:] for one in results], norms


def recommends(folder: str) -> tuple[Any, ...]:
    """Return a recommendation as text, its error, and how many averages this rank evaluated."""
    evaluate = Losses()
    found = polyak.recommend(folder, evaluate, parallel=True)
    return str(found), found.error, len(evaluate.norms)


def sweeps_with_other_arguments(folder: str) -> str:
    return sweeps(folder, refine=dist.get_rank())[0]


def sweeps_on_rank_0(folder: str) -> Any:
    """Sweep on one rank as in one process, while the other waits."""
    found = sweeps(folder, parallel=False) if dist.get_rank() == 0 else None
    dist.barrier()
    return found


def has_a_full_disk(folder: str, results: str) -> str:
    """Let rank 0 fail to keep the second result."""
    real, count = Lines.add, itertools.count()

    def add(lines: Lines, line: Any) -> None:
        if next(count) == 1:
            raise OSError(28, "No space left on device")
        real(lines, line)

    Lines.add = add
    try:
        return sweeps(folder, results)[0]
    finally:
        Lines.add = real


def raises_outside(folder: str) -> str:
    """Let the progress of rank 0, which is no evaluation, fail after a few of them."""

    def progress(done: int, *_: object) -> None:
        if done == 4:
            raise KeyError("progress")

    return sweeps(folder, progress=progress)[0]


def model_of(kind: str) -> nn.Module:
    model = records.build().eval()
    if kind == "full":
        return model
    if kind == "ddp":
        return DistributedDataParallel(model)
    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def load(model: nn.Module, state: dict[str, Tensor]) -> None:
    model = model.module if isinstance(model, DistributedDataParallel) else model
    reshard(model)  # after a forward pass the outermost module holds full tensors, into which torch cannot load
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))


def sweeps_a_model(kind: str, folder: str) -> Any:
    """Sweep with an evaluation that runs a model of all ranks."""
    model, batches, calls = model_of(kind), records.data(seed=1, batches=4), []

    def loss(state: dict[str, Tensor]) -> float:
        load(model, state)
        calls.append(1)
        with torch.no_grad():
            return float(torch.stack([(model(x) - y).square().mean() for x, y in batches]).mean())

    results = run(lambda: plain(sweep(folder, loss, HALF_LIVES, refine=0, parallel=True)))
    return results, len(calls)


def communicates_unseen(folder: str, results: str, parallel: Any = True) -> Any:
    """Sweep with a loss that is reduced over the ranks, of which nothing is seen in the function."""

    def loss(state: dict[str, Tensor]) -> float:
        total = state["0.weight"].norm() * (1 + dist.get_rank())
        dist.all_reduce(total)
        return float(total)

    return run(lambda: plain(sweep(folder, loss, HALF_LIVES, refine=0, results=results, parallel=parallel)))


def has_its_own_value(folder: str) -> Any:
    """Sweep together with a loss of this rank's own."""
    return run(lambda: sweep(folder, lambda state: 1.0 + dist.get_rank(), HALF_LIVES, parallel="together"))


def sweeps_a_live_record(folder: str) -> Any:
    """Sweep a record that one rank opened before the run merged and wrote more."""
    if dist.get_rank() == 1:
        record = Record(folder)
    dist.barrier()
    if dist.get_rank() == 0:
        infos, last = Record(folder).tensors, Record(folder).segments[-1].end
        state = records.build().state_dict()
        with Writer(Path(folder), infos, per_level=4) as writer:
            start = last
            for _ in range(8):
                end = Edge(start.updates + 2, start.timestamp.to_next_batch(steps=2))
                writer.append({name: state[name] for name in infos}, start, end)
                start = end
        record = Record(folder)
    dist.barrier()
    return sweeps(record)[0]


def command(folder: str, *argv: str) -> tuple[int, str, str]:
    """Run a command of polyak in a folder on this rank; return its exit code, and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    os.environ["RANK"] = str(dist.get_rank())
    try:
        with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            return main(argv), out.getvalue(), err.getvalue()
    finally:
        del os.environ["RANK"]

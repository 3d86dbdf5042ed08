"""What the processes of ``ranks.Ranks`` do in the tests of the trainer: the runs of ``loops``, on several ranks."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import loops
import torch
import torch.distributed as dist
from sharded import Reference, full, unequal, weights
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from polyak import EMA, Callback, CheckpointSaver, Event, Trainer
from polyak.trainer import batches, checkpoint, rng
from polyak.trainer.parallel import blocks

KINDS = ("ddp", "ddp, divided average", "fsdp2")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def build(kind: str | None, folder: Path, *, noisy: bool = False, model_seed: int = 0, **more: Any) -> Trainer:
    """Return a trainer with everything on. Each rank's model begins with other weights, of which the first's count."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if kind == "ddp, divided average" else None
    algorithm = EMA(more.pop("half_life", "4ba"), mesh=mesh)
    model = (loops.noisy_perceptron if noisy else loops.perceptron)(model_seed + rank())
    if noisy:
        more["data"] = loops.Noisy()
    if kind is not None:
        more["parallelism"] = "fsdp2" if kind == "fsdp2" else "ddp"
    return loops.train(folder, ema=algorithm, model=model, shuffle=True, **more)


def averages(trainer: Trainer) -> dict[str, Tensor]:
    """Return the whole averages, of which the first rank's buffers count."""
    algorithm = trainer.state.algorithms[0]
    algorithm._agree()
    return {name: full(tensor) for name, tensor in algorithm._shadow.averaged_tensors().items()}


def held(trainer: Trainer) -> dict[str, Tensor]:
    """Return the whole weights, of which the first rank's buffers count."""
    trainer._group.share_buffers(trainer.state.model)
    return weights(trainer.state.model) if dist.is_initialized() else loops.bits(trainer.state.model)


def results(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """Return all that a run leaves, the log on the first rank only."""
    log = folder / "metrics.jsonl"
    return {
        "log": [json.loads(line) for line in log.read_text().splitlines()] if rank() == 0 else [],
        "weights": held(trainer),
        "averages": averages(trainer),
        "clock": trainer.state.timestamp.state_dict(),
        "loss": None if trainer.state.loss is None else float(trainer.state.loss),
        "metrics": trainer.eval(),
    }


def moments(trainer: Trainer) -> list[Tensor]:
    """Return the whole state of the optimizer."""
    optimizer = trainer.state.optimizers[0]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [full(optimizer.state[p][name]) for p in parameters for name in ("step", "exp_avg", "exp_avg_sq")]


# Jobs


def trains(kind: str | None, folder: Path, **more: Any) -> dict[str, Any]:
    """Train to the end."""
    losses = loops.Recorder() if kind != "fsdp2" else Losses()
    trainer = build(kind, folder, callbacks=(losses,), **more)
    trainer.fit()
    return results(trainer, folder) | {"losses": losses.losses}


class Losses(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def batch_end(self, state: Any, logger: Any) -> None:
        self.losses.append(float(state.loss))


def resumes(kind: str, folder: Path, **more: Any) -> dict[str, list[str]]:
    """Train once without a stop, again from each of its checkpoints, and return what differs."""

    def random(trainer: Trainer) -> Any:
        return [rng.get_state(), trainer._data.get_state()]

    whole = build(kind, folder / "whole", **more)
    whole.fit()
    want = results(whole, folder / "whole") | {"random": random(whole)}
    found = {}
    for name in (loops.BEFORE_EPOCH_END, loops.EPOCH_END, loops.MID_EPOCH):
        saved = folder / "whole" / "checkpoints" / (name if kind == "ddp" else name.removesuffix(".pt"))
        if rank() == 0:
            (folder / name).mkdir()
            shutil.copy(folder / "whole" / "metrics.jsonl", folder / name)
        dist.barrier()
        loops.disturb()
        resumed = build(kind, folder / name, load_path=saved, seed=99, model_seed=5, **more)
        resumed.fit()
        got = results(resumed, folder / name) | {"random": random(resumed)}
        if different := loops.differences(want, got):
            found[name] = different
    return found


def saves(kind: str | None, path: Path, folder: Path) -> dict[str, Any]:
    """Train, save inside an epoch, train on; return what was saved, and what came of it."""
    trainer = build(kind, folder, max_duration="9ba", saves=None)
    trainer.fit()
    trainer.save_checkpoint(path)
    saved = {"weights": held(trainer), "averages": averages(trainer), "moments": moments(trainer)}
    longer = build(kind, folder, load_path=path, saves=None)
    longer.fit()
    return {"saved": saved, "end": held(longer)}


def loads(kind: str | None, path: Path, folder: Path) -> dict[str, Any]:
    """Return what comes out of a checkpoint, what of training on, and what was said of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = build(kind, folder, load_path=path, saves=None, model_seed=7)
    loaded = {"weights": held(trainer), "averages": averages(trainer), "moments": moments(trainer)}
    trainer.fit()
    said = [str(one.message) for one in caught if "ranks" in str(one.message)]
    return {"loaded": loaded, "end": held(trainer), "said": said}


def follows_itself(folder: Path) -> list[str]:
    """Return where the average of a run under FSDP2 is not that of its whole weights."""

    class Follow(Callback):
        reference = None

        def batch_end(self, state: Any, logger: Any) -> None:
            if self.reference is None:
                self.reference = Reference(state.model, None)
            else:
                self.reference.update_(state.model, 1 - 0.5**0.25)

    follow = Follow()
    trainer = build("fsdp2", folder, callbacks=(follow,))
    trainer.fit()
    assert follow.reference is not None
    return unequal(averages(trainer), follow.reference.averages)

"""Checkpoints of a small model in the formats of several libraries, by the shape of what they write."""

import argparse
import collections
import contextlib
import json
import os
import sys
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor


def state(number: float = 1.0) -> dict[str, Tensor]:
    """Return a state dict with all that is difficult: dtypes, shapes, layouts, integers."""
    torch.manual_seed(0)
    return {
        "net.conv.weight": torch.randn(4, 3, 2, 2) * number,
        "net.half.weight": (torch.randn(5, 7) * number).bfloat16(),
        "net.transposed.weight": (torch.randn(6, 3) * number).t(),
        "net.scale": torch.tensor(0.5 * number),
        "net.empty": torch.empty(0, 3),
        "net.norm.running_mean": torch.randn(3) * number,
        "net.norm.running_var": torch.randn(3).abs() * number,
        "net.norm.num_batches_tracked": torch.tensor(int(100 * number)),
        "net.mask": torch.tensor([True, False]),
    }


class AttributeDict(dict):  # as Lightning keeps hyperparameters
    pass


class Config(list):
    pass


def beside(number: float) -> dict[str, Any]:
    """Return what checkpoints have next to the weights, in types of Python's and other libraries'."""
    moments = {0: {"exp_avg": torch.ones(3), "step": torch.tensor(3.0)}}
    return {
        "optimizer": {"state": moments, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "lr_scheduler": {"last_lr": [np.float64(0.1)]},
        "rng_state": torch.get_rng_state(),
        "args": argparse.Namespace(lr=0.1),
        "hyper_parameters": AttributeDict(layers=Config([1, 2])),
        "history": collections.defaultdict(list, loss=collections.deque([np.float32(0.5)], maxlen=3)),
        "counts": collections.Counter("ab"),
        "best": np.float64(0.25),
        "global_step": int(100 * number),
        "epoch": int(number),
    }


def _transformers(path: Path, number: float) -> None:
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "test"}')
    (path / "trainer_state.json").write_text(json.dumps({"global_step": int(100 * number), "epoch": number}))
    torch.save({"state": {}}, path / "optimizer.pt")


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _one(path: Path, number: float) -> None:
    _transformers(path, number)
    save_file(_contiguous(state(number)), path / "model.safetensors", {"format": "pt"})


def _sharded(path: Path, number: float) -> None:
    tensors = _contiguous(state(number))
    _transformers(path, number)
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    layout = {name: files[i % 2] for i, name in enumerate(tensors)}
    for file in files:
        save_file({name: one for name, one in tensors.items() if layout[name] == file}, path / file, {"format": "pt"})
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": layout}))


def _bin(path: Path, number: float) -> None:
    _transformers(path, number)
    torch.save(state(number), path / "pytorch_model.bin")


def _save_distributed(path: Path, content: dict[str, Any]) -> None:
    with warnings.catch_warnings(action="ignore"):  # that there is one process
        dcp.save(content, checkpoint_id=path, no_dist=True)


def _distributed(path: Path, number: float) -> None:
    content = {"model": state(number), "optimizer": {"state": {"w": {"exp_avg": torch.ones(3)}}}}
    _save_distributed(path, {**content, "train_state": {"step": int(100 * number)}})


def _torchtitan(path: Path, number: float) -> None:
    _save_distributed(path, {**state(number), "train_state": {"step": torch.tensor(int(100 * number))}})


def _megatron(path: Path, number: float) -> None:
    names = {f"optimizer.state.exp_avg.{name}": tensor * 0 for name, tensor in state(number).items()}
    _save_distributed(path, {**state(number), **names})


def _accelerate_fsdp(path: Path, number: float) -> None:
    _transformers(path, number)
    _save_distributed(path / "pytorch_model_fsdp_0", {"model": state(number)})
    _save_distributed(path / "optimizer_0", {"optimizer": {"state": torch.ones(3)}})


def _lightning_sharded(path: Path, number: float) -> None:
    _save_distributed(path, {"state_dict": state(number)})
    torch.save({"global_step": int(100 * number), "epoch": int(number)}, path / "meta.pt")


def _torch(content: Callable[[float], Any], **options: Any) -> Callable[[Path, float], None]:
    return lambda path, number: torch.save(content(number), path, **options)


def _composer(number: float) -> dict[str, Any]:
    clock = {"Timestamp": {"epoch": int(number), "batch": int(100 * number)}}
    return {
        "state": {"model": state(number), "optimizers": {"Adam": {}}, "timestamp": clock},
        "rng": [{"torch": torch.ones(9)}],
    }


def _fairseq(number: float) -> dict[str, Any]:
    return {
        "args": argparse.Namespace(lr=0.1),
        "model": state(number),
        "optimizer_history": [{"num_updates": int(100 * number), "optimizer_name": "FairseqAdam"}],
        "last_optimizer_state": {"state": {0: {"exp_avg": torch.ones(3)}}},
        "extra_state": {"train_iterator": {"epoch": int(number), "iterations_in_epoch": 0}, "val_loss": 0.5},
    }


def _nemo(path: Path, number: float) -> None:
    config, weights = path.with_name("config"), path.with_name("weights")
    config.write_text("target: test\n")
    torch.save(state(number), weights)
    with tarfile.open(path, "w:") as archive:
        archive.add(config, "./model_config.yaml")
        archive.add(weights, "./model_weights.ckpt")
    config.unlink()
    weights.unlink()


def _megatron_ranks(path: Path, number: float) -> None:
    (path / "mp_rank_00").mkdir(parents=True)
    tensors = state(number)
    first = next(iter(tensors))
    nested = {
        "net": {"conv": {"weight": tensors.pop(first)}, **{n.removeprefix("net."): t for n, t in tensors.items()}}
    }
    content = {"iteration": int(100 * number), "args": argparse.Namespace(lr=0.1), "checkpoint_version": 3.0}
    torch.save(
        {**content, "model": nested, "optimizer": {"state": torch.ones(3)}}, path / "mp_rank_00/model_optim_rng.pt"
    )


def _timm(number: float) -> dict[str, Any]:
    kept = {"epoch": int(number), "arch": "test", "version": 2, "args": argparse.Namespace(lr=0.1), "metric": 71.5}
    return {**kept, "state_dict": state(number), "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}}}


# The suffix of the file, and what writes it.
FORMATS: dict[str, tuple[str, Callable[[Path, float], None]]] = {
    "torch, state dict": (".pt", _torch(state)),
    "torch, ordered dict": (".pth", _torch(lambda number: collections.OrderedDict(state(number)))),
    "torch, before 1.6": (".pt", _torch(state, _use_new_zipfile_serialization=False)),
    "torch, {model, ...}": (".pt", _torch(lambda number: {"model": state(number), **beside(number)})),
    "torch, {model, ...} before 1.6": (
        ".tar",
        _torch(lambda number: {"model": state(number), **beside(number)}, _use_new_zipfile_serialization=False),
    ),
    "Lightning": (".ckpt", _torch(lambda number: {"state_dict": state(number), "loops": {}, **beside(number)})),
    "Composer": (".pt", _torch(_composer)),
    "fairseq": (".pt", _torch(_fairseq)),
    "NeMo, .nemo": (".nemo", _nemo),
    "Megatron, older format": ("", _megatron_ranks),
    "ESPnet, WeNet or icefall": (".pth", _torch(lambda number: {"model": state(number), **beside(number)})),
    "mmengine without EMAHook": (
        ".pth",
        _torch(lambda number: {"meta": {"iter": int(100 * number)}, "state_dict": state(number), "message_hub": {}}),
    ),
    "timm": (".pth.tar", _torch(_timm)),
    "safetensors": (".safetensors", lambda path, number: save_file(_contiguous(state(number)), path)),
    "Transformers or Accelerate, one file": ("", _one),
    "Transformers or Accelerate, several files": ("", _sharded),
    "Transformers or Accelerate, .bin": ("", _bin),
    "distributed": ("", _distributed),
    "distributed, torchtitan": ("", _torchtitan),
    "distributed, Megatron": ("", _megatron),
    "distributed, Accelerate or Transformers": ("", _accelerate_fsdp),
    "distributed, Lightning": ("", _lightning_sharded),
}


def write(name: str, folder: Path, number: float = 1.0) -> Path:
    """Write a checkpoint; return its path, which says when it was saved."""
    suffix, save = FORMATS[name]
    path = folder / f"step-{int(100 * number)}{suffix}"
    save(path, number)
    return path


def saves_model(kind: str, folder: str) -> dict[str, Tensor]:
    """Save a sharded model on each of several ranks; return its full weights."""
    import sharded
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    model = sharded.spread(kind)
    planner = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder, planner=planner)
    return sharded.weights(model)


def runs_in_small_units(folder: str, *line: str) -> int:
    """Run a command of polyak in a folder, with a unit for each tensor; on each of several ranks, if there is a group.

    Returns:
        The exit code.
    """
    import torch.distributed as dist

    import polyak.cli
    from polyak.checkpoints import as_dcp, as_safetensors

    ranks = {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())} if dist.is_initialized() else {}
    with (
        mock.patch.dict(os.environ, ranks),
        mock.patch.object(as_dcp, "_FILE_BYTES", 1),
        mock.patch.object(as_safetensors, "in_groups", lambda names, size_of: [[name] for name in names]),
        contextlib.chdir(folder),
    ):
        return polyak.cli.main(line)


if __name__ == "__main__":
    sys.exit(runs_in_small_units(*sys.argv[1:]))

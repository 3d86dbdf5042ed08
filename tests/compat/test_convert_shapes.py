"""``polyak convert`` on the checkpoints of training scripts, of models under DDP, and on folders."""

import json
import pickle
import warnings
from typing import Any

import ema_pytorch
import hostile
import pytest
import torch
import torch.distributed.checkpoint as dcp
from converting import assert_is, convert, net
from torch import nn
from torch.optim.swa_utils import AveragedModel

from polyak import EMA, CheckpointError, attach
from polyak.cli import main
from polyak.compat import load, read

pytestmark = pytest.mark.filterwarnings("ignore")  # other libraries' warnings while they write

RAW = {"net.conv.weight": torch.zeros(2, 2), "net.bn.running_mean": torch.zeros(2)}
AVERAGE = {name: tensor + 1 for name, tensor in RAW.items()}


def under(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    return {prefix + name: tensor for name, tensor in state.items()}


UNDOTTED = {f"model_ema.{name.replace('.', '')}": tensor for name, tensor in AVERAGE.items()}
SHAPES = {
    "model and ema": {"model": RAW, "ema": AVERAGE, "opt": {}, "args": hostile.Touch()},
    "model and ema under DDP": {"model": under("module.", RAW), "ema": under("module.", AVERAGE)},
    "model and model_ema": {"model": RAW, "model_ema": AVERAGE, "epoch": 1},
    "state_dict and ema_state_dict": {"state_dict": RAW, "ema_state_dict": AVERAGE},
    "a module in ema": {"model": RAW, "ema": {"module": AVERAGE, "updates": 3}},
    "teacher and student": {"student": under("module.", RAW), "teacher": under("module.", AVERAGE)},
    "teacher in model": {"model": {**under("student.", RAW), **under("teacher.", AVERAGE)}},
    "encoder_k in state_dict": {
        "state_dict": {**under("module.encoder_q.", RAW), **under("module.encoder_k.", AVERAGE)}
    },
    "target_encoder alone": {**under("online_encoder.", RAW), **under("target_encoder.", AVERAGE)},
    "params_ema": {"params": RAW, "params_ema": AVERAGE},
    "g_ema": {"g": RAW, "d": {}, "g_ema": AVERAGE},
    "mmengine": {"state_dict": AVERAGE, "ema_state_dict": {"steps": torch.tensor(1), **RAW}, "message_hub": {}},
    "mmcv": {"state_dict": {**RAW, **{f"ema_{n.replace('.', '_')}": t for n, t in AVERAGE.items()}}},
    "model_ema in state_dict": {
        "state_dict": {**under("model.", RAW), "model_ema.decay": torch.tensor(0.9), **UNDOTTED}
    },
    "StochasticWeightAveraging": {
        "state_dict": RAW, "callbacks": {"StochasticWeightAveraging": {"average_model_state": AVERAGE}}
    },
    "an optimizer's ema": {"state_dict": RAW, "optimizer_states": [{"opt": {}, "ema": tuple(AVERAGE.values())}]},
    "net_model and ema_model": {"net_model": RAW, "ema_model": AVERAGE},
    "net and ema": {"net": RAW, "ema": AVERAGE},
    "model and model_avg": {"model": RAW, "model_avg": AVERAGE},
    "model_state_dict and ema_model_state_dict": {"model_state_dict": RAW, "ema_model_state_dict": AVERAGE},
    "encoder and target_encoder": {"encoder": under("module.", RAW), "target_encoder": under("module.", AVERAGE)},
    "state_dicts": {"state_dicts": {"model": RAW, "ema_model": AVERAGE, "optimizer": {}}},
    "params in ema": {"model": RAW, "ema": {"params": AVERAGE, "decay": 0.9}},
    "ema in extra_state": {"model": RAW, "extra_state": {"ema": AVERAGE, "epoch": 1}},
    "a callback's ema_state_dict": {"state_dict": RAW, "callbacks": {"EMA{0.9}": {"ema_state_dict": AVERAGE}}},
    "momentum_encoder in state_dict": {
        "state_dict": {**under("module.base_encoder.", RAW), **under("module.momentum_encoder.", AVERAGE)}
    },
    "ema. in state_dict": {"state_dict": {**under("model.", RAW), **under("ema.", AVERAGE)}},
    "an AveragedModel in state_dict": {
        "state_dict": {**under("model.", RAW), "ema.n_averaged": torch.tensor(1), **under("ema.module.", AVERAGE)}
    },
    "an EMA of ema-pytorch in state_dict": {
        "state_dict": {**under("model.", RAW), **under("ema.online_model.", RAW), **under("ema.ema_model.", AVERAGE)}
    },
    "model. and ema. alone": {**under("model.", RAW), **under("ema.", AVERAGE)},
    "alone": AVERAGE,
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_the_average_is_found_where_scripts_keep_it(tmp_path, name):
    torch.save(SHAPES[name], tmp_path / "a.pt")
    assert_is(AVERAGE, convert(tmp_path / "a.pt"))


def test_what_is_not_averaged_is_taken_from_the_training_weights(tmp_path):
    averaged = {"model_ema.netconvweight": torch.ones(2, 2), "model_ema.decay": torch.tensor(0.9)}
    torch.save({"state_dict": {**under("model.", RAW), **averaged}}, tmp_path / "a.pt")
    found = read(tmp_path / "a.pt")
    assert found.tensors["net.conv.weight"].tolist() == [[1, 1], [1, 1]]
    assert found.tensors["net.bn.running_mean"].tolist() == [0, 0]
    assert any("1 others, not averaged" in note for note in found.notes)


def test_of_several_averages_one_must_be_chosen(tmp_path, capsys):
    content = {
        "model": RAW,
        "ema": AVERAGE,
        "model_ema": RAW,
        "deep": {"teacher.w": torch.ones(1), "w": torch.zeros(1)},
    }
    torch.save(content, tmp_path / "a.pt")
    assert main(["convert", str(tmp_path / "a.pt"), "-o", str(tmp_path / "out.safetensors")]) == 2
    said = capsys.readouterr().err
    assert "'ema', 'model_ema'" in said
    assert "--key" in said
    assert_is(AVERAGE, convert(tmp_path / "a.pt", "--key", "ema"))
    assert_is({"w": torch.ones(1)}, convert(tmp_path / "a.pt", "--key", "deep", "--prefix", "teacher."))
    for arguments, message in {
        ("--key", "none"): "there are model, ema",
        ("--key", "ema.x.y"): "must be in the file",
        ("--prefix", "x"): "none with x",
        ("--key", "ema", "--timm"): "leave one out",
    }.items():
        assert main(["convert", str(tmp_path / "a.pt"), "-o", str(tmp_path / "x.safetensors"), *arguments]) == 2
        assert message in capsys.readouterr().err


def test_an_average_in_the_order_of_an_optimizer_with_several_groups_needs_names(tmp_path):
    groups = {"param_groups": [{"params": [0]}, {"params": [1]}]}
    torch.save(
        {"state_dict": RAW, "optimizer_states": [{"opt": groups, "ema": (*AVERAGE.values(),)}]}, tmp_path / "a.pt"
    )
    with pytest.raises(CheckpointError, match="without names; give --names"):
        read(tmp_path / "a.pt")
    torch.save(RAW, tmp_path / "names.pt")
    (tmp_path / "names.json").write_text(json.dumps([*RAW]))
    assert_is(AVERAGE, convert(tmp_path / "a.pt", "--names", str(tmp_path / "names.json")))


class Distributed(nn.Module):
    """Its names are those of DDP."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        Distributed,
        lambda model: Distributed(Distributed(model)),
        lambda model: torch.compile(Distributed(model)),
        lambda model: Distributed(torch.compile(model)),
    ],
    ids=["DataParallel", "DDP", "DDP twice", "compiled DDP", "DDP of a compiled model"],
)
def test_names_of_a_model_under_ddp_are_those_of_the_model(tmp_path, wrap):
    averaged = AveragedModel(wrap(net()), use_buffers=True)
    torch.save(averaged.state_dict(), tmp_path / "a.pt")
    assert_is(net().state_dict(), convert(tmp_path / "a.pt"), net())
    ema = ema_pytorch.EMA(wrap(net()), update_after_step=0, update_every=1)
    ema.update()
    torch.save({"ema": ema.state_dict()}, tmp_path / "b.pt")
    assert_is(net().state_dict(), convert(tmp_path / "b.pt"), net())


def test_a_folder_of_diffusers_may_hold_files_of_torch_save(tmp_path, capsys):
    folder = tmp_path / "unet_ema"
    folder.mkdir()
    config = {"_class_name": "UNet2DModel", "decay": 0.99, "optimization_step": 3}
    (folder / "config.json").write_text(json.dumps(config))
    for number in (1, 2):
        torch.save({f"w{number}": torch.ones(number)}, folder / f"diffusion_pytorch_model-0000{number}-of-00002.bin")
    torch.save({"w1": torch.zeros(1)}, folder / "optimizer.bin")
    assert_is({"w1": torch.ones(1), "w2": torch.ones(2)}, convert(folder))
    torch.save({"w1": torch.zeros(1)}, folder / "diffusion_pytorch_model.fp16.bin")
    with pytest.raises(CheckpointError, match="w1 is in several"):
        read(folder)
    (folder / "config.json").write_text('{"a":' * 100_000)
    with pytest.raises(CheckpointError, match="is neither"):
        read(folder)


def train(model: nn.Module, ema: EMA) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attached = attach(ema, model, optimizer)
    for _ in range(3):
        model(torch.randn(2, 4)).sum().backward()
        optimizer.step()
    return attached


@pytest.fixture
def distributed(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_folder_of_torchs_distributed_checkpoint(tmp_path, distributed):
    model, ema = nn.Linear(4, 2), EMA("3ba")
    attached = train(model, ema)
    others = {"model": model, "several": [torch.ones(2), {"x": 3}], "args": hostile.Touch}
    dcp.save({"ema": attached, **others}, checkpoint_id=tmp_path / "saved")
    want = {name: tensor.detach() for name, tensor in ema.ema_model.named_parameters()}
    assert_is(want, convert(tmp_path / "saved"))
    assert read(tmp_path / "saved", key="model").tensors.keys() == {"weight", "bias"}
    assert not (tmp_path / "ran").exists()
    (tmp_path / "saved" / "__0_0.distcp").write_bytes((tmp_path / "saved" / "__0_0.distcp").read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        read(tmp_path / "saved")


def test_a_sharded_checkpoint_of_the_trainer(tmp_path, distributed):
    dcp.save({"model.w": torch.ones(3), "model.v": torch.zeros(2)}, checkpoint_id=tmp_path / "ep1")
    model = {name: {"polyak_sharded": f"model.{name}", "shape": (1,), "dtype": torch.float32} for name in ("w", "v")}
    rest = {"polyak_checkpoint": 2, "model_holds": "averaged weights of EMA", "model": model, "algorithms": []}
    torch.save(rest, tmp_path / "ep1" / "rest.pt")
    assert_is({"w": torch.ones(3), "v": torch.zeros(2)}, convert(tmp_path / "ep1"))
    model["x"] = {"polyak_sharded": "model.x"}
    torch.save(rest, tmp_path / "ep1" / "rest.pt")
    with pytest.raises(CheckpointError, match=r"model\.x is not there"):
        read(tmp_path / "ep1")


class _Index:
    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)


def shards(tmp_path, monkeypatch, boxes: list[tuple[int, int]], size: int, file: str = "x.distcp", **more: Any):
    """Write a folder with one tensor in parts, each from a begin to an end, as torch's dataclasses say it."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )  # fmt: skip

    data, stored, chunks = b"", {}, []
    for begin, end in boxes:
        part = hostile.saved(torch.arange(float(begin), float(end)))
        stored[MetadataIndex("w", [begin])] = _StorageInfo(file, len(data), len(part), **more)
        chunks.append(ChunkStorageMetadata(torch.Size([begin]), torch.Size([end - begin])))
        data += part
    (tmp_path / "x.distcp").write_bytes(data)
    item = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size([size]), chunks)
    metadata = Metadata({"w": item}, {"w": ("w",)}, stored)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    return tmp_path


def test_shards_of_a_tensor_are_put_together(tmp_path, monkeypatch):
    folder = shards(tmp_path, monkeypatch, [(4, 7), (0, 4), (7, 9)], 9)
    assert read(folder).tensors["w"].tolist() == [*range(9)]


@pytest.mark.parametrize(
    ("boxes", "size", "more", "message"),
    [
        ([(0, 4), (3, 7)], 8, {}, "make up the tensor"),
        ([(0, 4)], 1 << 40, {}, "make up the tensor"),
        ([(0, 4), (6, 8)], 8, {}, "make up the tensor"),
        ([(0, 4), (8, 12)], 8, {}, "make up the tensor"),
        ([(0, 4)], 4, {"file": "../x.distcp"}, "in the folder"),
        ([(0, 4)], 4, {"file": "/etc/passwd"}, "in the folder"),
        ([(0, 4)], 4, {"transform_descriptors": ["zstd"]}, "compressed"),
    ],
    ids=["overlap", "size", "gap", "outside", "parent", "elsewhere", "compressed"],
)
def test_shards_that_do_not_make_up_a_tensor_are_refused(tmp_path, monkeypatch, boxes, size, more, message):
    with pytest.raises(CheckpointError, match=message):
        read(shards(tmp_path, monkeypatch, boxes, size, **more))


def test_the_metadata_of_a_folder_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / ".metadata").write_bytes(pickle.dumps(hostile.Touch()))
    assert main(["convert", "saved", "-o", "out.safetensors"]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]


class EasyDict(dict):
    pass


def test_a_lightning_checkpoint_of_polyak_with_any_hyperparameters(tmp_path):
    import lightning.pytorch as lightning

    from polyak.hosts.lightning import Averaging

    class Module(lightning.LightningModule):
        def __init__(self, config: Any, options: Any) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = nn.Linear(4, 1)

        def training_step(self, batch: Any) -> torch.Tensor:
            return self.net(batch).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    ema = EMA("3ba")
    trainer = lightning.Trainer(
        max_epochs=1, callbacks=[Averaging(ema)], accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(Module(EasyDict(lr=0.1), {"of": _Index(x=1)}), torch.utils.data.DataLoader(torch.randn(16, 4)))
        trainer.save_checkpoint(tmp_path / "own.ckpt")
    assert_is({f"net.{n}": p.detach() for n, p in ema.ema_model.net.named_parameters()}, convert(tmp_path / "own.ckpt"))
    assert load(tmp_path / "own.ckpt")["epoch"] == 1


def test_the_training_weights_in_the_state_of_an_ema_class_are_not_taken_for_its_average(tmp_path, capsys) -> None:
    """As Imagen's, with a state of ema-pytorch for each of its networks."""
    state = {**under("0.online_model.", RAW), **under("0.ema_model.", AVERAGE), "0.step": torch.tensor(1)}
    torch.save({"model": RAW, "ema": state}, tmp_path / "a.pt")
    assert main(["convert", str(tmp_path / "a.pt"), "-o", str(tmp_path / "a.safetensors")]) == 2
    assert "say which by --key" in capsys.readouterr().err
    assert_is(AVERAGE, convert(tmp_path / "a.pt", "--key", "ema", "--prefix", "0.ema_model."))

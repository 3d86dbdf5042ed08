"""Checkpoints that the real libraries wrote are averaged, and load again in the library that wrote them."""

import copy
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from polyak.checkpoints import open_checkpoint
from polyak.cli import main

pytestmark = pytest.mark.slow  # it imports the libraries


def move(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Change all parameters; return a copy of them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return {name: one.detach().clone() for name, one in model.named_parameters()}


def mean(states: list[dict[str, torch.Tensor]], name: str) -> torch.Tensor:
    total = sum(state[name].double() for state in states) / len(states)
    return total.to(states[-1][name].dtype)


def assert_is_mean(model: nn.Module, states: list[dict[str, torch.Tensor]]) -> None:
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, mean(states, name)), name


def averaged(*arguments: object) -> None:
    assert main(["average", *map(str, arguments)]) == 0


@pytest.mark.parametrize("most_bytes", ["1GB", "40KB"], ids=["one file", "several files"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transformers_folders_become_a_folder_for_from_pretrained(tmp_path, most_bytes, dtype) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=97, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    model, states = GPT2LMHeadModel(config).to(dtype), []
    for step in (9, 10, 11):
        states.append(move(model, step))
        model.save_pretrained(tmp_path / f"checkpoint-{step}", max_shard_size=most_bytes)
    averaged(tmp_path / "checkpoint-*", "-o", tmp_path / "averaged")
    several = most_bytes == "40KB"
    assert (tmp_path / "averaged/model.safetensors.index.json").exists() == several
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "averaged", dtype=dtype)
    assert_is_mean(again, states)  # its output and input embeddings are tied
    tokens = torch.arange(10)[None]
    assert again(tokens, labels=tokens).loss.isfinite()


def test_diffusers_folders_become_a_folder_for_from_pretrained(tmp_path) -> None:
    from diffusers import UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    model = UNet2DModel(sample_size=8, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, **blocks)
    states = []
    for step in (1, 2):
        states.append(move(model, step))
        model.save_pretrained(tmp_path / f"checkpoint-{step}")
    averaged(tmp_path / "checkpoint-*", "-o", tmp_path / "averaged")
    assert_is_mean(UNet2DModel.from_pretrained(tmp_path / "averaged"), states)


def test_peft_adapters_become_an_adapter(tmp_path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4))

    model, states = get_peft_model(base(), LoraConfig(target_modules=["0"], r=2)), []
    for step in (1, 2):
        move(model, step)
        states.append({name: one.detach().clone() for name, one in model.named_parameters() if "lora" in name})
        model.save_pretrained(tmp_path / f"checkpoint-{step}")
    averaged(tmp_path / "checkpoint-*", "-o", tmp_path / "averaged")
    again = dict(PeftModel.from_pretrained(base(), tmp_path / "averaged").named_parameters())
    assert states[0]
    assert all(torch.equal(again[name], mean(states, name)) for name in states[0])


def test_checkpoints_of_accelerate_are_averaged_and_loaded_again(tmp_path) -> None:
    from accelerate import Accelerator

    accelerator, states = Accelerator(cpu=True), []
    model = accelerator.prepare(nn.Linear(3, 2))
    accelerator.prepare(torch.optim.Adam(model.parameters()))
    for step in (1, 2):
        states.append(move(model, step))
        accelerator.save_state(str(tmp_path / f"checkpoint_{step}"))
    averaged(tmp_path / "checkpoint_*", "-o", tmp_path / "averaged")
    model.load_state_dict(load_file(tmp_path / "averaged/model.safetensors"))
    assert_is_mean(model, states)


def test_checkpoints_of_a_lightning_trainer_are_averaged_by_their_steps(tmp_path) -> None:
    import lightning

    states = []

    class Net(lightning.LightningModule):
        def __init__(self, width: int = 2) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width))

        def training_step(self, batch, number):
            return self.net(batch[0]).square().mean()

        def on_save_checkpoint(self, checkpoint) -> None:
            states.append({name: one.clone() for name, one in checkpoint["state_dict"].items()})

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 0.1)

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(12, 3)), batch_size=4)
    saver = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1, save_last=False)
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    with warnings.catch_warnings(action="ignore"):
        lightning.Trainer(max_epochs=3, callbacks=[saver], **options).fit(Net(), data)
    files = sorted(tmp_path.glob("*.ckpt"))
    assert [open_checkpoint(path).moment["ba"] for path in files] == [3, 6, 9]
    averaged(tmp_path / "*.ckpt", "-o", tmp_path / "averaged.pt")
    model = Net()
    model.load_state_dict(torch.load(tmp_path / "averaged.pt", weights_only=True))
    assert_is_mean(model, states)
    assert model.net[1].num_batches_tracked == 9


def test_folders_of_a_reference_model_of_trl_become_a_folder_for_from_pretrained(tmp_path) -> None:
    pytest.importorskip("trl")
    from transformers import GPT2Config, GPT2LMHeadModel
    from trl import create_reference_model

    model = GPT2LMHeadModel(GPT2Config(vocab_size=31, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    teacher, states = create_reference_model(model), []
    for step in (1, 2):
        states.append(move(teacher, step))
        teacher.save_pretrained(tmp_path / f"checkpoint-{step}")
    averaged(tmp_path / "checkpoint-*", "-o", tmp_path / "averaged")
    assert_is_mean(GPT2LMHeadModel.from_pretrained(tmp_path / "averaged"), states)


def test_checkpoints_of_timm_are_averaged_and_loaded_again(tmp_path) -> None:
    pytest.importorskip("torchvision", reason="timm needs it, or its stub in tests/stubs", exc_type=ImportError)
    import timm
    from timm.utils import CheckpointSaver, ModelEmaV3

    model = timm.create_model("test_vit", num_classes=3)
    ema, states = ModelEmaV3(model), []
    saver = CheckpointSaver(
        model, torch.optim.SGD(model.parameters(), 0.1), model_ema=ema, checkpoint_dir=tmp_path, recovery_dir=tmp_path
    )
    for epoch in (1, 2):
        states.append(move(model, epoch))
        saver.save_checkpoint(epoch, metric=epoch)
    averaged(tmp_path / "checkpoint-*.pth.tar", "--key", "state_dict", "-o", tmp_path / "averaged.safetensors")
    again = timm.create_model("test_vit", num_classes=3, checkpoint_path=str(tmp_path / "averaged.safetensors"))
    assert_is_mean(again, states)


def test_checkpoints_of_ultralytics_are_read_without_it_and_loaded_into_its_network(tmp_path) -> None:
    pytest.importorskip("ultralytics")
    from ultralytics import YOLO

    yolo, states = YOLO("yolo11n.yaml"), []
    for step in (1, 2):
        move(yolo.model, step)
        state = {name: one.clone().half() for name, one in yolo.model.state_dict().items()}
        states.append(state)
        content = {"epoch": step, "model": None, "ema": copy.deepcopy(yolo.model).half()}
        torch.save(
            {**content, "train_args": {}, "train_metrics": {"fitness": 0.1 * step}}, tmp_path / f"epoch{step}.pt"
        )
    averaged(tmp_path / "epoch*.pt", "-o", tmp_path / "averaged.pt")
    got = torch.load(tmp_path / "averaged.pt", weights_only=True)
    assert got.keys() == states[0].keys()
    assert all(torch.equal(got[name], mean(states, name)) for name in got if got[name].is_floating_point())
    yolo.model.load_state_dict(got)


def test_checkpoints_of_the_trainer_list_weights_and_average_and_a_key_chooses(tmp_path, capsys) -> None:
    from polyak import EMA, CheckpointSaver, Trainer

    model = nn.Linear(3, 2)
    data = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.randn(8, 3), torch.randn(8, 2)), batch_size=4
    )
    trainer = Trainer(
        model=model,
        train_dataloader=data,
        loss=nn.functional.mse_loss,
        optimizers=torch.optim.SGD(model.parameters(), 0.1),
        max_duration="3ep",
        algorithms=[EMA("2ba")],
        callbacks=[CheckpointSaver(tmp_path)],
        progress_bar=False,
    )
    trainer.fit()
    files = [path for path in sorted(tmp_path.rglob("*.pt")) if not path.is_symlink()]
    assert len(files) == 3
    assert main(["average", *map(str, files), "-o", str(tmp_path / "averaged.pt")]) == 2
    said = capsys.readouterr().err
    assert "model (2 tensors), algorithms.0.1.ema_model (2 tensors)" in said
    states = [torch.load(path, weights_only=True)["model"] for path in files]
    averaged(*files, "--key", "model", "-o", tmp_path / "averaged.pt", "--half-life", "1000000ep")
    model.load_state_dict(torch.load(tmp_path / "averaged.pt", weights_only=True))
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, mean(states, name), rtol=1e-5)


def test_checkpoints_of_mmengine_with_its_ema_are_averaged_by_their_epochs(tmp_path, monkeypatch) -> None:
    pytest.importorskip("mmengine")
    from mmengine.model import BaseModel
    from mmengine.runner import Runner

    class Net(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(3, 2)

        def forward(self, inputs, mode="tensor"):
            return {"loss": self.net(torch.stack(inputs)).square().mean()}

    monkeypatch.chdir(tmp_path)
    data = {"dataset": [torch.randn(3) for _ in range(8)], "batch_size": 4, "sampler": {"type": "DefaultSampler"}}
    data["collate_fn"] = {"type": "pseudo_collate"}
    with warnings.catch_warnings(action="ignore"):
        Runner(
            model=Net(),
            work_dir=str(tmp_path / "work"),
            train_dataloader={**data, "collate_fn": lambda rows: {"inputs": rows}},
            train_cfg={"by_epoch": True, "max_epochs": 3},
            optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1}},
            custom_hooks=[{"type": "EMAHook"}],
            default_hooks={"checkpoint": {"type": "CheckpointHook", "interval": 1}},
            default_scope="mmengine",
        ).train()
    files = [tmp_path / f"work/epoch_{n}.pth" for n in (2, 3)]
    averaged(*files, "--key", "state_dict", "-o", tmp_path / "averaged.pt")
    model = Net()
    model.load_state_dict(torch.load(tmp_path / "averaged.pt", weights_only=True))
    assert_is_mean(model, [torch.load(one, weights_only=False)["state_dict"] for one in files])


def test_the_best_of_a_lightning_trainer_are_those_of_its_callback_whose_names_are_rounded(tmp_path) -> None:
    import lightning

    losses = iter((3.04, 3.01, 3.03, 3.02))
    states = []

    class Net(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(3, 2)

        def training_step(self, batch, number):
            return self.net(batch[0]).square().mean()

        def on_validation_epoch_end(self) -> None:
            self.log("val_loss", next(losses))

        def validation_step(self, batch, number) -> None:
            pass

        def on_save_checkpoint(self, checkpoint) -> None:
            states.append({name: one.clone() for name, one in checkpoint["state_dict"].items()})

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(12, 3)), batch_size=4)
    saver = lightning.pytorch.callbacks.ModelCheckpoint(
        tmp_path, filename="{epoch}-{val_loss:.1f}", monitor="val_loss", save_top_k=-1
    )
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    with warnings.catch_warnings(action="ignore"):
        trainer = lightning.Trainer(max_epochs=4, callbacks=[saver], num_sanity_val_steps=0, **options)
        trainer.fit(Net(), data, data)
    assert sorted(one.name for one in tmp_path.glob("*.ckpt"))[0] == "epoch=0-val_loss=3.0.ckpt"
    averaged(tmp_path / "*.ckpt", "-o", tmp_path / "averaged.pt", "--best", 2, "--metric", "val_loss")
    model = Net()
    model.load_state_dict(torch.load(tmp_path / "averaged.pt", weights_only=True))
    assert_is_mean(model, [states[1], states[3]])


def test_the_best_and_the_last_five_of_a_transformers_trainer_are_averaged_and_evaluated(tmp_path) -> None:
    import transformers

    config = transformers.GPT2Config(vocab_size=17, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    data = [{"input_ids": torch.arange(8) + i, "labels": torch.arange(8) + i} for i in range(8)]
    arguments = transformers.TrainingArguments(
        str(tmp_path / "out"),
        num_train_epochs=6,
        per_device_train_batch_size=4,
        eval_strategy="epoch",
        save_strategy="epoch",
        learning_rate=0.05,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    with warnings.catch_warnings(action="ignore"):
        trainer = transformers.Trainer(transformers.GPT2LMHeadModel(config), arguments, None, data, data)
        trainer.train()
        folders = sorted((tmp_path / "out").iterdir())
        losses = {one: open_checkpoint(one).metrics["eval_loss"] for one in folders}
        assert len(losses) == 6
        averaged(tmp_path / "out/checkpoint-*", "-o", tmp_path / "last", "--last", 5)
        newest = sorted(folders, key=lambda one: int(one.name.rpartition("-")[2]))[-5:]
        assert_evaluates_as_the_mean(transformers, tmp_path / "last", newest, data, arguments)
        best = sorted(sorted(losses, key=losses.__getitem__)[:2], key=lambda one: int(one.name.rpartition("-")[2]))
        out = tmp_path / "averaged"
        averaged(tmp_path / "out/checkpoint-*", "-o", out, "--best", 2, "--metric", "eval_loss")
        assert_evaluates_as_the_mean(transformers, out, best, data, arguments)


def assert_evaluates_as_the_mean(transformers, folder, folders, data, arguments) -> None:
    """Load an average by ``from_pretrained``; its loss in a `Trainer` must be that of the mean of all weights."""
    states = [dict(transformers.GPT2LMHeadModel.from_pretrained(one).named_parameters()) for one in folders]
    again = transformers.GPT2LMHeadModel.from_pretrained(folder)
    detached = [{name: one.detach() for name, one in state.items()} for state in states]
    assert_is_mean(again, detached)
    expected = transformers.GPT2LMHeadModel.from_pretrained(folders[-1])
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            parameter.copy_(mean(detached, name))
    losses = [
        transformers.Trainer(one, arguments, None, data, data).evaluate()["eval_loss"] for one in (again, expected)
    ]
    assert losses[0] == losses[1] > 0

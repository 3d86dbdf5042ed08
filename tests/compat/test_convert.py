"""``polyak convert``: files that other libraries wrote, by running them, and files that nobody should have written.

Those of Composer and timm are in tests/compat/test_composer_files.py and tests/compat/test_convert_timm.py.
"""

import copy
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import ema_pytorch
import loops
import pytest
import torch
import torch_ema
from converting import assert_is, convert, move, net
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import polyak
from polyak import CheckpointError
from polyak.cli import main
from polyak.compat import READERS, read

# Other libraries' warnings while they write.
pytestmark = pytest.mark.filterwarnings("ignore")


def test_torch_averaged_model(tmp_path, capsys):
    model = net()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(3):
        move(model)
        averaged.update_parameters(model)
    torch.save(averaged.state_dict(), tmp_path / "a.pt")
    assert_is(averaged.module.state_dict(), convert(tmp_path / "a.pt"), model)
    out = capsys.readouterr().out
    assert "torch AveragedModel" in out
    assert "averaged 3 times" in out
    torch.save({"model": model.state_dict(), "ema": averaged.state_dict(), "step": 3}, tmp_path / "b.pt")
    assert_is(averaged.module.state_dict(), convert(tmp_path / "b.pt"))
    assert "found under 'ema'" in capsys.readouterr().out
    # The same as safetensors: tied tensors once for each name.
    save_file({name: t.clone() for name, t in averaged.state_dict().items()}, tmp_path / "c.safetensors")
    assert_is(averaged.module.state_dict(), convert(tmp_path / "c.safetensors"))
    with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["polyak.source"] == "c.safetensors"
    assert metadata["polyak.source_format"] == "torch AveragedModel"
    assert len(metadata["polyak.source_sha256"]) == 64


def test_an_averaged_model_of_a_compiled_model_loses_the_wrappers_names(tmp_path):
    model = net()
    averaged = AveragedModel(torch.compile(model), use_buffers=True)
    torch.save(averaged.state_dict(), tmp_path / "a.pt")
    assert_is(model.state_dict(), convert(tmp_path / "a.pt"), model)


@pytest.mark.parametrize("include_online", [True, False])
def test_ema_pytorch(tmp_path, include_online):
    model = net()
    ema = ema_pytorch.EMA(model, beta=0.9, update_after_step=0, update_every=1, include_online_model=include_online)
    torch.save(ema.state_dict(), tmp_path / "early.pt")
    with pytest.raises(CheckpointError, match="not begun"):
        read(tmp_path / "early.pt")
    for _ in range(4):
        move(model)
        ema.update()
    torch.save({"step": 4, "model": model.state_dict(), "ema": ema.state_dict()}, tmp_path / "trainer.pt")
    assert_is(ema.ema_model.state_dict(), convert(tmp_path / "trainer.pt"), model)
    torch.save(ema.state_dict(), tmp_path / "a.pt")
    assert_is(ema.ema_model.state_dict(), convert(tmp_path / "a.pt"))


@pytest.mark.parametrize("steps", [4, 70_000])
def test_a_checkpoint_of_ema_pytorchs_posthocema(tmp_path, capsys, steps):
    # It saves all in float16 by default, the number of steps too, which is inf from 65,520 on.
    model = net()
    ema = ema_pytorch.PostHocEMA(
        model, sigma_rels=(0.05, 0.28), update_every=1, checkpoint_folder=tmp_path, checkpoint_every_num_steps=4
    )
    for _ in range(3):
        move(model)
        ema.update()
    for one in ema.ema_models:
        one.step.fill_(steps - 1)
    ema.update()
    want = {name: tensor.half() for name, tensor in ema.ema_models[1].ema_model.state_dict().items()}
    assert_is(want, convert(tmp_path / f"1.{steps}.pt"), model)
    assert ("4 steps" in capsys.readouterr().out) is (steps == 4)


def positional(library: str, model: nn.Module) -> Any:
    if library == "torch-ema":
        ema = torch_ema.ExponentialMovingAverage(model.parameters(), decay=0.9)
        update = ema.update
    else:
        from diffusers.training_utils import EMAModel  # takes seconds

        ema = EMAModel(model.parameters(), decay=0.9)
        update = ema.step
    move(model)
    update(model.parameters())
    move(model)
    update(model.parameters())
    return ema


@pytest.mark.parametrize("library", ["torch-ema", "diffusers"])
def test_what_has_no_names_gets_them_from_the_model(tmp_path, library, capsys):
    model = net()
    ema = positional(library, model)
    torch.save(ema.state_dict(), tmp_path / "ema.pt")
    want = copy.deepcopy(model)
    ema.copy_to(want.parameters())
    torch.save(model.state_dict(), tmp_path / "model.pt")
    got = convert(tmp_path / "ema.pt", "--names", str(tmp_path / "model.pt"))
    assert_is(want.state_dict(), got, model)
    out = capsys.readouterr().out
    assert library in out
    assert "3 others, not averaged, are from model.pt" in out
    names = [name for name, _ in model.named_parameters()]
    (tmp_path / "names.json").write_text(json.dumps(names))
    got = convert(tmp_path / "ema.pt", "--names", str(tmp_path / "names.json"))
    assert_is({name: dict(want.named_parameters())[name].detach() for name in names}, got)


@pytest.mark.parametrize("library", ["torch-ema", "diffusers"])
def test_names_that_do_not_fit_are_refused(tmp_path, library, capsys):
    model = net()
    torch.save(positional(library, model).state_dict(), tmp_path / "ema.pt")
    output = ["-o", str(tmp_path / "out.safetensors")]
    assert main(["convert", str(tmp_path / "ema.pt"), *output]) == 2
    assert "without names; give --names" in capsys.readouterr().err
    save_file({name: t.clone() for name, t in model.state_dict().items()}, tmp_path / "model.safetensors")
    torch.save(loops.perceptron().state_dict(), tmp_path / "other.pt")
    for name, text in {
        "names.json": '["a", "b"]',
        "twice.json": '["a", "b", "c", "d", "e", "a"]',
        "dict.json": '{"a": 1}',
        "cut.json": '["a"',
    }.items():
        (tmp_path / name).write_text(text)
    for name, message in {
        "model.safetensors": "order",
        "other.pt": "4 there, 6 here",
        "names.json": "6 names (it has 2)",
        "twice.json": "each name once",
        "dict.json": "a JSON list of names (got a dict of 1)",
        "cut.json": "a JSON list of names",
        "absent.json": "a JSON list of names",
        "absent.pt": "must exist",
    }.items():
        assert main(["convert", str(tmp_path / "ema.pt"), *output, "--names", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


def test_a_folder_of_diffusers(tmp_path, capsys):
    from diffusers import UNet2DModel
    from diffusers.training_utils import EMAModel

    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    model = UNet2DModel(8, block_out_channels=(4, 4), layers_per_block=1, norm_num_groups=2, **blocks)
    ema = EMAModel(model.parameters(), decay=0.9, model_cls=UNet2DModel, model_config=model.config)
    move(model)
    ema.step(model.parameters())
    ema.save_pretrained(tmp_path / "unet_ema")
    got = convert(tmp_path / "unet_ema")
    want = copy.deepcopy(model)
    ema.copy_to(want.parameters())
    assert_is(want.state_dict(), got, model)
    assert "UNet2DModel, decay 0.9, 1 updates" in capsys.readouterr().out
    (tmp_path / "other").mkdir()
    assert main(["convert", str(tmp_path / "other"), "-o", str(tmp_path / "x.safetensors")]) == 2
    assert "EMAModel.save_pretrained" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["WeightAveraging", "EMAWeightAveraging"])
def test_lightning(tmp_path, host):
    import lightning.pytorch as lightning  # takes seconds

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = loops.noisy_perceptron()

        def training_step(self, batch: Any) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Module()
    callback = getattr(lightning.callbacks, host)()
    trainer = lightning.Trainer(
        max_epochs=1, callbacks=[callback], logger=False, enable_progress_bar=False, enable_model_summary=False,
        accelerator="cpu", default_root_dir=tmp_path, barebones=False,
    )  # fmt: skip
    kept = {}

    def keep(*args: Any) -> None:
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        kept.update(copy.deepcopy(dict(callback._average_model.module.state_dict())))

    callback.on_train_epoch_end = keep
    trainer.fit(module, torch.utils.data.DataLoader(loops.dataset(), batch_size=loops.BATCH))
    assert_is(kept, convert(tmp_path / "a.ckpt"), module)


def composer_state(**changes: Any) -> dict[str, Any]:
    """As the head of Composer makes it (composer/algorithms/ema/ema.py)."""
    held = {"named_parameters_dict": {"weight": torch.ones(2)}, "named_buffers_dict": {"mean": torch.zeros(1)}}
    return {"repr": "EMA()", "ema_model": held, "ema_weights_active": False, "ema_started": True, **changes}


def test_the_state_of_composers_ema_alone(tmp_path):
    torch.save(composer_state(), tmp_path / "a.pt")
    assert convert(tmp_path / "a.pt").keys() == {"weight", "mean"}
    early = {"ema_model": {"weight": torch.ones(2)}, "training_model": {"weight": torch.zeros(2)}}
    torch.save(composer_state(**early, ema_weights_active=True), tmp_path / "b.pt")
    assert convert(tmp_path / "b.pt")["weight"].tolist() == [1, 1]
    for changes, message in {"ema_weights_active": "whole checkpoint", "ema_started": "not begun"}.items():
        torch.save(composer_state(**{changes: changes == "ema_weights_active"}), tmp_path / "c.pt")
        with pytest.raises(CheckpointError, match=message):
            read(tmp_path / "c.pt")


def test_polyaks_own_checkpoints(tmp_path):
    ema = polyak.EMA("4ba")
    trainer = loops.train(tmp_path, ema=ema, model=loops.noisy_perceptron())
    trainer.fit()
    trainer.save_checkpoint(str(tmp_path / "end.pt"))
    assert_is(loops.averaged(ema), convert(tmp_path / "end.pt"), trainer.state.model)
    torch.save(ema.state_dict(), tmp_path / "state.pt")
    assert_is(loops.averaged(ema), convert(tmp_path / "state.pt"))


def test_attached_averages_state(tmp_path):
    model = loops.perceptron()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    ema = polyak.EMA("4ba")
    attached = polyak.attach(ema, model, optimizer)
    for _ in range(3):
        model(torch.ones(2, 6)).square().mean().backward()
        optimizer.step()
    torch.save(attached.state_dict(), tmp_path / "a.pt")
    assert convert(tmp_path / "a.pt").keys() == {"2.weight", "2.bias"}


@pytest.mark.parametrize("key", [None, "averaging"], ids=["alone", "in a checkpoint"])
def test_a_hosts_state(tmp_path, key):
    ema = polyak.EMA("4ba")
    loops.train(tmp_path, ema=ema).fit()
    state = {"algorithms": [("Recorder", {"count": 3}), ("EMA", ema.state_dict())], "timestamp": {"batch": 18}}
    torch.save({key: state} if key else state, tmp_path / "a.pt")
    assert_is(loops.averaged(ema), convert(tmp_path / "a.pt"))


class Touch:
    """Runs code where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_no_code_of_a_file_runs(tmp_path):
    averaged = AveragedModel(loops.perceptron())
    torch.save({"ema": averaged.state_dict(), "args": Touch(tmp_path / "ran")}, tmp_path / "bad.pt")
    legacy = {"_use_new_zipfile_serialization": False}
    torch.save({"ema": averaged.state_dict(), "args": Touch(tmp_path / "ran")}, tmp_path / "old.pt", **legacy)
    # What runs code is refused or stands inert; either way nothing is run.
    for name in ("bad.pt", "old.pt"):
        main(["convert", str(tmp_path / name), "-o", str(tmp_path / "out.safetensors")])
        assert not (tmp_path / "ran").exists()


def test_objects_of_libraries_that_are_not_installed_do_not_matter(tmp_path, monkeypatch):
    class Config:
        def __init__(self) -> None:
            self.lr = 0.1

    Config.__module__, Config.__qualname__ = "a_library", "Config"
    library = type(sys)("a_library")
    library.Config = Config
    averaged = AveragedModel(loops.perceptron())
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "a_library", library)
        torch.save({"ema": averaged.state_dict(), "config": Config()}, tmp_path / "a.pt")
    assert_is(averaged.module.state_dict(), convert(tmp_path / "a.pt"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight": torch.ones(1), "step": 1}, "known format: Composer.*torch-ema.*has the keys weight"),
        ({"module.weight": torch.ones(1)}, "DDP"),
        ({}, "has the keys none"),
        (torch.ones(1), "got a Tensor"),
        ({"polyak_checkpoint": 1}, "whole.*KeyError"),
        ({"a": composer_state(), "b": composer_state()}, "one average.*'a', 'b'"),
        ({"state": {"model": {}, "metadata": {}}}, "of Composer, and it has the state of no EMA"),
    ],
    ids=str,
)
def test_other_files_are_refused_with_a_list_of_what_is_known(tmp_path, capsys, content, message):
    torch.save(content, tmp_path / "a.pt")
    assert main(["convert", str(tmp_path / "a.pt"), "-o", str(tmp_path / "out.safetensors")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)
    assert not (tmp_path / "out.safetensors").exists()


def test_what_is_no_file_of_tensors_is_refused(tmp_path, capsys):
    (tmp_path / "a.pt").write_text("hello")
    (tmp_path / "b.safetensors").write_text("hello")
    for name in ("a.pt", "b.safetensors", "absent.pt"):
        assert main(["convert", str(tmp_path / name), "-o", str(tmp_path / "out.safetensors")]) == 2
        assert name in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "a.pt"), "-o", str(tmp_path / "a.pt")]) == 2
    assert "another file" in capsys.readouterr().err


def test_what_is_written_is_a_safetensors_file_by_name_too_in_a_folder_that_exists(tmp_path, capsys):
    torch.save(AveragedModel(loops.perceptron()).state_dict(), tmp_path / "a.pt")
    for name, message in {
        "out.pt": "must end in .safetensors",
        "absent/out.safetensors": "a folder that exists",
    }.items():
        assert main(["convert", str(tmp_path / "a.pt"), "-o", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize(("option", "message"), [("--names", "leave out those"), ("--timm", "leave out --timm")])
def test_an_option_that_does_not_go_with_the_file_is_refused(tmp_path, capsys, option, message):
    torch.save(AveragedModel(loops.perceptron()).state_dict(), tmp_path / "a.pt")
    given = [option, str(tmp_path / "a.pt")] if option == "--names" else [option]
    assert main(["convert", str(tmp_path / "a.pt"), "-o", str(tmp_path / "out.safetensors"), *given]) == 2
    assert message in capsys.readouterr().err


ONE = {"weight": torch.ones(2)}
CONTENTS = [
    {"polyak_checkpoint": 1, "model_holds": "averaged weights", "model": ONE, "algorithms": {}},
    {"polyak": {"state_dict_holds": "training weights", "algorithms": {"EMA": composer_state()}}, "state_dict": ONE},
    {"state": {"model": ONE, "metadata": {}, "algorithms": [("EMA", composer_state(ema_weights_active=True))]}},
    composer_state(),
    {"algorithms": [("EMA", composer_state())], "timestamp": {}},
    {"averaging_state": {}, "current_model_state": ONE, "state_dict": ONE},
    {"state_dict_ema": ONE, "state_dict": ONE},
    {"n_averaged": torch.tensor(3), "module.weight": torch.ones(2)},
    {"initted": torch.tensor(True), "step": torch.tensor(3), "ema_model.weight": torch.ones(2)},
    {"shadow_params": [torch.ones(2)], "optimization_step": 3, "decay": 0.9},
]
ODD = [
    None,
    -1,
    math.inf,
    "x",
    [],
    [None],
    {},
    {"x": None},
    {0: 0},
    torch.ones(2),
    torch.tensor(math.nan),
    [("EMA", 1)],
]


def spoilt(content: Any) -> Iterator[Any]:
    """Yield it with any one of its values, at any depth, removed or replaced by something odd."""
    for key in content if isinstance(content, dict) else range(len(content)):
        kept = [k for k in content if k != key] if isinstance(content, dict) else []
        yield {k: content[k] for k in kept}
        inner = list(spoilt(content[key])) if isinstance(content[key], (dict, list, tuple)) else []
        for odd in [*ODD, *inner]:
            if isinstance(content, dict):
                yield content | {key: odd}
            else:
                yield [odd if i == key else value for i, value in enumerate(content)]


@pytest.mark.parametrize("content", CONTENTS, ids=lambda content: next(iter(content)))
def test_a_file_that_is_not_whole_is_read_or_refused_and_no_more(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    (tmp_path / "names.json").write_text('["weight"]')
    names = tmp_path / "names.json" if "shadow_params" in content else None
    assert read(tmp_path / "a.pt", names).tensors.keys() <= {"weight", "mean"}
    for bad in spoilt(content):
        torch.save(bad, tmp_path / "a.pt")
        with suppress(CheckpointError):
            assert all(isinstance(tensor, Tensor) for tensor in read(tmp_path / "a.pt", names).tensors.values()), bad


def test_every_reader_passes_over_what_is_not_its_own():
    for content in ({}, {"weight": torch.ones(1)}, {0: {"exp_avg": torch.ones(1)}}, {"state": {0: {}}}, {"step": 1}):
        assert [reader(content) for reader in READERS] == [None] * len(READERS)

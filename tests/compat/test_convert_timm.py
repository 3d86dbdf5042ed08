"""``polyak convert`` on files that timm wrote."""

from importlib.util import find_spec

import pytest
import torch
from converting import assert_is, convert, move, net

from polyak.cli import main

if find_spec("torchvision") is None:
    pytest.skip("timm needs stubs: PYTHONPATH=tests/stubs pytest ..., as in `make test`", allow_module_level=True)

from timm import utils

# Its own warnings while it writes.
pytestmark = pytest.mark.filterwarnings("ignore")


def averaged() -> tuple[torch.nn.Module, utils.ModelEmaV3]:
    model = net()
    ema = utils.ModelEmaV3(model, decay=0.9)
    move(model)
    ema.update(model)
    return model, ema


def test_the_average_is_taken_out_of_a_checkpoint_of_timm(tmp_path):
    model, ema = averaged()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    saver = utils.CheckpointSaver(model, optimizer, model_ema=ema, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(0, metric=0.5)
    assert_is(ema.module.state_dict(), convert(tmp_path / "last.pth.tar"), model)


def test_a_state_dict_of_timms_average_looks_like_any_under_ddp_and_must_be_named(tmp_path, capsys):
    _, ema = averaged()
    torch.save(ema.state_dict(), tmp_path / "a.pt")
    assert main(["convert", str(tmp_path / "a.pt"), "-o", str(tmp_path / "x.safetensors")]) == 2
    assert "--timm" in capsys.readouterr().err
    assert_is(ema.module.state_dict(), convert(tmp_path / "a.pt", "--timm"))
